"""CANN's aclnnNsaCompressAttentionInfer on Ascend NPUs.

Two custom calls lead there. Under an Ascend PJRT plugin, buffers are on the NPU and the operator
runs on XLA's stream. Under host JAX, the CPU platform's custom call copies what the call needs to
an NPU and the results back. The second is never chosen unasked: whether the copies pay depends on
the machine.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_nsa import native
from jax_nsa.backends import Call

NAME = "ascend"
PLATFORMS = ("cpu", "ascend")
DEFAULT_PLATFORMS = ("ascend",)
TARGET = "jax_nsa_compress_attention_ascend"
HOST_TARGET = "jax_nsa_compress_attention_ascend_host"
DEVICE_VARIABLE = "JAX_NSA_ASCEND_DEVICE"


def register() -> None:
    """Registers the custom-call targets if the compiled library is usable.

    Needs no CANN: its libraries are looked for when an answer or a call needs them.
    """
    native.register("ascend")
    if native.unavailable("ascend", HOST_TARGET) is None:
        # While CANN still stands: its own static objects go when the process exits.
        atexit.register(native.module().ascend_release)


def unavailable(platform: str) -> str | None:
    """Why CANN or an NPU cannot be used, if so."""
    target = HOST_TARGET if platform == "cpu" else TARGET
    return native.unavailable("ascend", target) or native.module().ascend_unavailable()


def refuses(call: Call, platform: str) -> str | None:
    """Why CANN's kernel cannot serve the call, as far as its shapes and constants tell.

    What only the lengths' run-time values tell, the handlers refuse before they launch anything.
    """
    limits = native.module().ascend_limits()
    problem, window = call.problem, call.problem.window
    query, key, _, block_table, _, *tokens = call.operands
    if query.dtype.name not in ("bfloat16", "float16"):
        return f"CANN's kernel takes bfloat16 and float16, got {query.dtype.name}"
    if problem.return_lse or problem.return_block_scores:
        return "CANN's kernel gives no log-sum-exp (return_lse)"
    if _exceeds(block_table.shape[0], limits["sequences"]):
        return (
            f"CANN's kernel takes at most {limits['sequences']} sequences, "
            f"got {block_table.shape[0]}"
        )
    # On the host, rows past actual_seq_qlen are not sent.
    rows_reach_cann = platform == "ascend" or not tokens
    if rows_reach_cann and query.ndim == 4 and _exceeds(query.shape[1], limits["tokens"]):
        return (
            f"CANN's kernel takes at most {limits['tokens']} query tokens for each sequence, "
            f"got {query.shape[1]}"
        )
    most = block_table.shape[1] * key.shape[1]
    if isinstance(most, int) and problem.select_block_count > window.num_blocks(most):
        return (
            "CANN's kernel cannot pad topk_indices: select_block_count = "
            f"{problem.select_block_count} exceeds the {window.num_blocks(most)} blocks of the "
            "longest sequence that block_table can hold"
        )
    for b, length in enumerate(call.host_lengths or ()):
        if not 1 <= length <= limits["length"]:
            return (
                f"CANN's kernel takes 1 to {limits['length']} compressed positions, "
                f"got actual_cmp_seq_kvlen[{b}] = {length}"
            )
        blocks = window.num_blocks(length)
        if not problem.select_block_count <= blocks <= limits["blocks"]:
            return (
                f"CANN's kernel takes sequences of select_block_count = "
                f"{problem.select_block_count} to {limits['blocks']} select blocks, "
                f"got actual_cmp_seq_kvlen[{b}] = {length} with {blocks}"
            )
    return None


def _exceeds(size: Any, limit: int) -> bool:
    return isinstance(size, int) and size > limit  # a symbolic size is checked when it is known


def lower(ctx: Any, *operands: Any, call: Call) -> Sequence[Any]:
    """Emits the custom call."""
    platforms = ctx.platforms or ctx.module_context.platforms
    if "cpu" in platforms:
        device = np.int64(os.environ.get(DEVICE_VARIABLE, "0"))
        return native.ffi_lowering(HOST_TARGET, call.problem, device=device)(ctx, *operands)
    # Lengths that are constants of the program spare the handler a wait for the stream. A
    # partitioned program has those of all its parts here, which helps no part.
    lengths = call.host_lengths or ()
    known = len(lengths) == call.operands[4].shape[0]
    host_lengths = np.asarray(lengths if known else (), np.int64)
    return native.ffi_lowering(TARGET, call.problem, host_lengths=host_lengths)(ctx, *operands)
