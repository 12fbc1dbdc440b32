"""Times every available implementation of the operators, beside the memory's bandwidth.

    python -m benchmarks                        all operators, all shapes that fit
    python -m benchmarks seed cann --repeat 50  some shapes
    python -m benchmarks --operator decode_step
    python -m benchmarks --plot docs/roofline.png benchmarks/results/*.json

Each run prints tables and writes a JSON file. On a CPU calls are timed one by one, on a GPU inside
programs of many. All problem sets of a shape together exceed the caches and are used in turn (not
those of `tiny`, beside which a call that does nothing with the same arrays is timed).
Figures are medians; the bandwidth is that of plain vector loads on a CPU, of reductions on a GPU,
measured between the calls of the same run, on a CPU before each.
On a CPU a C++17 compiler is needed, `--plot` needs matplotlib: pip install 'jax_nsa[examples]'.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import pathlib
import platform
import re
import statistics
import sys
from typing import Any

import jax

import jax_nsa
from benchmarks import compress_attention, decode_step, measure, probe, select_attention
from benchmarks.problems import Benchmark
from jax_nsa import backends
from jax_nsa.shapes import SHAPES

BENCHMARKS = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (compress_attention, select_attention, decode_step)
}
EMPTY_CALL = "empty FFI call"
TINY_BYTES = 1 << 20  # below which a call's own cost is what counts
RESULTS = pathlib.Path(__file__).parent / "results"


def machine() -> dict[str, str]:
    """What the figures depend on."""
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu" and (info := pathlib.Path("/proc/cpuinfo")).exists():
        found = re.search(r"model name\s*: (.*)", info.read_text())
        cores = f"{len(os.sched_getaffinity(0))} cores"
        name = f"{found[1] if found else platform.machine()}, {cores}"
    return {
        "device": name,
        "platform": device.platform,
        "jax": jax.__version__,
        "jax_nsa": jax_nsa.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def available(benchmark: Benchmark, names: list[str] | None) -> list[str]:
    """The implementations to time: those named, or all that run here."""
    platform_name = "cuda" if jax.default_backend() == "gpu" else jax.default_backend()
    return names or [
        name
        for name, backend in backends.ALL.items()
        if all(backends.why_not(backend, o, platform_name) is None for o in benchmark.needs)
    ]


def run(
    benchmark: Benchmark, name: str, implementations: list[str], repeat: int, bandwidth,
    with_peers: bool,
) -> dict:  # fmt: skip
    """Times one shape; returns its row of the results."""
    shape = SHAPES[name]
    floor = benchmark.floor_bytes(shape)
    on_host = jax.default_backend() == "cpu"
    is_tiny = floor < TINY_BYTES
    sets = benchmark.operands(shape)
    runs = {i: benchmark.call(shape, i) for i in implementations}
    if on_host and is_tiny:
        repeat *= 10
        runs[EMPTY_CALL] = probe.empty_call(runs[implementations[0]])
    timer = (measure.HostTimer if on_host else measure.DeviceTimer)(runs, sets)
    samples: dict[str, list[float]] = {i: [] for i in runs}
    shares: dict[str, list[float]] = {i: [] for i in runs}
    # Slow implementations are timed less often, so that a table takes minutes.
    slow = {i: timer.sample(i, 0) for i in runs}
    bandwidths = []
    for i in range(repeat):
        # To read all memory before a tiny call would be to time its way back into the caches.
        if (on_host and not is_tiny) or i % max(1, repeat // 8) == 0:
            bandwidths.append(bandwidth.sample())
        for implementation in runs:
            if i < max(3, repeat * min(1.0, 0.05 / slow[implementation])):
                elapsed = timer.sample(implementation, i)
                samples[implementation].append(elapsed)
                shares[implementation].append(floor / elapsed / bandwidths[-1])
    if with_peers and on_host:
        for peer, peer_run in benchmark.peers(shape).items():
            samples[peer] = [
                measure.seconds(lambda operands=operands, run=peer_run: run(*operands))
                for operands in itertools.islice(itertools.cycle(sets), 4)
            ]
            shares[peer] = [floor / s / bandwidths[-1] for s in samples[peer]]
    return {
        "operator": benchmark.name,
        "shape": name,
        "floor_bytes": floor,
        "read_bandwidth": statistics.median(bandwidths),
        "seconds": {i: statistics.median(s) for i, s in samples.items()},
        "share_of_bandwidth": {i: statistics.median(s) for i, s in shares.items()},
        "host_seconds": {i: measure.dispatch(runs[i], sets[0]) for i in implementations}
        if not on_host
        else {},
    }


def print_row(row: dict) -> None:
    """One line for each implementation."""
    megabytes, bandwidth = row["floor_bytes"] / 1e6, row["read_bandwidth"] / 1e9
    for name, elapsed in row["seconds"].items():
        beside = [
            f"{row['seconds'][other] / elapsed if faster else elapsed / row['seconds'][other]:.1f} "
            f"x {text}"
            for other, faster, text in (
                ("reference", True, "as fast as the reference"),
                (EMPTY_CALL, False, "an empty FFI call"),
            )
            if other in row["seconds"] and name not in (other, EMPTY_CALL)
        ]
        speed = (
            f"{megabytes / 1e3 / elapsed:8.1f} GB/s  {row['share_of_bandwidth'][name]:6.1%} of "
            f"{bandwidth:.0f} GB/s read  "
        )
        print(
            f"{row['shape']:6} {megabytes:8.1f} MB  {name:16}{elapsed * 1e6:12.1f} us "
            f"{speed if EMPTY_CALL not in row['seconds'] else ''}{', '.join(beside)}".rstrip(),
            flush=True,
        )


def write(report: dict[str, Any], path: str | None, name: str) -> None:
    """Writes a report to `path`, or under `name` and the time among the results."""
    if not path:
        RESULTS.mkdir(exist_ok=True)
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        path = str(RESULTS / f"{name}-{stamp}.json")
    pathlib.Path(path).write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {path}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    shapes = list(dict.fromkeys(s for b in BENCHMARKS.values() for s in b.shapes))
    parser.add_argument("what", nargs="*", help=f"shapes among {', '.join(shapes)}; or JSON files")
    parser.add_argument(
        "--operator", action="append", choices=list(BENCHMARKS), help="time only this one"
    )
    parser.add_argument(
        "--implementation", action="append", help="time only this one, without peers"
    )
    parser.add_argument("--repeat", type=int, default=40, help="calls that a median is of")
    parser.add_argument("--output", metavar="JSON", help="where to write, not benchmarks/results")
    parser.add_argument("--plot", metavar="PNG", help="draw the results in the given JSON files")
    arguments = parser.parse_args()
    if arguments.plot:
        try:
            from benchmarks.plot import draw
        except ModuleNotFoundError as error:
            parser.exit(1, f"--plot needs {error.name}: pip install 'jax_nsa[examples]'\n")
        draw([json.loads(pathlib.Path(p).read_text()) for p in arguments.what], arguments.plot)
        return
    if unknown := set(arguments.what) - set(shapes):
        parser.error(f"no such shape: {', '.join(sorted(unknown))}; there are {', '.join(shapes)}")

    report = {"machine": machine(), "trivial_call": measure.trivial_call(), "rows": []}
    print("  ".join(f"{what}: {value}" for what, value in report["machine"].items()))
    trivial = f"a trivial jitted call takes {report['trivial_call'] * 1e6:.1f} us"
    print(f"medians of up to {arguments.repeat} calls; {trivial}")
    on_host = jax.default_backend() == "cpu"
    bandwidth = probe.HostBandwidth() if on_host else measure.DeviceBandwidth()
    for operator in arguments.operator or BENCHMARKS:
        benchmark = BENCHMARKS[operator]
        implementations = available(benchmark, arguments.implementation)
        print(f"\n{operator}")
        for name in (s for s in benchmark.shapes if s in (arguments.what or shapes)):
            print(f"  {name}: {SHAPES[name]}")
            try:
                row = run(
                    benchmark, name, implementations, arguments.repeat, bandwidth,
                    not arguments.implementation,
                )  # fmt: skip
            except Exception as error:
                if "RESOURCE_EXHAUSTED" not in str(error) and not isinstance(error, MemoryError):
                    raise
                print(f"{name:6} does not fit this device's memory")
                continue
            report["rows"].append(row)
            print_row(row)
    write(report, arguments.output, report["machine"]["platform"])


if __name__ == "__main__":
    main()
