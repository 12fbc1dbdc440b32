"""CANN's aclnnNsaCompressAttentionInfer on Ascend NPUs.

Two custom calls lead there. Under an Ascend PJRT plugin, buffers are on the NPU and the operator
runs on XLA's stream. Under host JAX, the CPU platform's custom call copies what the call needs to
an NPU and the results back. The second is never chosen unasked: whether the copies pay depends on
the machine.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jax_nsa import native
from jax_nsa.backends import Call

if TYPE_CHECKING:
    from jax_nsa.operator import Operator

NAME = "ascend"
PLATFORMS = ("cpu", "ascend")
DEFAULT_PLATFORMS = ("ascend",)
MAX_PAGE = 128  # rows
DEVICE_VARIABLE = "JAX_NSA_ASCEND_DEVICE"


def register() -> None:
    """Registers the custom-call targets if the compiled library is usable.

    Needs no CANN: its libraries are looked for when an answer or a call needs them.
    """
    native.register(NAME)
    if native.unavailable(NAME, "compress_attention") is None:
        # While CANN still stands: its own static objects go when the process exits.
        atexit.register(native.module().ascend_release)


def unavailable(operator: Operator, platform: str) -> str | None:
    """Why CANN or an NPU cannot be used, if so."""
    del platform
    if operator.target != "compress_attention":
        return f"jax_nsa does not yet call CANN's own operator for {operator.name}"
    return native.unavailable(NAME, operator.target) or native.module().ascend_unavailable()


def refuses(call: Call, platform: str) -> str | None:
    """Why CANN's kernel cannot serve the call, as far as its shapes and constants tell.

    What only the lengths' run-time values tell, the handlers refuse before they launch anything.
    """
    limits = native.module().ascend_limits()
    problem, blocks = call.problem, call.problem.blocks
    query, key, block_table = map(call.operand, ("query", "key", "block_table"))
    if not problem.is_canns:
        return (
            "CANN's kernel chooses blocks by its own rule only: importance='cann', init_blocks=1, "
            f"local_blocks=2, got {problem.importance!r}, {problem.init_blocks}, "
            f"{problem.local_blocks}"
        )
    if key.shape[1] > MAX_PAGE:
        return f"CANN's kernel takes pages of at most {limits['page']} rows, got {key.shape[1]}"
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
    rows_reach_cann = platform == "ascend" or "token_counts" not in call.names
    if rows_reach_cann and query.ndim == 4 and _exceeds(query.shape[1], limits["tokens"]):
        return (
            f"CANN's kernel takes at most {limits['tokens']} query tokens for each sequence, "
            f"got {query.shape[1]}"
        )
    most = block_table.shape[1] * key.shape[1]
    if isinstance(most, int) and problem.select_block_count > blocks.num_blocks(most):
        return (
            "CANN's kernel cannot pad topk_indices: select_block_count = "
            f"{problem.select_block_count} exceeds the {blocks.num_blocks(most)} blocks of the "
            "longest sequence that block_table can hold"
        )
    for b, length in enumerate(dict(call.constants).get("lengths", ())):
        if not 1 <= length <= limits["length"]:
            return (
                f"CANN's kernel takes 1 to {limits['length']} compressed positions, "
                f"got actual_cmp_seq_kvlen[{b}] = {length}"
            )
        have = blocks.num_blocks(length)
        if not problem.select_block_count <= have <= limits["blocks"]:
            return (
                f"CANN's kernel takes sequences of select_block_count = "
                f"{problem.select_block_count} to {limits['blocks']} select blocks, "
                f"got actual_cmp_seq_kvlen[{b}] = {length} with {have}"
            )
    return None


def _exceeds(size: Any, limit: int) -> bool:
    return isinstance(size, int) and size > limit  # a symbolic size is checked when it is known


def configuration(call: Call) -> Mapping[str, Any]:
    """The NPU that the environment names, and lengths that are constants of the program.

    They spare the device route a wait for the stream. A partitioned program has those of all its
    parts, which helps no part.
    """
    lengths = dict(call.constants).get("lengths", ())
    known = len(lengths) == call.operand("lengths").shape[0]
    return {
        "device": np.int64(os.environ.get(DEVICE_VARIABLE, "0")),
        "host_lengths": np.asarray(lengths if known else (), np.int64),
    }


def compute(call: Call, *operands: jax.Array) -> Sequence[jax.Array]:
    """The custom call: on the host's buffers, or where an Ascend plugin has them."""
    attributes = configuration(call)
    return jax.lax.platform_dependent(
        *operands,
        cpu=lambda *arrays: tuple(native.custom_call("ascend_host", call, arrays, **attributes)),
        default=lambda *arrays: tuple(native.custom_call(NAME, call, arrays, **attributes)),
    )
