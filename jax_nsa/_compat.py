"""Where supported JAX releases differ, or offer something only on objects that are not public."""

from __future__ import annotations

from typing import Any

import jax
from jax._src import dispatch  # no public name tells a lowering rule its devices
from jax.extend import core
from jax.interpreters import mlir


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


def is_automatically_partitioned(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether XLA will split this program over several devices that are known now.

    False inside `jax.shard_map`, and for an exported program, whose devices are not known: there
    XLA gathers what is still split of the operands of an operator that it cannot split.
    """
    if ctx.module_context.lowering_parameters.for_export:
        return False
    context: Any = ctx.module_context.axis_context
    if getattr(context, "mesh", None) is not None:
        return not context.manual_axes
    return len(getattr(context, "device_assignment", None) or ()) > 1
