"""The CUDA kernels on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jax_nsa import native
from jax_nsa.backends import Call, decode_step

if TYPE_CHECKING:
    from jax_nsa.operator import Operator

NAME = "cuda"
PLATFORMS = ("cuda",)
DEFAULT_PLATFORMS = ("cuda",)
_CHOSEN = "topk_indices"  # the compressed branch's result that the selected one reads


def unavailable(operator: Operator, platform: str) -> str | None:
    """Why the compiled kernel is missing, if it is."""
    del platform
    reason = native.unavailable(NAME, operator.target)
    if reason is not None:
        reason += "; the kernel is compiled where the CUDA toolkit's nvcc is on PATH"
    return reason


def refuses(call: Call, platform: str) -> str | None:
    """The kernels serve every legal call whose shapes are known; without a workspace, others too.

    Of positions beyond 2**30, which no memory holds, they say so when they run.
    """
    del platform
    if not native.needs_workspace(call.operator.target):
        return None
    for operand in call.operands:
        if not all(isinstance(size, int) for size in operand.shape):
            return (
                "its workspace is sized when the program is lowered, and an operand has the "
                f"symbolic shape {operand.shape}"
            )
    return None


def configuration(call: Call) -> Mapping[str, Any]:
    """Nothing beside the call decides the results."""
    del call
    return {}


def compute(call: Call, *operands: jax.Array) -> Sequence[jax.Array]:
    """The custom call, whose last result is the kernel's workspace if it needs one."""
    return native.custom_call(NAME, call, operands, _workspace(call))


def _workspace(call: Call) -> dict[str, jax.ShapeDtypeStruct]:
    size = native.workspace_bytes(call)
    return {"workspace": jax.ShapeDtypeStruct((size,), np.dtype(np.uint8))} if size else {}


def joins_here() -> bool:
    """Whether this library has the kernels, so that programs for a GPU may call them."""
    return native.unavailable(NAME, decode_step.TARGET) is None


def joint(
    calls: Sequence[Call], platform: str
) -> Callable[[Sequence[Sequence[jax.Array]]], Sequence[Sequence[jax.Array]]] | None:
    """The calls of a step as one, whose kernels follow each other with nothing in between.

    The chosen blocks are no operand: the second kernel reads them where the first one writes them.
    """
    if platform not in PLATFORMS or not decode_step.is_one(calls):
        return None
    chosen = dict(
        zip(
            (r.name for r in calls[0].operator.results(calls[0].problem)),
            calls[0].results(),
            strict=True,
        )
    )[_CHOSEN]
    read = calls[1].operand(_CHOSEN)
    if (read.shape, read.dtype) != (chosen.shape, chosen.dtype):
        return None
    named = dict(zip(decode_step.BRANCHES, calls, strict=False))

    def run(operands: Sequence[Sequence[jax.Array]]) -> Sequence[Sequence[jax.Array]]:
        branches = {
            name: (
                call,
                [None if n == _CHOSEN else x for n, x in zip(call.names, its, strict=True)],
                configuration(call),
            )
            for (name, call), its in zip(named.items(), operands, strict=True)
        }
        workspaces = {name: _workspace(call) for name, call in named.items()}
        return native.joint_call(NAME, decode_step.TARGET, branches, workspaces)

    return run
