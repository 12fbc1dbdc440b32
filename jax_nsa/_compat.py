"""Where supported JAX releases differ, or offer something only on objects that are not public."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
from jax import version
from jax._src import core, dispatch  # no public name tells a lowering rule its devices
from jax.interpreters import mlir
from jaxlib.mlir import ir

Primitive = core.Primitive  # its public home, jax.extend, imports all of Pallas
_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def updates_bfloat16_in_place() -> bool:
    """Whether XLA updates a row of a bfloat16 array in place; else it converts all of it, and back.

    The platform is the default one: a choice inside the program would copy the array, too.
    """
    return version.__version_info__ >= (0, 12) or jax.default_backend() != "cpu"


def with_usual_promotion(
    function: Callable[_Parameters, _Result],
) -> Callable[_Parameters, _Result]:
    """Makes `function` mean the same however strict the user wants promotion in their own code."""

    @functools.wraps(function)
    def wrapped(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return wrapped


def vary_alike(*operands: jax.Array) -> list[jax.Array]:
    """Marks operands as varying over every manual mesh axis that any of them varies over.

    Inside `jax.shard_map` a primitive's operands must agree on the axes they vary over; JAX's own
    functions see to that in the same way.
    """
    varying: list[frozenset[Any]] = [jax.typeof(x).manual_axis_type.varying for x in operands]
    union: frozenset[Any] = frozenset().union(*varying)
    return [
        x if v == union else jax.lax.pcast(x, tuple(union - v), to="varying")
        for x, v in zip(operands, varying, strict=True)
    ]


def tell_devices(primitive: Primitive) -> None:
    """Makes `jax.jit` tell the primitive's lowering rule which devices it compiles for."""
    dispatch.prim_requires_devices_during_lowering.add(primitive)


def is_tracing() -> bool:
    """Whether a function is being traced, as under `jax.jit`."""
    return not core.trace_state_clean()


def num_devices(ctx: mlir.LoweringRuleContext) -> int:
    """Devices of the program that is being lowered."""
    context: Any = ctx.module_context.axis_context
    mesh = getattr(context, "mesh", None)
    return int(context.num_devices if mesh is None else mesh.size)


def single_platform(ctx: mlir.LoweringRuleContext) -> str:
    """The platform that the program is lowered for; "several" where it is for more than one."""
    platforms = ctx.platforms or ctx.module_context.platforms
    return platforms[0] if len(platforms) == 1 else "several"


def automatic_devices(ctx: mlir.LoweringRuleContext) -> int:
    """Over how many devices XLA will split this program by itself.

    1 inside `jax.shard_map`, and for an exported program, whose devices are not known: there XLA
    gathers what is still split of the operands of an operator that it cannot split.
    """
    context: Any = ctx.module_context.axis_context
    if ctx.module_context.lowering_parameters.for_export:
        return 1
    if getattr(context, "mesh", None) is not None:
        return 1 if context.manual_axes else int(context.mesh.size)
    return len(getattr(context, "device_assignment", None) or ())


def with_mesh_of_factors(ctx: mlir.LoweringRuleContext) -> mlir.LoweringRuleContext:
    """The context with a mesh that has an axis for each prime factor of the number of devices.

    JAX tells a partitioned function its shardings as those over a mesh's axes. Shardy may split
    over a part of an axis, and JAX may know of no mesh at all; over these axes any split can be
    told. They cut the axes of the mesh that JAX knows in pieces, whose order stays.
    """
    context: Any = ctx.module_context.axis_context
    known = getattr(context, "mesh", None) or getattr(context, "abstract_mesh", None)
    sizes = (automatic_devices(ctx),) if known is None else tuple(known.shape.values())
    factors = [factor for size in sizes for factor in _prime_factors(size)]
    names = tuple(f"axis_{i}" for i in range(len(factors)))
    if getattr(context, "mesh", None) is not None:
        mesh = jax.sharding.Mesh(context.mesh.devices.reshape(factors), names)
        context = dataclasses.replace(context, mesh=mesh)
    else:
        abstract_mesh = jax.sharding.AbstractMesh(tuple(factors), names)
        context = dataclasses.replace(context, abstract_mesh=abstract_mesh)
    return ctx.replace(module_context=ctx.module_context.replace(axis_context=context))


def _prime_factors(number: int) -> tuple[int, ...]:
    factors = []
    factor = 2
    while number > 1:
        while number % factor == 0:
            factors.append(factor)
            number //= factor
        factor += 1
    return tuple(factors)


class _KeptAlive:
    """Keeps an object alive, also where it cannot be pickled: a copy of this holds nothing."""

    def __init__(self, held: Any = None) -> None:
        self.held = held

    def __reduce__(self) -> tuple[type[_KeptAlive], tuple[()]]:
        return _KeptAlive, ()


@contextlib.contextmanager
def serializable(ctx: mlir.LoweringRuleContext) -> Iterator[None]:
    """Lets programs be serialised though what is lowered here is to be kept alive with them.

    A compiled program has no more use for its partitioned functions, which cannot be pickled.
    """
    kept = ctx.module_context.keepalives
    before = len(kept)
    yield
    kept[before:] = [_KeptAlive(held) for held in kept[before:]]


def annotate(results: Sequence[Any], text: str) -> None:
    """Writes `text` beside the operation that gives these results, into the program."""
    operation: Any = ir.Value(results[0]).owner
    attributes: dict[str, Any] = {"jax_nsa": ir.StringAttr.get(text)}
    operation.attributes["mhlo.frontend_attributes"] = ir.DictAttr.get(attributes)
