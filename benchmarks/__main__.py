"""Times every available implementation on the quoted shapes, beside the memory's bandwidth.

    python -m benchmarks                        all shapes that fit
    python -m benchmarks seed cann --repeat 50  some of them
    python -m benchmarks --plot docs/roofline.png benchmarks/results/*.json

Each run prints a table and writes a JSON file. On a CPU calls are timed one by one, on a GPU inside
programs of many. All problem sets of a shape together exceed the caches and are used in turn (not
those of `tiny`, which shows what a call costs that moves next to nothing).
Figures are medians; the bandwidth is measured between the calls of the same run, for each shape.
`--plot` needs matplotlib: pip install 'jax_nsa[examples]'.
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

import jax

import jax_nsa
from benchmarks import measure, peers
from benchmarks.shapes import SHAPES, operator, problem_sets
from jax_nsa import backends
from jax_nsa.compress_attention.door import OPERATOR

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


def available(names: list[str] | None) -> list[str]:
    """The implementations to time: those named, or all that run here."""
    platform_name = "cuda" if jax.default_backend() == "gpu" else jax.default_backend()
    able = [
        name
        for name, backend in backends.ALL.items()
        if backends.why_not(backend, OPERATOR, platform_name) is None
    ]
    return names or able


def run(name: str, implementations: list[str], repeat: int, bandwidth, with_peers: bool) -> dict:
    """Times one shape; returns its row of the results."""
    shape = SHAPES[name]
    sets = problem_sets(shape)
    runs = {i: operator(shape, i) for i in implementations}
    on_host = jax.default_backend() == "cpu"
    timer = (measure.HostTimer if on_host else measure.DeviceTimer)(runs, sets)
    samples: dict[str, list[float]] = {i: [] for i in implementations}
    # Slow implementations are timed less often, so that a table takes minutes.
    slow = {i: timer.sample(i, 0) for i in implementations}
    bandwidths = []
    for i in range(repeat):
        if i % max(1, repeat // 8) == 0:
            bandwidths.append(bandwidth.sample())
        for implementation in implementations:
            if i < max(3, repeat * min(1.0, 0.05 / slow[implementation])):
                samples[implementation].append(timer.sample(implementation, i))
    if with_peers and (torch_run := peers.torch_attention(shape)):
        samples["torch attention"] = []
        for operands in itertools.islice(itertools.cycle(sets), 4):
            samples["torch attention"].append(
                measure.seconds(lambda operands=operands: torch_run(*operands))
            )
    return {
        "shape": name,
        "floor_bytes": shape.floor_bytes,
        "read_bandwidth": statistics.median(bandwidths),
        "seconds": {i: statistics.median(s) for i, s in samples.items()},
        "host_seconds": {i: measure.dispatch(runs[i], sets[0]) for i in implementations}
        if not on_host
        else {},
    }


def print_row(row: dict) -> None:
    """One line for each implementation."""
    floor = row["floor_bytes"] / row["read_bandwidth"]
    reference = row["seconds"].get("reference")
    for implementation, elapsed in row["seconds"].items():
        times = f"{reference / elapsed:7.1f} x as fast as the reference" if reference else ""
        print(
            f"{row['shape']:6} {row['floor_bytes'] / 1e6:8.1f} MB  {implementation:16}"
            f"{elapsed * 1e6:12.1f} us {row['floor_bytes'] / elapsed / 1e9:8.1f} GB/s"
            f"  {floor / elapsed:6.1%} of {row['read_bandwidth'] / 1e9:.0f} GB/s read {times}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", nargs="*", help=f"shapes among {', '.join(SHAPES)}; or JSON files")
    parser.add_argument(
        "--implementation", action="append", help="time only this one, without peers"
    )
    parser.add_argument("--repeat", type=int, default=40, help="calls that a median is of")
    parser.add_argument("--plot", metavar="PNG", help="draw the results in the given JSON files")
    arguments = parser.parse_args()
    if arguments.plot:
        try:
            from benchmarks.plot import draw
        except ModuleNotFoundError as error:
            parser.exit(1, f"--plot needs {error.name}: pip install 'jax_nsa[examples]'\n")
        draw([json.loads(pathlib.Path(p).read_text()) for p in arguments.what], arguments.plot)
        return
    if unknown := set(arguments.what) - set(SHAPES):
        parser.error(f"no such shape: {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")

    implementations = available(arguments.implementation)
    report = {"machine": machine(), "trivial_call": measure.trivial_call(), "rows": []}
    print("  ".join(f"{what}: {value}" for what, value in report["machine"].items()))
    trivial = f"a trivial jitted call takes {report['trivial_call'] * 1e6:.1f} us"
    print(f"medians of up to {arguments.repeat} calls; {trivial}")
    on_host = jax.default_backend() == "cpu"
    bandwidth = measure.HostBandwidth() if on_host else measure.DeviceBandwidth()
    for name in arguments.what or SHAPES:
        try:
            row = run(
                name, implementations, arguments.repeat, bandwidth, not arguments.implementation
            )
        except Exception as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and not isinstance(error, MemoryError):
                raise
            print(f"{name:6} does not fit this device's memory")
            continue
        report["rows"].append(row)
        print_row(row)
    RESULTS.mkdir(exist_ok=True)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = RESULTS / f"{report['machine']['platform']}-{stamp}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
