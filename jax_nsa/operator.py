"""One record describes an operator; its JAX primitive and every transformation follow from it.

An operator says what its arrays are called and which axes they have. One letter or word stands for
an axis, parentheses for axes that share a dimension, `*` for the axes of query's rows:

    b  sequences            t  tokens of each sequence       n  packed rows of all sequences
    h  key/value heads      g  query heads of one of these   d  head size      e  value's head size
    p  pages                r  rows of a page                c  columns of the block table
    k  selected blocks      j  blocks                        l  tokens of a compress window
    w  rows of a cache, or its pages                         v  rows of one of these pages
    x  what a row of the pool of keys has for each key/value head: a key, or a key and a value
    y  what one of the pool of values has, likewise

`*` is `b t`, or `n` where rows are packed: then the operand `first_rows` is there, which says where
each sequence's rows start. A sequence owns the rows up to the next one's first, the last one those
to the end; owned rows past its count hold no token.

From this follow the primitive (`primitive.py`), the split over devices (`partition.py`) and the
kernels' calls: every backend (`backends/`) is a function from arrays to arrays.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax

from jax_nsa import _compat, checks, primitive

FAULTS = ("fail", "nan")
_KNOWN_AS: contextvars.ContextVar[tuple[tuple[str, str], ...]] = contextvars.ContextVar(
    "known_as", default=()
)


@dataclasses.dataclass(frozen=True)
class Array:
    """One operand or result of an operator.

    Attributes:
        name: its name, which kernels find it by. `name_0`, `name_1` ... are several of the kind.
        axes: its axes.
        argument: what the front door's caller knows it as; its name where empty.
        points_into: the axis whose positions its integers are; or axes, numbered through.
        dtype: of a result; None for the first operand's.
        absent: of a result, what rows that hold no token have.
    """

    name: str
    axes: str
    argument: str = ""
    points_into: str = ""
    dtype: Any = None
    absent: float = 0

    def named(self, name: str) -> Array:
        """The same under one of several names."""
        return dataclasses.replace(self, name=name, argument=self.argument or name)


class Problem(Protocol):
    """All that is static in one call and not in its shapes: a frozen dataclass, hashable."""

    @property
    def key_value_heads(self) -> int:
        """Heads that split over devices."""

    def scalars(self) -> dict[str, int | float]:
        """What kernels are told, by name."""

    def with_heads(self, key_value_heads: int) -> Problem:
        """The problem of a part of the heads."""


@dataclasses.dataclass(eq=False)
class Operator:
    """An operator, all of it but the kernels.

    Attributes:
        name: the public function's name.
        target: what its kernels' custom calls are named after.
        operands: every operand that a call may have, in order.
        results: the results of a problem, in order.
        sizes: sizes of axes that no operand has, from the problem and the operands' sizes.
        reference: the operator in jnp, from operands to results, by name.
        splits: the axes over which devices may share a call.
        aliases: results that take over the memory, and the axes, of the operand of the same name.
    """

    name: str
    target: str
    operands: tuple[Array, ...]
    results: Callable[[Any], tuple[Array, ...]]
    sizes: Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]
    reference: Callable[..., dict[str, jax.Array]]
    splits: str = "bh"
    aliases: tuple[str, ...] = ()
    primitive: _compat.Primitive = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        if self.target in ALL:
            raise ValueError(f"there is an operator {self.target} already")
        self.primitive = primitive.of(self)
        ALL[self.target] = self

    def operand(self, name: str) -> Array:
        """The description of the operand that a call names."""
        known = {array.name: array for array in self.operands}
        return (known.get(name) or known[_kind(name)]).named(name)

    def is_aliased(self, result: str) -> bool:
        """Whether a result takes over the memory of the operand of its name."""
        return result in self.aliases or _kind(result) in self.aliases

    def bind(
        self,
        operands: Mapping[str, jax.Array],
        *,
        problem: Any,
        implementation: Sequence[str] | None = None,
        on_fault: str | None = None,
        constants: Sequence[tuple[str, tuple[int, ...]]] = (),
    ) -> dict[str, jax.Array]:
        """Applies the primitive.

        Args:
            operands: arrays by name.
            problem: the static problem.
            implementation: names to choose from, the preferred first; None for the default.
            on_fault: what a kernel on the host does about a bad value: "fail", "nan"; None: fail
                on one device, and on several give NaN, as a device that fails leaves the others
                waiting in their next collective.
            constants: values of operands, one for each sequence, that are constants of the program.
        """
        if on_fault is not None:
            on_fault = checks.choice("on_fault", on_fault, FAULTS)
        names = tuple(a.name for a in map(self.operand, operands))
        results = self.primitive.bind(
            *_compat.vary_alike(*operands.values()),
            names=names,
            problem=problem,
            implementation=None if implementation is None else tuple(implementation),
            on_fault=on_fault,
            constants=tuple(constants),
            maps=(),
            pool_maps=1,
            known_as=_KNOWN_AS.get(),
        )
        return dict(zip((r.name for r in self.results(problem)), results, strict=True))


@contextlib.contextmanager
def arguments_known_as(names: Mapping[str, str]) -> Iterator[None]:
    """Says what the caller of a function that is made of operators knows their arguments as.

    Kernels that find a bad value then name it so.

    Args:
        names: the caller's names, by those of the operators' front doors.
    """
    token = _KNOWN_AS.set(tuple(names.items()))
    try:
        yield
    finally:
        _KNOWN_AS.reset(token)


def _kind(name: str) -> str:
    """What `name_0`, `name_1` ... are several of."""
    return re.sub(r"_\d+$", "", name)


# Every operator by its target, in the order of their definition.
ALL: dict[str, Operator] = {}
