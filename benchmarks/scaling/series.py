"""What is measured: a step on ever more devices, in several ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from benchmarks.scaling.problem import Split
from jax_nsa.blocks import compressed_length
from jax_nsa.shapes import Shape

SPLITS = ("sequences", "heads", "sequences and heads", "context")
KEY_VALUE_HEADS, GROUP = 4, 16


@dataclasses.dataclass(frozen=True)
class Point:
    """One step on so many devices."""

    shape: Shape
    split: Split


@dataclasses.dataclass(frozen=True)
class Series:
    """A step on more and more devices.

    Attributes:
        split: what is split, one of `SPLITS`.
        strong: whether the step stays the same, or else a device's share of it.
        points: by the number of devices, 1 among them.
    """

    split: str
    strong: bool
    points: Mapping[int, Point]

    def efficiency(self, devices: int, seconds: Mapping[Point, float]) -> float:
        """What so many devices do, beside as many times what one does: 1 is perfect.

        Args:
            devices: one of the numbers of devices.
            seconds: of each point.
        """
        growth = devices if self.strong else 1
        return seconds[self.points[1]] / (growth * seconds[self.points[devices]])


def batch(sequences: int, tokens: int, key_value_heads: int = KEY_VALUE_HEADS) -> Shape:
    """Sequences of so many thousands (of 1024) of tokens."""
    length = compressed_length(tokens << 10, 32, 16)
    size = f"{tokens >> 10}M" if tokens % 1024 == 0 else f"{tokens}k"
    heads = key_value_heads * GROUP
    return Shape(f"{sequences} x {size}", sequences, heads, key_value_heads, length)


def all_series(counts: list[int], quick: bool) -> list[Series]:
    """All series over some numbers of devices, of steps that are much smaller if `quick`."""
    sequences, tokens, long = (4, 4, 16) if quick else (64, 32, 1024)
    half_heads = {1: Split()} | {n: Split(n // 2, heads=2) for n in counts if n >= 4}
    by_sequences = {n: Split(sequences=n) for n in counts}
    by_heads = {n: Split(heads=n) for n in counts}
    by_context = {n: Split(context=n) for n in counts}

    def series(name: str, strong: bool, splits: Mapping[int, Split], shape: Shape) -> Series:
        """That step, or one that grows along the axes that are split."""
        points = {}
        for n, split in splits.items():
            grown = shape
            if not strong:
                grown = batch(
                    shape.sequences * split.sequences,
                    (shape.blocks.original_length(shape.length) >> 10) * split.context,
                    shape.key_value_heads * split.heads,
                )
            if grown.key_value_heads % split.heads == 0:
                points[n] = Point(grown, split)
        return Series(name, strong, points)

    large, small = batch(2 * sequences, tokens), batch(sequences, tokens)
    every = [
        series(name, strong, splits, large if strong else small)
        for strong in (True, False)
        for name, splits in zip(SPLITS, (by_sequences, by_heads, half_heads), strict=False)
    ]
    for length in (long, 2 * long):
        every.append(series("heads", True, by_heads, batch(1, length)))
        every.append(series("context", True, by_context, batch(1, length)))
    every.append(series("context", False, by_context, batch(1, long)))
    return [one for one in every if len(one.points) > 1]
