"""What CANN's aclnnNsaCompressAttentionInfer cannot do."""

from __future__ import annotations

from typing import Any

from jax_nsa import native
from jax_nsa.backends import Call


def refuses(call: Call, platform: str) -> str | None:
    """Why CANN's operator cannot serve the call, as far as its shapes and constants tell."""
    limits = native.module().ascend_limits(call.operator.target)
    problem, blocks = call.problem, call.problem.blocks
    query, key, block_table = map(call.operand, ("query", "key", "block_table"))
    if not problem.is_canns:
        return (
            "CANN's kernel chooses blocks by its own rule only: importance='cann', init_blocks=1, "
            f"local_blocks=2, got {problem.importance!r}, {problem.init_blocks}, "
            f"{problem.local_blocks}"
        )
    if key.shape[1] > limits["page"]:
        return f"CANN's kernel takes pages of at most {limits['page']} rows, got {key.shape[1]}"
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
