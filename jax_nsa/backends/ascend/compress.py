"""What CANN's aclnnNsaCompressWithCache cannot do."""

from __future__ import annotations

from jax_nsa import native
from jax_nsa.backends import Call


def refuses(call: Call, platform: str) -> str | None:
    """Why CANN's operator cannot serve the call, as far as its shapes tell."""
    limits = native.module().ascend_limits(call.operator.target)
    size, heads = call.problem.compress_block_size, call.problem.key_value_heads
    if size > limits["window"]:
        return f"CANN's kernel takes windows of at most {limits['window']} tokens, got {size}"
    if heads > limits["heads"]:
        return f"CANN's kernel takes at most {limits['heads']} heads, got {heads}"
    dtype = call.operands[0].dtype
    pages = (limits["small_page"], limits["large_page"])
    for name, operand in zip(call.names, call.operands, strict=True):
        if name.startswith("bias"):
            return "CANN's kernel has no bias"
        if name.startswith("weight") and operand.dtype != dtype:
            return (
                f"CANN's kernel takes weights of input's dtype {dtype.name} only, "
                f"got {operand.dtype.name}"
            )
        if platform != "ascend" or not name.startswith("input"):
            continue  # the host gathers windows into pages and heads that CANN's kernel takes
        if operand.shape[1] not in pages:
            return (
                f"CANN's kernel takes pages of {pages[0]} or {pages[1]} rows, "
                f"got {operand.shape[1]}"
            )
        head_size = operand.shape[2] // heads
        if head_size % limits["head_size_granule"]:
            return (
                f"CANN's kernel takes heads of a multiple of {limits['head_size_granule']}, "
                f"got {head_size}"
            )
    return None
