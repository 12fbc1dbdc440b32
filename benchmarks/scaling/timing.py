"""Times one step on its devices, beside its collectives alone, and holds it to one device."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import measure
from benchmarks.scaling import collectives, problem
from benchmarks.scaling.series import Point
from jax_nsa.shapes import Shape

TIMED = ("compressed", "step")
KEPT = 2  # steps whose results are compared
LARGE = 256 << 20  # bytes of the all-reduce that tells the speed of the links

Results = dict[tuple[Shape, str], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is run for a time.

    Attributes:
        steps: of a program.
        programs: that are dispatched at once, for one sample.
        repeat: samples that a median is of.
        cold: whether pools exceed caches.
    """

    steps: int = 32
    programs: int = 4
    repeat: int = 15
    cold: bool = True

    def median(self, run: Callable[[], Any]) -> tuple[float, list[float]]:
        """Seconds of one step of a program: the median, and the least and the most."""
        runs = range(self.programs)
        samples = sorted(
            measure.seconds(lambda: [run() for _ in runs]) / (self.programs * self.steps)
            for _ in range(self.repeat)
        )
        return statistics.median(samples), [samples[0], samples[-1]]


def measure_point(
    point: Point, most_devices: int, effort: Effort, expected: Results
) -> dict[str, Any]:
    """Times the parts of one step on its devices.

    Args:
        point: the step, and how it is split.
        most_devices: on how many devices steps like this are timed, all with the same pools.
        effort: how much is run.
        expected: results on one device; those of this point are added if that is where it is, and
            else held to them if they are known.

    Returns:
        For each part its seconds, the least and the most of them, its floor in bytes, whether it
        was held to one device, and what of its program's collectives is known.
    """
    devices = point.split.devices
    sets = problem.cold_sets(point.shape, most_devices) if effort.cold else 1
    operands = problem.draw(point.shape, point.split, sets=sets, steps=effort.steps)
    parts = problem.parts(point.shape, point.split)
    rows = {}
    for name in TIMED:
        run = problem.program(parts[name], point.split, operands)
        results = [np.asarray(r[:KEPT], np.float32) for r in run(*operands)]
        if devices == 1:
            expected[point.shape, name] = results
        held = devices > 1 and (point.shape, name) in expected
        if held:
            compare(results, expected[point.shape, name])
        found = collectives.collectives(run.as_text())
        seconds, spread = effort.median(functools.partial(run, *operands))
        rows[name] = {
            "seconds": seconds,
            "least_and_most_seconds": spread,
            "floor_bytes": problem.floors(point.shape)[name],
            "held_to_one_device": held,
            "collectives": [dataclasses.asdict(c) for c in found],
        }
        if found and all(c.kind == "all-reduce" for c in found):
            sizes = [c.bytes for c in found]
            alone = collectives.exchange(point.split.mesh, sizes, effort.steps)
            rows[name]["ring_bytes"] = collectives.on_ring(sum(sizes), devices)
            rows[name]["exchange_seconds"] = effort.median(alone)[0]
    return rows


def compare(results: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Holds attention and ids of some steps to those of one device, up to rounding.

    A part may be summed in another order than the whole, and of two blocks that are next to equal
    the other be chosen. Where that happened the attention is of other blocks, and not compared.
    """
    (attention, ids), (wanted, wanted_ids) = results, expected
    same = np.all(np.sort(ids) == np.sort(wanted_ids), axis=-1)
    assert same.mean() > 0.5, f"only {same.mean():.1%} choose the same blocks as on one device"
    by_group = (*same.shape, -1, attention.shape[-1])
    np.testing.assert_allclose(
        attention.reshape(by_group)[same], wanted.reshape(by_group)[same], rtol=2**-6, atol=2e-3
    )


def links(devices: int, effort: Effort) -> dict[str, float]:
    """How fast so many devices do a large all-reduce and a small one.

    Returns:
        Bytes a second that each device sends, if they go around a ring; and seconds of one of 4
        bytes, among others.
    """
    mesh = problem.Split(context=devices).mesh
    large, small = (collectives.exchange(mesh, [size], effort.steps) for size in (LARGE, 4))
    few = dataclasses.replace(effort, programs=1, repeat=3)
    return {
        "bytes_per_second": collectives.on_ring(LARGE, devices) / few.median(large)[0],
        "small_seconds": effort.median(small)[0],
    }
