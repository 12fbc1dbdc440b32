"""The implementations: which exist, which one a platform gets, and why one cannot serve a call.

Each module of this package that `ALL` names is one, with the members of `Backend`; none knows
another. `decode_step` says which calls are a step.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax

from jax_nsa.axes import Axes, is_packed

if TYPE_CHECKING:
    from jax_nsa.operator import Operator

IMPLEMENTATION_VARIABLE = "JAX_NSA_IMPLEMENTATION"


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an operator as its lowering sees it.

    Attributes:
        operator: which.
        operands: the abstract values of its operands.
        names: the operands' names.
        problem: the static problem.
        constants: values of operands that are constants of the program, by name.
        on_fault: "fail" or "nan": what a kernel on the host does about a bad value.
        maps: sizes of the `jax.vmap`s that were folded into the sequences, the innermost first.
        pool_maps: how many mapped calls' pools were put into one.
        known_as: what the caller knows arguments as, where not as the front door does.
        is_part: whether this is what one device has of a larger call, which messages say.
    """

    operator: Operator
    operands: tuple[Any, ...]
    names: tuple[str, ...]
    problem: Any
    constants: tuple[tuple[str, tuple[int, ...]], ...] = ()
    on_fault: str = "fail"
    maps: tuple[int, ...] = ()
    pool_maps: int = 1
    known_as: tuple[tuple[str, str], ...] = ()
    is_part: bool = False

    def operand(self, name: str) -> Any:
        """The abstract value of an operand; None where the call has no such."""
        return dict(zip(self.names, self.operands, strict=True)).get(name)

    @property
    def packed(self) -> bool:
        """Whether rows of all sequences are packed."""
        return is_packed(self.names)

    def results(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the results."""
        axes = Axes.of(self.operator, self.names, self.problem, self.operands)
        return [
            jax.ShapeDtypeStruct(axes.shape(d), r.dtype or self.operands[0].dtype)
            for r, d in zip(self.operator.results(self.problem), axes.results, strict=True)
        ]


class Backend(Protocol):
    """One implementation, of some of the operators."""

    NAME: str
    PLATFORMS: tuple[str, ...] | None  # XLA platforms it runs on; None: all
    DEFAULT_PLATFORMS: tuple[str, ...] | None  # those it is chosen for unasked; None: all

    def unavailable(self, operator: Operator, platform: str) -> str | None:
        """Why it cannot run the operator on this machine, with the remedy; None if it can."""

    def refuses(self, call: Call, platform: str) -> str | None:
        """Why it cannot serve this call though it is available; None if it can."""

    def configuration(self, call: Call) -> Mapping[str, Any]:
        """What decides the result beside the call and the release of this package."""

    def compute(self, call: Call, *operands: jax.Array) -> Sequence[jax.Array]:
        """The call as a function of plain arrays, traced into the program."""


from jax_nsa import native  # noqa: E402
from jax_nsa.backends import ascend, cpu, cuda, reference  # noqa: E402  (they need the names above)

# Best first: with implementation=None a platform gets the first that can serve the call.
ALL: dict[str, Backend] = {b.NAME: b for b in (cuda, ascend, cpu, reference)}


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


def why_not(
    backend: Backend, operator: Operator, platform: str, call: Call | None = None
) -> str | None:
    """Why `backend` cannot serve `call` (or any call of the operator) there; None if it can."""
    if backend.PLATFORMS is not None and platform not in backend.PLATFORMS:
        runs_on = " or ".join(backend.PLATFORMS)
        return f"it runs on platform {runs_on}, and this program is compiled for {platform}"
    return (
        backend.unavailable(operator, platform)
        or (call and backend.refuses(call, platform))
        or None
    )


def defaults(platform: str) -> tuple[str, ...]:
    """The implementations that `platform` gets unasked, best first."""
    return tuple(
        name
        for name, backend in ALL.items()
        if backend.DEFAULT_PLATFORMS is None or platform in backend.DEFAULT_PLATFORMS
    )


_warned_of: set[tuple[str, str, str]] = set()


def _warn_of(what: str, platform: str, name: str, reason: str) -> None:
    """Tells once that a platform does without the kernels that it would get unasked."""
    if (what, platform, name) in _warned_of:
        return
    _warned_of.add((what, platform, name))
    warnings.warn(
        f"{what} runs on {platform} without its kernels, which is slow ({name}: {reason})",
        RuntimeWarning,
        stacklevel=1,
    )


def choose(platform: str, names: Sequence[str] | None, call: Call) -> Backend:
    """Returns the first of `names` (of the platform's defaults if None) that can serve `call`.

    Warns where a default is passed over.

    Raises:
        NotImplementedError: none can; the message gives each one's reason.
    """
    reasons = []
    for name in names or defaults(platform):
        reason = why_not(ALL[name], call.operator, platform, call)
        if reason is None:
            return ALL[name]
        if names is None:
            what = call.operator.name if name in native.compiled() else "jax_nsa"
            _warn_of(what, platform, name, reason)
        reasons.append(f'implementation="{name}": {reason}')
    raise NotImplementedError(
        f"No implementation can serve this {call.operator.name} call.\n" + "\n".join(reasons)
    )


def identity(backend: Backend, call: Call) -> str:
    """All that decides the results of a call, in words: equal where the results are."""
    shapes = [f"{a.dtype.name}{list(a.shape)}" for a in call.operands]
    return (
        f"jax_nsa {native.RELEASE}: {call.operator.name} by {backend.NAME} "
        f"{dict(backend.configuration(call))} of {call.names} {shapes}: {call.problem}, "
        f"on_fault={call.on_fault}, maps={call.maps}, pool_maps={call.pool_maps}"
    )
