"""The implementations: which exist, which one a platform gets, and why one cannot serve a call.

An implementation is a module of this package with the members of `Backend`. None knows another.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Protocol

from jax_nsa.problem import Problem

IMPLEMENTATION_VARIABLE = "JAX_NSA_IMPLEMENTATION"


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the primitive as its lowering sees it.

    Attributes:
        problem: the static problem.
        operands: the abstract values of the primitive's operands.
        host_lengths: the values of `lengths` where the caller gave them as host values under a
            trace, else None.
    """

    problem: Problem
    operands: tuple[Any, ...]
    host_lengths: tuple[int, ...] | None = None


class Backend(Protocol):
    """One implementation of the primitive."""

    NAME: str
    PLATFORMS: tuple[str, ...] | None  # XLA platforms it lowers for; None: all
    DEFAULT_PLATFORMS: tuple[str, ...] | None  # those it is chosen for unasked; None: all

    def register(self) -> None:
        """Registers its custom-call targets with JAX, once, if it can run at all."""

    def unavailable(self, platform: str) -> str | None:
        """Why it cannot run on this machine for `platform`, with the remedy; None if it can."""

    def refuses(self, call: Call, platform: str) -> str | None:
        """Why it cannot serve this call though it is available; None if it can."""

    def lower(self, ctx: Any, *operands: Any, call: Call) -> Sequence[Any]:
        """Emits the call."""


from jax_nsa.backends import ascend, cpu, cuda, reference  # noqa: E402  (they need the names above)

# Best first: with implementation=None a platform gets the first that can serve the call.
ALL: dict[str, Backend] = {b.NAME: b for b in (cuda, ascend, cpu, reference)}

for _backend in ALL.values():
    _backend.register()


def parse(implementation: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Normalises the `implementation` argument of the front door to names, checked.

    None stands for the default, which the environment variable JAX_NSA_IMPLEMENTATION (names
    separated by commas) overrides.
    """
    source = "implementation"
    if implementation is None:
        variable = os.environ.get(IMPLEMENTATION_VARIABLE)
        if not variable:
            return None
        source, implementation = IMPLEMENTATION_VARIABLE, variable.replace(" ", "").split(",")
    if not isinstance(implementation, Sequence):
        raise TypeError(f"{source} must be a name or a sequence of names, got {implementation!r}")
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    for name in names:
        if not isinstance(name, str) or name not in ALL:
            raise ValueError(f"{source} must name some of {sorted(ALL)}, got {name!r}")
    if not names:
        raise ValueError(f"{source} must name some of {sorted(ALL)}, got none")
    return names


def why_not(backend: Backend, platform: str, call: Call | None = None) -> str | None:
    """Why `backend` cannot serve `call` (or any call at all) on `platform`; None if it can."""
    if backend.PLATFORMS is not None and platform not in backend.PLATFORMS:
        runs_on = " or ".join(backend.PLATFORMS)
        return f"it runs on platform {runs_on}, and this program is compiled for {platform}"
    return backend.unavailable(platform) or (call and backend.refuses(call, platform)) or None


def defaults(platform: str) -> tuple[str, ...]:
    """The implementations that `platform` gets unasked, best first."""
    return tuple(
        name
        for name, backend in ALL.items()
        if backend.DEFAULT_PLATFORMS is None or platform in backend.DEFAULT_PLATFORMS
    )


def choose(platform: str, names: Sequence[str] | None, call: Call) -> Backend:
    """Returns the first of `names` (of the platform's defaults if None) that can serve `call`.

    Raises:
        NotImplementedError: none can; the message gives each one's reason.
    """
    reasons = []
    for name in names or defaults(platform):
        reason = why_not(ALL[name], platform, call)
        if reason is None:
            return ALL[name]
        reasons.append(f'implementation="{name}": {reason}')
    raise NotImplementedError(
        "No implementation can serve this nsa_compress_attention_infer call.\n" + "\n".join(reasons)
    )
