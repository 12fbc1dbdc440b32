"""The C++ kernel on the CPU platform.

It is compiled for several instruction sets, and runs the best that the machine has. The environment
variable JAX_NSA_CPU_ISA forces one by name ("amx", "avx512", "avx2" or "sse2"; "neon"); it is read
when a program is compiled.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from jax_nsa import native
from jax_nsa.backends import Call

NAME = "cpu"
PLATFORMS = ("cpu",)
DEFAULT_PLATFORMS = ("cpu",)
TARGET = "jax_nsa_compress_attention_cpu"
ISA_VARIABLE = "JAX_NSA_CPU_ISA"


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


def forced_isa() -> str:
    """The instruction set that the environment forces; empty for the best one.

    Raises:
        ValueError: it names none that this machine can run.
    """
    isa = os.environ.get(ISA_VARIABLE, "")
    runnable = native.module().cpu_kernels()
    if isa and isa not in runnable:
        raise ValueError(
            f"{ISA_VARIABLE} must name an instruction set that this machine can run, "
            f"one of {runnable}, got {isa!r}"
        )
    return isa


def lower(ctx: Any, *operands: Any, call: Call) -> Sequence[Any]:
    """Emits the custom call."""
    return native.ffi_lowering(TARGET, call.problem, isa=forced_isa())(ctx, *operands)
