"""The C++ kernel on the CPU platform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax_nsa import native
from jax_nsa.backends import Call

NAME = "cpu"
PLATFORMS = ("cpu",)
DEFAULT_PLATFORMS = ("cpu",)
TARGET = "jax_nsa_compress_attention_cpu"


def register() -> None:
    """Registers the kernel's custom-call target if the compiled library is usable."""
    native.register("cpu")


def unavailable(platform: str) -> str | None:
    """Why the compiled kernel is missing, if it is."""
    del platform
    return native.unavailable("cpu", TARGET)


def refuses(call: Call, platform: str) -> str | None:
    """The kernel serves every legal call."""
    del call, platform
    return None


def lower(ctx: Any, *operands: Any, call: Call) -> Sequence[Any]:
    """Emits the custom call."""
    return native.ffi_lowering(TARGET, call.problem)(ctx, *operands)
