"""The CUDA kernel on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    return native.unavailable("cuda", TARGET)


def refuses(call: Call, platform: str) -> str | None:
    """The kernel serves every legal call."""
    del call, platform
    return None


def lower(ctx: Any, *operands: Any, call: Call) -> Sequence[Any]:
    """Emits the custom call."""
    return native.ffi_lowering(TARGET, call.problem)(ctx, *operands)
