"""The C++ kernels on the CPU platform.

They are compiled for several instruction sets, and run the best that the machine has. The
environment variable JAX_NSA_CPU_ISA forces one by name ("amx", "avx512", "avx2" or "sse2"; "neon");
it is read when a program is compiled.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from jax_nsa import native
from jax_nsa.backends import Call

if TYPE_CHECKING:
    from jax_nsa.operator import Operator

NAME = "cpu"
PLATFORMS = ("cpu",)
DEFAULT_PLATFORMS = ("cpu",)
ISA_VARIABLE = "JAX_NSA_CPU_ISA"


def unavailable(operator: Operator, platform: str) -> str | None:
    """Why the compiled kernel is missing, if it is."""
    del platform
    return native.unavailable(NAME, operator.target)


def refuses(call: Call, platform: str) -> str | None:
    """The kernels serve every legal call."""
    del call, platform
    return None


def configuration(call: Call) -> Mapping[str, Any]:
    """The instruction set that the environment forces; empty for the best one.

    Raises:
        ValueError: it names none that this machine can run.
    """
    del call
    isa = os.environ.get(ISA_VARIABLE, "")
    runnable = native.module().cpu_kernels()
    if isa and isa not in runnable:
        raise ValueError(
            f"{ISA_VARIABLE} must name an instruction set that this machine can run, "
            f"one of {runnable}, got {isa!r}"
        )
    return {"isa": isa}


def compute(call: Call, *operands: jax.Array) -> Sequence[jax.Array]:
    """The custom call."""
    return native.custom_call(NAME, call, operands, **configuration(call))
