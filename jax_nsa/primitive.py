"""The JAX primitive of an operator, made from its record: shapes, derivative, `jax.vmap`, lowering.

Under `jax.vmap` mapped operands fold into the sequences and mapped pools into one pool, so that any
number of mapped calls is one call. Where what all sequences share is mapped, such as weights, they
are as many calls.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching, mlir, xla

from jax_nsa import _compat, backends, partition
from jax_nsa.axes import Axes

if TYPE_CHECKING:
    from jax_nsa.operator import Operator


def of(operator: Operator) -> _compat.Primitive:
    """Makes the primitive of an operator, with all its rules."""
    primitive = _compat.Primitive(f"jax_nsa_{operator.target}")
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(functools.partial(_abstract_eval, operator))
    _compat.tell_devices(primitive)
    register_lowering(primitive, functools.partial(_lower, operator))
    ad.primitive_jvps[primitive] = functools.partial(_jvp, operator)
    batching.primitive_batchers[primitive] = functools.partial(_batch, operator)
    return primitive


def register_lowering(primitive: _compat.Primitive, rule: Callable[..., Sequence[Any]]) -> None:
    """Registers a lowering rule whose first argument is the platform, where it is known by itself.

    JAX takes rules only for platforms it has heard of; an Ascend plugin's is not, so that one goes
    through the rule without a platform, None.
    """
    mlir.register_lowering(primitive, functools.partial(rule, None))
    for platform in ("cpu", "cuda"):
        mlir.register_lowering(primitive, functools.partial(rule, platform), platform=platform)


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
    call = backends.Call(
        operator, tuple(ctx.avals_in), on_fault=default_on_fault(ctx, on_fault), **static
    )
    axes = Axes.of(operator, call.names, call.problem, ctx.avals_in)
    if _computes_nothing(axes, ctx.avals_out):
        return lower_function(
            ctx, lambda *_: _absent_rows(operator, call.problem, ctx.avals_out), operands
        )
    backend = backends.choose(platform or _compat.single_platform(ctx), implementation, call)
    if _compat.automatic_devices(ctx) <= 1:
        return lower_function(ctx, functools.partial(backend.compute, call), operands)
    split = partition.partitioned(backend, call, axes)
    # What decides the result must be in the program: JAX's cache of compiled programs knows no
    # more of a partitioned call than what the text says.
    with _compat.serializable(ctx):
        results = lower_function(_compat.with_mesh_of_factors(ctx), split, operands)
    _compat.annotate(results, backends.identity(backend, call))
    return results


def default_on_fault(ctx: mlir.LoweringRuleContext, on_fault: str | None) -> str:
    """What a kernel on the host does about a bad value, where the user left it open."""
    return on_fault or ("fail" if _compat.num_devices(ctx) == 1 else "nan")


def lower_function(
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
            f"{operator.name} is an inference operator: its kernels have no derivative. Train with "
            "nsa_attention and nsa_compress, whose rows are what decoding gives; "
            'implementation="reference" has a derivative, too.'
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
            jax.ShapeDtypeStruct(tuple(n for i, n in enumerate(x.shape) if i != d), x.dtype)
            for x, d in zip(operands, dims, strict=True)
        ],
    )
    results = operator.results(params["problem"])
    targets = [operator.operand(name).points_into.split() for name in names]
    pointed = {target[0] for target in targets if target}
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
    for x, d, dimensions, target in zip(operands, dims, axes.operands, targets, strict=True):
        letter = dimensions[0][0]
        if letter not in folds:
            folded.append(x)
            continue
        x = partition.whole_in_front(batching.bdim_at_front(x, d, size))
        if folds.intersection(target[:1]):
            extent = math.prod(axes.sizes.get(letter, 1) for letter in target)
            x = _point(x, size=size, extent=extent, clips=target == ["n"])
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
