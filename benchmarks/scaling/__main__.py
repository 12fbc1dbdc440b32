"""Times a decode step on 1, 2, 4 and 8 devices, as far as there are so many.

    python -m benchmarks.scaling                            some two minutes on two GPUs
    python -m benchmarks.scaling --quick --cpu-devices 8    whether it runs; times tell nothing
    python -m benchmarks.scaling results/scaling-gpu.json --plot scaling.png    what was measured

Sequences are split, key/value heads, both, and the pages of one long sequence (`context_axis`).
Strong scaling keeps the step, weak scaling a device's share of it. Timed are the whole step and
its compressed branch alone. A program is a scan over steps that keeps all of their results; pools
exceed the caches of each device. Times are microseconds of a step, medians of programs.

Beside them, a device's share of the floor: the step's keys and values read once, by all devices
together. And the collectives in the compiled program's text, as what each device receives; what of
it a ring sends over the links, at the speed of a large all-reduce; and the same all-reduces alone.
Where a step was timed on one device too, the others are held to its results.
Each run prints tables and writes a JSON file, and a picture if told to, which needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax

from benchmarks import measure
from benchmarks.__main__ import machine, write
from benchmarks.scaling import table, timing
from benchmarks.scaling.series import SPLITS, Point, Series, all_series

DEVICES = (1, 2, 4, 8)


def with_progress(points: list[Point]) -> Iterator[Point]:
    """The points, with a bar on a terminal, or a line for each elsewhere."""
    began = time.monotonic()
    begin, end = ("\r\033[K", "") if sys.stderr.isatty() else ("", "\n")
    for done, point in enumerate(points):
        bar = f"[{'#' * done}{'.' * (len(points) - done)}] {time.monotonic() - began:4.0f} s"
        text = f"{bar}  {point.shape.about}, {point.split}"
        print(f"{begin}{text}", end=end, file=sys.stderr, flush=True)
        yield point
    print(f"{begin}measured in {time.monotonic() - began:.0f} s", file=sys.stderr)


def rows_of(series: Series, measured: dict[Point, dict[str, Any]]) -> list[dict[str, Any]]:
    """What a series comes to, for each part and number of devices."""
    rows = []
    for part in timing.TIMED:
        seconds = {point: of_point[part]["seconds"] for point, of_point in measured.items()}
        for devices, point in series.points.items():
            rows.append({
                "scaling": "strong" if series.strong else "weak", "split": series.split,
                "shape": point.shape.about,
                "heads": f"{point.shape.heads}/{point.shape.key_value_heads} heads",
                "devices": devices, "part": part,
                "one_device_seconds": seconds[series.points[1]],
                "efficiency": series.efficiency(devices, seconds), **measured[point][part],
            })  # fmt: skip
    return rows


def run(every: list[Series], counts: list[int], effort: timing.Effort) -> dict[str, Any]:
    """Measures series over these numbers of devices, returns the report."""
    # Those on fewer devices first: one device's results are what others are held to.
    points = sorted(
        dict.fromkeys(point for series in every for point in series.points.values()),
        key=lambda point: point.split.devices,
    )
    expected: timing.Results = {}
    measured = {}
    for point in with_progress(points):
        measured[point] = timing.measure_point(point, max(counts), effort, expected)
    bandwidth = None
    if jax.default_backend() != "cpu":  # where devices share one memory
        reader = measure.DeviceBandwidth()
        bandwidth = statistics.median(reader.sample() for _ in range(5))
    return {
        "machine": machine() | {"devices": str(max(counts))},
        "nccl": {name: value for name, value in os.environ.items() if name.startswith("NCCL_")},
        "read_bandwidth": bandwidth,
        "links": {str(n): timing.links(n, effort) for n in counts if n > 1},
        "series": [row for series in every for row in rows_of(series, measured)],
    }


def print_report(report: dict[str, Any]) -> None:
    """The machine, what it can do at best, and the tables."""
    print("  ".join(f"{what}: {value}" for what, value in report["machine"].items()))
    if report["read_bandwidth"]:
        print(f"a device reads {report['read_bandwidth'] / 1e9:.0f} GB/s")
    for devices, link in report["links"].items():
        speed, small = link["bytes_per_second"] / 1e9, link["small_seconds"] * 1e6
        print(
            f"in a large all-reduce each of {devices} devices sends {speed:.1f} GB/s; one of 4 "
            f"bytes takes {small:.1f} us"
        )
    print(f"\n{table.markdown(report)}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.scaling", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("reports", nargs="*", metavar="JSON", help="print these, measure nothing")
    parser.add_argument("--devices", type=int, nargs="+", choices=DEVICES, help="one and these")
    parser.add_argument(
        "--quick", action="store_true", help="small steps, warm caches, few programs"
    )
    parser.add_argument("--repeat", type=int, default=15, help="programs that a median is of")
    parser.add_argument("--split", choices=SPLITS, action="append", help="only what is split so")
    parser.add_argument("--cpu-devices", type=int, help="how many devices the CPU is to be")
    parser.add_argument("--output", metavar="JSON", help="where to write, not benchmarks/results")
    parser.add_argument("--plot", metavar="PNG", help="draw a picture, too")
    arguments = parser.parse_args()
    draw = None
    if arguments.plot:
        try:
            from benchmarks.scaling.plot import draw
        except ModuleNotFoundError as error:
            parser.exit(1, f"--plot needs {error.name}: pip install 'jax_nsa[examples]'\n")
    if arguments.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", arguments.cpu_devices)
    reports = [json.loads(pathlib.Path(path).read_text()) for path in arguments.reports]
    if not reports:
        there = len(jax.devices())
        if there < max(arguments.devices or (2,)):
            parser.error(
                f"there are too few devices: {there} x {jax.devices()[0].device_kind}; "
                "--cpu-devices makes more of a CPU"
            )
        counts = sorted({1, *(arguments.devices or (n for n in DEVICES if n <= there))})
        effort = timing.Effort(repeat=arguments.repeat)
        if arguments.quick:
            effort = timing.Effort(steps=2, programs=1, repeat=2, cold=False)
        every = all_series(counts, arguments.quick)
        splits = arguments.split or SPLITS
        reports = [run([s for s in every if s.split in splits], counts, effort)]
        write(reports[0], arguments.output, f"scaling-{reports[0]['machine']['platform']}")
    for report in reports:
        print_report(report)
    if draw:
        draw(reports, arguments.plot)


if __name__ == "__main__":
    main()
