"""The jnp reference as an implementation: any platform, any call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from jax.interpreters import mlir

from jax_nsa import reference
from jax_nsa.backends import Call

NAME = "reference"
PLATFORMS = None
DEFAULT_PLATFORMS = None


def register() -> None:
    """Needs no custom-call target."""


def unavailable(platform: str) -> str | None:
    """It is plain XLA: never unavailable."""
    del platform
    return None


def refuses(call: Call, platform: str) -> str | None:
    """It is the meaning of the operator: it refuses nothing."""
    del call, platform
    return None


def lower(ctx: Any, *operands: Any, call: Call) -> Sequence[Any]:
    """Traces the jnp computation into the program."""
    compute = functools.partial(reference.compress_attention, problem=call.problem)
    return mlir.lower_fun(compute, multiple_results=True)(ctx, *operands)
