"""The CUDA kernel on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jax_nsa import native
from jax_nsa.backends import Call

NAME = "cuda"
PLATFORMS = ("cuda",)
DEFAULT_PLATFORMS = ("cuda",)
TARGET = "jax_nsa_compress_attention_cuda"


def register() -> None:
    """Registers the kernel's custom-call target if it was compiled."""
    native.register("cuda")


def unavailable(platform: str) -> str | None:
    """Why the compiled kernel is missing, if it is."""
    del platform
    reason = native.unavailable("cuda", TARGET)
    if reason is not None:
        reason += "; the kernel is compiled where the CUDA toolkit's nvcc is on PATH"
    return reason


def refuses(call: Call, platform: str) -> str | None:
    """The kernel serves every legal call whose shapes are known.

    Of positions beyond 2**30, which no memory holds, it says so when it runs.
    """
    del platform
    for operand in call.operands:
        if not all(isinstance(size, int) for size in operand.shape):
            return (
                "its workspace is sized when the program is lowered, and an operand has the "
                f"symbolic shape {operand.shape}"
            )
    return None


def lower(ctx: Any, *operands: Any, call: Call) -> Sequence[Any]:
    """Emits the custom call, whose last result is the kernel's workspace."""
    workspace = jax.core.ShapedArray((_workspace_bytes(call),), np.dtype(np.uint8))
    ctx = ctx.replace(avals_out=[*ctx.avals_out, workspace])
    return native.ffi_lowering(TARGET, call.problem)(ctx, *operands)[:-1]


def _workspace_bytes(call: Call) -> int:
    query, key, value, block_table = (operand.shape for operand in call.operands[:4])
    problem, ragged = call.problem, len(query) == 3
    return native.module().cuda_workspace_bytes(
        sequences=block_table[0],
        rows=query[0] if ragged else query[0] * query[1],
        ragged=ragged,
        heads=query[-2],
        key_value_heads=problem.key_value_heads,
        value_size=value[2] // problem.key_value_heads,
        page_size=key[1],
        pages_per_sequence=block_table[1],
        select_count=problem.select_block_count,
        compress_block_size=problem.window.compress_block_size,
        compress_stride=problem.window.compress_stride,
        select_block_size=problem.window.select_block_size,
    )
