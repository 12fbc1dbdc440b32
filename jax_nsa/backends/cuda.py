"""The CUDA kernels on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jax_nsa import native
from jax_nsa.backends import Call

if TYPE_CHECKING:
    from jax_nsa.operator import Operator

NAME = "cuda"
PLATFORMS = ("cuda",)
DEFAULT_PLATFORMS = ("cuda",)


def register() -> None:
    """Registers the kernels' custom-call targets if they were compiled."""
    native.register(NAME)


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
    size = native.workspace_bytes(call)
    workspace = {"workspace": jax.ShapeDtypeStruct((size,), np.dtype(np.uint8))} if size else {}
    return native.custom_call(NAME, call, operands, workspace)
