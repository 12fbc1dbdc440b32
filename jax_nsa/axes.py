"""The axes of a call's arrays, and their sizes, found from the operands' shapes."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_nsa.operator import Operator


def is_packed(names: Collection[str]) -> bool:
    """Whether a call with operands of these names has the rows of all sequences packed."""
    return "first_rows" in names


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of one call's arrays, as lists of dimensions, and their sizes.

    Attributes:
        operands: for each operand its dimensions, each a tuple of letters.
        results: likewise.
        sizes: of every axis.
        packed: whether rows of all sequences are packed.
    """

    operands: tuple[tuple[tuple[str, ...], ...], ...]
    results: tuple[tuple[tuple[str, ...], ...], ...]
    sizes: dict[str, Any]
    packed: bool

    @classmethod
    def of(cls, operator: Operator, names: Sequence[str], problem: Any, arrays: Any) -> Axes:
        """Finds the axes of a call from its operands' shapes."""
        packed = is_packed(names)
        described = {r.name: r for r in operator.results(problem)}
        operands = tuple(
            _dimensions(described.get(n, operator.operand(n)).axes, packed) for n in names
        )
        results = tuple(_dimensions(r.axes, packed) for r in described.values())
        sizes: dict[str, Any] = {"h": problem.key_value_heads}
        for dimensions, array in zip(operands, arrays, strict=True):
            for letters, size in zip(dimensions, array.shape, strict=True):
                unknown = [letter for letter in letters if letter not in sizes]
                if len(unknown) == 1:
                    sizes[unknown[0]] = size // math.prod(
                        sizes[letter] for letter in letters if letter in sizes
                    )
        sizes.update(operator.sizes(problem, sizes))
        return cls(operands, results, sizes, packed)

    def shape(self, dimensions: Sequence[Sequence[str]]) -> tuple[Any, ...]:
        """The shape of an array with these dimensions."""
        return tuple(
            functools.reduce(lambda a, b: a * b, (self.sizes[letter] for letter in letters))
            for letters in dimensions
        )


def _dimensions(axes: str, packed: bool) -> tuple[tuple[str, ...], ...]:
    spelled = axes.replace("*", "n" if packed else "b t")
    return tuple(tuple(d.strip("()").split()) for d in re.findall(r"\([^)]*\)|\S+", spelled))
