"""Where supported JAX releases differ, or offer something only on objects that are not public."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax._src import dispatch  # no public name tells a lowering rule its devices
from jax.extend import core
from jax.interpreters import mlir
from jaxlib.mlir import ir

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


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


def tell_devices(primitive: core.Primitive) -> None:
    """Makes `jax.jit` tell the primitive's lowering rule which devices it compiles for."""
    dispatch.prim_requires_devices_during_lowering.add(primitive)


def num_devices(ctx: mlir.LoweringRuleContext) -> int:
    """Devices of the program that is being lowered."""
    context: Any = ctx.module_context.axis_context
    mesh = getattr(context, "mesh", None)
    return int(context.num_devices if mesh is None else mesh.size)


def single_platform(ctx: mlir.LoweringRuleContext) -> str:
    """The platform that the program is lowered for; "several" where it is for more than one."""
    platforms = ctx.platforms or ctx.module_context.platforms
    return platforms[0] if len(platforms) == 1 else "several"


def automatic_mesh(ctx: mlir.LoweringRuleContext) -> jax.sharding.Mesh | None:
    """The mesh over which XLA will split this program by itself; None if it will not.

    None inside `jax.shard_map`, and for an exported program, whose devices are not known: there
    XLA gathers what is still split of the operands of an operator that it cannot split.

    Where JAX knows of no mesh, one of the devices' prime factors stands in: any split of an array
    over the devices is one over its axes.
    """
    if ctx.module_context.lowering_parameters.for_export:
        return None
    context: Any = ctx.module_context.axis_context
    if getattr(context, "mesh", None) is not None:
        mesh = context.mesh
        return None if context.manual_axes or mesh.size == 1 else mesh
    devices = getattr(context, "device_assignment", None) or ()
    if len(devices) <= 1:
        return None
    named: list[Any] = [getattr(context, "abstract_mesh", None)]
    avals: Sequence[Any] = ctx.avals_in
    named += [a.sharding.mesh for a in avals]
    named += [jax.sharding.get_abstract_mesh()]
    for mesh in named:
        if mesh is not None and not mesh.empty and mesh.size == len(devices):
            sizes, names = mesh.axis_sizes, mesh.axis_names
            break
    else:
        sizes = _prime_factors(len(devices))
        names = tuple(f"axis_{i}" for i in range(len(sizes)))
    return jax.sharding.Mesh(np.array(devices).reshape(sizes), names)


def _prime_factors(number: int) -> tuple[int, ...]:
    factors = []
    factor = 2
    while number > 1:
        while number % factor == 0:
            factors.append(factor)
            number //= factor
        factor += 1
    return tuple(factors)


def annotate(results: Sequence[Any], text: str) -> None:
    """Writes `text` beside the operation that gives these results, into the program."""
    operation: Any = ir.Value(results[0]).owner
    attributes: dict[str, Any] = {"jax_nsa": ir.StringAttr.get(text)}
    operation.attributes["mhlo.frontend_attributes"] = ir.DictAttr.get(attributes)
