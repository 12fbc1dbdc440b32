"""CANN's aclnnNsaCompressAttentionInfer on Ascend NPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax_nsa import native
from jax_nsa.backends import Call

NAME = "ascend"
PLATFORMS = ("cpu", "ascend")
DEFAULT_PLATFORMS = ("ascend",)
TARGET = "jax_nsa_compress_attention_ascend_host"


def register() -> None:
    """Registers the custom-call targets if the compiled library is usable."""
    native.register("ascend")


def unavailable(platform: str) -> str | None:
    """Why CANN or an NPU cannot be used, if so."""
    del platform
    return native.unavailable("ascend", TARGET)


def refuses(call: Call, platform: str) -> str | None:
    """Why CANN's kernel cannot serve the call, if so."""
    del call, platform
    return None


def lower(ctx: Any, *operands: Any, call: Call) -> Sequence[Any]:
    """Emits the custom call."""
    return native.ffi_lowering(TARGET, call.problem)(ctx, *operands)
