"""The jnp reference as an implementation: any platform, any call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from jax_nsa.backends import Call

if TYPE_CHECKING:
    from jax_nsa.operator import Operator

NAME = "reference"
PLATFORMS = None
DEFAULT_PLATFORMS = None


def unavailable(operator: Operator, platform: str) -> str | None:
    """It is plain XLA: never unavailable."""
    del operator, platform
    return None


def refuses(call: Call, platform: str) -> str | None:
    """It is the meaning of the operators: it refuses nothing."""
    del call, platform
    return None


def configuration(call: Call) -> Mapping[str, Any]:
    """Nothing but the program decides its results."""
    del call
    return {}


def compute(call: Call, *operands: jax.Array) -> Sequence[jax.Array]:
    """Traces the jnp computation into the program."""
    named = dict(zip(call.names, operands, strict=True))
    return list(call.operator.reference(named, call.problem).values())
