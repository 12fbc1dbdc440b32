"""One record describes an operator; its JAX primitive and every transformation follow from it.

An operator says what its arrays are called and which axes they have. One letter or word stands for
an axis, parentheses for axes that share a dimension, `*` for the axes of query's rows:

    b  sequences            t  tokens of each sequence       n  packed rows of all sequences
    h  key/value heads      g  query heads of one of these   d  head size      e  value's head size
    p  pages                r  rows of a page                c  columns of the block table
    k  selected blocks      j  blocks                        w  rows of a cache
    l  tokens of a window that is compressed

`*` is `b t`, or `n` where rows are packed: then the operand `first_rows` is there, which says where
each sequence's rows start. A sequence owns the rows up to the next one's first, the last one those
to the end; owned rows past its count hold no token.

From this follow abstract evaluation, `jax.vmap` (mapped operands fold into the sequences, mapped
pools into one pool), the split over devices (`partition.py`) and the lowering: every backend
(`backends/`) is a function from arrays to arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import ad, batching, mlir, xla

from jax_nsa import _compat, backends, partition

FAULTS = ("fail", "nan")


@dataclasses.dataclass(frozen=True)
class Array:
    """One operand or result of an operator.

    Attributes:
        name: its name, which kernels find it by. `name_0`, `name_1` ... are several of the kind.
        axes: its axes.
        argument: what the front door's caller knows it as; its name where empty.
        points_into: the axis whose positions its integers are.
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
        aliases: results that take over the memory of the operand of the same name.
    """

    name: str
    target: str
    operands: tuple[Array, ...]
    results: Callable[[Any], tuple[Array, ...]]
    sizes: Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]
    reference: Callable[..., dict[str, jax.Array]]
    splits: str = "bh"
    aliases: tuple[str, ...] = ()
    primitive: core.Primitive = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.primitive = _primitive(self)
        ALL[self.target] = self

    def operand(self, name: str) -> Array:
        """The description of the operand that a call names."""
        known = {array.name: array for array in self.operands}
        return (known.get(name) or known[re.sub(r"_\d+$", "", name)]).named(name)

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
        )
        return dict(zip((r.name for r in self.results(problem)), results, strict=True))


# Every operator by its target, in the order of their definition.
ALL: dict[str, Operator] = {}


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
        packed = "first_rows" in names
        operands = tuple(_dimensions(operator.operand(n).axes, packed) for n in names)
        results = tuple(_dimensions(r.axes, packed) for r in operator.results(problem))
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


def _primitive(operator: Operator) -> core.Primitive:
    """The primitive of an operator, with all its rules."""
    primitive = core.Primitive(f"jax_nsa_{operator.target}")
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(functools.partial(_abstract_eval, operator))
    _compat.tell_devices(primitive)
    # JAX takes rules only for platforms it has heard of; an Ascend plugin's is not, so that one
    # goes through the rule without a platform.
    mlir.register_lowering(primitive, functools.partial(_lower, operator, None))
    for platform in ("cpu", "cuda"):
        rule = functools.partial(_lower, operator, platform)
        mlir.register_lowering(primitive, rule, platform=platform)
    ad.primitive_jvps[primitive] = functools.partial(_jvp, operator)
    batching.primitive_batchers[primitive] = functools.partial(_batch, operator)
    return primitive


def _abstract_eval(
    operator: Operator, *operands: Any, names: Sequence[str], problem: Any, **_: Any
) -> list[Any]:
    axes = Axes.of(operator, names, problem, operands)
    arguments = [operator.operand(name).argument for name in names]
    shardings = partition.result_shardings(arguments, operands, axes, operator.splits)
    # `update` keeps the varying axes of shard_map, which a fresh ShapedArray would lose.
    return [
        operands[0].update(
            shape=axes.shape(dimensions),
            dtype=jnp.dtype(operands[0].dtype if result.dtype is None else result.dtype),
            weak_type=False,
            sharding=sharding,
        )
        for result, dimensions, sharding in zip(
            operator.results(problem), axes.results, shardings, strict=True
        )
    ]


def _lower(
    operator: Operator, platform: str | None, ctx: mlir.LoweringRuleContext, *operands: Any,
    implementation: Sequence[str] | None, on_fault: str | None, **static: Any,
) -> Sequence[Any]:  # fmt: skip
    """Chooses an implementation and traces it into the program; on several devices, in parts."""
    on_fault = on_fault or ("fail" if _compat.num_devices(ctx) == 1 else "nan")
    call = backends.Call(operator, tuple(ctx.avals_in), on_fault=on_fault, **static)
    axes = Axes.of(operator, call.names, call.problem, ctx.avals_in)
    if _computes_nothing(axes, ctx.avals_out):
        return _lower_function(
            ctx, lambda *_: _absent_rows(operator, call.problem, ctx.avals_out), operands
        )
    backend = backends.choose(platform or _compat.single_platform(ctx), implementation, call)
    if _compat.automatic_devices(ctx) <= 1:
        return _lower_function(ctx, functools.partial(backend.compute, call), operands)
    split = partition.partitioned(backend, call, axes)
    # What decides the result must be in the program: JAX's cache of compiled programs knows no
    # more of a partitioned call than what the text says.
    with _compat.serializable(ctx):
        results = _lower_function(_compat.with_mesh_of_factors(ctx), split, operands)
    _compat.annotate(results, backends.identity(backend, call))
    return results


def _lower_function(
    ctx: mlir.LoweringRuleContext, function: Callable[..., Any], operands: Sequence[Any]
) -> Sequence[Any]:
    """Lowers a function of plain arrays, whatever mesh the surrounding program is under."""

    def whole(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return tuple(function(*arrays))

    avals: Sequence[Any] = ctx.avals_in
    plain = [jax.core.ShapedArray(a.shape, a.dtype) for a in avals]
    return mlir.lower_fun(whole, multiple_results=True)(ctx.replace(avals_in=plain), *operands)


def _computes_nothing(axes: Axes, results: Sequence[Any]) -> bool:
    """Whether there is no result, or packed rows and no sequence that they could belong to."""
    if axes.packed and isinstance(axes.sizes["b"], int) and axes.sizes["b"] == 0:
        return True
    static = [r.shape for r in results if all(isinstance(n, int) for n in r.shape)]
    return any(0 in shape for shape in static)


def _absent_rows(operator: Operator, problem: Any, results: Sequence[Any]) -> list[jax.Array]:
    return [
        jnp.full(result.shape, described.absent, result.dtype)
        for described, result in zip(operator.results(problem), results, strict=True)
    ]


def _jvp(
    operator: Operator, primals: Any, tangents: Any, *,
    names: Sequence[str], problem: Any, implementation: Any, **_: Any,
) -> Any:  # fmt: skip
    """Differentiates the reference; the kernels have no derivative."""
    if implementation != (backends.reference.NAME,):
        raise NotImplementedError(
            f"{operator.name} is an inference operator: its kernels have no derivative. Call it "
            'with implementation="reference" to differentiate its attention output.'
        )
    is_float = [jnp.issubdtype(p.dtype, jnp.floating) for p in primals]
    integers = [p for p, floating in zip(primals, is_float, strict=True) if not floating]

    def reference(part: Any, *arrays: jax.Array) -> list[jax.Array]:
        return list(operator.reference(dict(zip(names, arrays, strict=True)), part).values())

    shapes = _abstract_eval(operator, *map(jax.typeof, primals), names=names, problem=problem)
    axes = Axes.of(operator, names, problem, primals)
    if _computes_nothing(axes, shapes):
        absent = _absent_rows(operator, problem, shapes)
        return absent, [ad.Zero(jax.typeof(r).to_tangent_aval()) for r in absent]

    # On a mesh with explicit axes, each device differentiates its part.
    split_reference = partition.by_device(reference, primals, axes, operator.splits, problem)

    def compute(*floats: jax.Array) -> list[jax.Array]:
        both = {True: iter(floats), False: iter(integers)}
        return split_reference(*(next(both[floating]) for floating in is_float))

    floats = [p for p, floating in zip(primals, is_float, strict=True) if floating]
    instantiated = [
        ad.instantiate_zeros(t) for t, floating in zip(tangents, is_float, strict=True) if floating
    ]
    results, result_tangents = jax.jvp(compute, floats, instantiated)
    # Integers, the selected blocks among them, carry no derivative.
    return results, [
        t if jnp.issubdtype(r.dtype, jnp.floating) else ad.Zero(jax.typeof(r).to_tangent_aval())
        for r, t in zip(results, result_tangents, strict=True)
    ]


def _batch(
    operator: Operator, operands: Any, dims: Any, *, names: Sequence[str], **params: Any
) -> Any:
    """vmap: mapped operands fold into the sequences, mapped pools into one pool; one call."""
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    axes = Axes.of(
        operator,
        names,
        params["problem"],
        [
            jax.ShapeDtypeStruct(np.delete(x.shape, [] if d is None else d), x.dtype)
            for x, d in zip(operands, dims, strict=True)
        ],
    )
    results = operator.results(params["problem"])
    pointed = {operator.operand(name).points_into for name in names} - {""}
    # Pools that every mapped call shares stay as they are; what results lie in does not.
    shared = (
        pointed
        - {
            letter
            for dimensions, d in zip(axes.operands, dims, strict=True)
            for letter in dimensions[0]
            if d is not None
        }
        - {dimensions[0][0] for dimensions in axes.results}
    )
    folds = ({"b"} | pointed) - shared
    foreign = [
        d is not None and dimensions[0][0] not in folds
        for dimensions, d in zip(axes.operands, dims, strict=True)
    ]
    if size == 0:
        dtypes = [result.dtype or operands[0].dtype for result in results]
        shapes = [(0, *axes.shape(dimensions)) for dimensions in axes.results]
        return [jnp.zeros(*of) for of in zip(shapes, dtypes, strict=True)], [0] * len(results)
    if any(foreign):  # each call has weights of its own
        return _one_by_one(operator, operands, dims, names=names, **params)

    fold = functools.partial(_fold, size=size, packed=axes.packed)
    folded = []
    for name, x, d, dimensions in zip(names, operands, dims, axes.operands, strict=True):
        letter = dimensions[0][0]
        if letter not in folds:
            folded.append(x)
            continue
        x = partition.whole_in_front(batching.bdim_at_front(x, d, size))
        target = operator.operand(name).points_into
        if target in folds:
            x = _point(x, size=size, extent=axes.sizes[target], clips=target == "n")
        folded.append(fold(x, letter))
    problem, maps = params.pop("problem"), (*params.pop("maps"), size)
    pool_maps = params.pop("pool_maps") * (size if "p" in folds else 1)
    constants = tuple(
        (name, _repeat(values, size, axes.packed)) for name, values in params.pop("constants")
    )
    outcomes = operator.primitive.bind(
        *_compat.vary_alike(*folded), names=names, problem=problem, maps=maps,
        pool_maps=pool_maps, constants=constants, **params,
    )  # fmt: skip
    unfolded, at = [], []
    for outcome, dimensions in zip(outcomes, axes.results, strict=True):
        inner = dimensions[0][0] == "b"
        split = (-1, size) if inner else (size, -1)
        unfolded.append(outcome.reshape(*split, *outcome.shape[1:]))
        at.append(int(inner))
    return unfolded, at


def _fold(array: jax.Array, letter: str, *, size: int, packed: bool) -> jax.Array:
    """Folds a leading mapped axis into the array's own first one.

    Sequences, which may be sharded, stay outermost; packed rows keep their query's order.
    """
    if letter == "b" and not packed:
        array = jnp.moveaxis(array, 0, 1)
    return array.reshape(-1, *array.shape[2:])


@functools.partial(jax.jit, static_argnames=("size", "extent", "clips"))
def _point(array: jax.Array, *, size: int, extent: int, clips: bool) -> jax.Array:
    """Makes positions of an axis positions of `size` such axes, one after another.

    What points outside its own must not point into a neighbour's: negative integers stay, those
    past the end go past the end of all, as far as before, so that messages can name them.
    """
    step = extent * jnp.arange(size, dtype=jnp.int32).reshape(-1, *(1,) * (array.ndim - 1))
    if clips:  # rows past the end own nothing, wherever they are
        return jnp.minimum(array, extent) + step
    beyond = jnp.minimum(array, np.int32(2**31 - 1 - extent * (size - 1))) + extent * (size - 1)
    return jnp.where(array < 0, array, jnp.where(array < extent, array + step, beyond))


def _repeat(values: tuple[int, ...], size: int, packed: bool) -> tuple[int, ...]:
    repeated = np.broadcast_to(values, (size, len(values)))
    return tuple((repeated if packed else repeated.T).ravel().tolist())


def _one_by_one(operator: Operator, operands: Any, dims: Any, **params: Any) -> Any:
    """Maps in a loop, where the calls share too little to be one."""
    mapped = [
        None if d is None else batching.bdim_at_front(x, d, x.shape[d])
        for x, d in zip(operands, dims, strict=True)
    ]

    def call(parts: Any) -> list[jax.Array]:
        arrays = [x if p is None else p for x, p in zip(operands, parts, strict=True)]
        return operator.primitive.bind(*_compat.vary_alike(*arrays), **params)

    results = jax.lax.map(call, mapped)
    return results, [0] * len(results)
