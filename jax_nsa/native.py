"""Finds the compiled library, checks that this JAX can load it, and speaks its convention."""

from __future__ import annotations

import atexit
import functools
import importlib
import pathlib
import re
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.export
import jaxlib.version
import numpy as np

from jax_nsa.axes import Axes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from jax_nsa.backends import Call

RELEASE = "0.2.0"
_MODULE = "jax_nsa._native"


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """Returns the compiled module, or None and the reason."""
    try:
        module = importlib.import_module(_MODULE)
    except ImportError as error:
        return None, (
            f"the compiled library {_MODULE} cannot be loaded ({error}); "
            "install jax_nsa with `pip install .` from its source"
        )
    built, running = module.ffi_api_version(), _runtime_ffi_api_version()
    if running is None:
        return None, (
            f"the headers of jaxlib {jaxlib.version.__version__} do not tell its XLA FFI API "
            "version in the way this release of jax_nsa knows; upgrade jax_nsa"
        )
    # XLA accepts a handler of its own major version and of no newer minor one; registering
    # another takes down the whole platform.
    if built[0] != running[0] or built[1] > running[1]:
        return None, (
            "jax_nsa was built for XLA FFI API {}.{} and jaxlib {} offers {}.{}; upgrade jaxlib, "
            "or reinstall jax_nsa from source against this jaxlib with "
            "`pip install --no-build-isolation .`".format(
                *built, jaxlib.version.__version__, *running
            )
        )
    return module, None


def _runtime_ffi_api_version() -> tuple[int, int] | None:
    """The FFI API version of the installed jaxlib, from the header that it ships, if that tells."""
    try:
        header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    except OSError:
        return None
    parts = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", header) for part in ("MAJOR", "MINOR")]
    if not all(parts):
        return None
    major, minor = (int(part[1]) for part in parts if part)
    return major, minor


def module() -> ModuleType:
    """The compiled module; ImportError with the reason if it cannot be used."""
    loaded, reason = _load()
    if loaded is None:
        raise ImportError(reason)
    return loaded


def _targets(backend: str) -> dict[str, tuple[str, Any]]:
    """Custom-call targets of one backend: name to (XLA platform, handler capsule)."""
    loaded, _ = _load()
    return {} if loaded is None else loaded.registrations().get(backend, {})


def compiled() -> list[str]:
    """The backends whose kernels the installed library has."""
    loaded, _ = _load()
    return [] if loaded is None else [b for b, targets in loaded.registrations().items() if targets]


def export_disabled_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What `jax.export.export(..., disabled_checks=...)` needs to export calls of this package.

    `jax.export` guarantees the stability only of custom calls that it knows. Those of jax_nsa are
    named here; a process that runs the exported program must import jax_nsa first.
    """
    loaded, _ = _load()
    names = [] if loaded is None else [n for t in loaded.registrations().values() for n in t]
    return [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]


def register() -> None:
    """Registers all custom-call targets that were compiled with JAX, if the library is usable.

    Of Ascend's they need no CANN: its libraries are looked for when a call or an answer needs them.
    """
    for backend in compiled():
        for name, (platform, handler) in _targets(backend).items():
            jax.ffi.register_ffi_target(name, handler, platform=platform)
        if backend == "ascend":
            # While CANN still stands: its own static objects go when the process exits.
            atexit.register(module().ascend_release)


def target_name(backend: str, operator: str) -> str:
    """The custom-call target of an operator's kernel."""
    return f"jax_nsa_{operator}_{backend}"


def unavailable(backend: str, operator: str) -> str | None:
    """Why the operator's target was not registered for `backend`; None if it was."""
    _, reason = _load()
    if reason is None and target_name(backend, operator) not in _targets(backend):
        reason = f"the installed library was compiled without its {backend} kernel"
        if _targets(backend):
            reason += f" of {operator}"
    return reason


def custom_call(
    backend: str,
    call: Call,
    operands: Sequence[jax.Array],
    further_results: Mapping[str, jax.ShapeDtypeStruct] | None = None,
    **attributes: Any,
) -> Sequence[jax.Array]:
    """Calls an operator's kernel.

    Every array has a name, which is how kernels find it; so that all that decides the result is in
    the program's text, the release of this package is among the attributes.

    Args:
        backend: which kernel, as targets spell it.
        call: the call.
        operands: its operands.
        further_results: results that only the kernel knows of, by name; not returned.
        **attributes: those of this kernel alone.
    """
    further = dict(further_results or {})
    results = _result_names(call)
    aliases = {
        call.names.index(name): at
        for at, name in enumerate(results)
        if call.operator.is_aliased(name)
    }
    outcomes = jax.ffi.ffi_call(
        target_name(backend, call.operator.target),
        [*call.results(), *further.values()],
        input_output_aliases=aliases,
    )(*operands, **_attributes(call, further), **attributes)
    return outcomes[: len(results)]


def joint_call(
    backend: str,
    target: str,
    branches: Mapping[str, tuple[Call, Sequence[jax.Array | None], Mapping[str, Any]]],
    further_results: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]] | None = None,
) -> list[Sequence[jax.Array]]:
    """Calls a kernel that serves several calls at once.

    Args:
        backend: which kernel, as targets spell it.
        target: its target.
        branches: by the name that the attributes of each begin with: a call, its operands, and
            attributes of this kernel alone. Arrays lie one call after the other. An operand that
            the kernel takes from an earlier call's results is None.
        further_results: of some branches, results that only the kernel knows of, by name.

    Returns:
        The results of each.
    """
    further = {name: (further_results or {}).get(name, {}) for name in branches}
    shapes = [
        shape
        for name, (call, _, _) in branches.items()
        for shape in (*call.results(), *further[name].values())
    ]
    arrays = [
        array for _, operands, _ in branches.values() for array in operands if array is not None
    ]
    attributes = {
        f"{name}_{attribute}": value
        for name, (call, _, own) in branches.items()
        for attribute, value in {**_attributes(call, further[name]), **own}.items()
    }
    outcomes = iter(jax.ffi.ffi_call(target_name(backend, target), shapes)(*arrays, **attributes))
    results: list[Sequence[jax.Array]] = []
    for name, (call, _, _) in branches.items():
        results.append([next(outcomes) for _ in _result_names(call)])
        for _ in further[name]:
            next(outcomes)
    return results


def _result_names(call: Call) -> list[str]:
    return [result.name for result in call.operator.results(call.problem)]


def _attributes(call: Call, further_results: Iterable[str] = ()) -> dict[str, Any]:
    """What every kernel is told of a call."""
    known_as = {"known_as": dict(call.known_as)} if call.known_as else {}
    return known_as | {
        "operands": " ".join(call.names),
        "results": " ".join([*_result_names(call), *further_results]),
        "problem": _scalars(call.problem),
        "release": RELEASE,
        "faults": call.on_fault,
        "maps": np.asarray(call.maps, np.int64),
        "pool_maps": np.int64(call.pool_maps),
        "is_part": np.int64(call.is_part),
    }


def _scalars(problem: Any) -> dict[str, np.generic]:
    """The problem's scalars in the types that kernels read."""
    return {
        name: np.float32(value) if isinstance(value, float) else np.int64(value)
        for name, value in problem.scalars().items()
    }


def workspace_bytes(call: Call) -> int:
    """Bytes of memory on the device that the operator's CUDA kernel needs for a call; 0: none."""
    if not needs_workspace(call.operator.target):
        return 0
    axes = Axes.of(call.operator, call.names, call.problem, call.operands)
    integers = {n: v for n, v in call.problem.scalars().items() if isinstance(v, int)}
    return module().cuda_workspace_bytes(call.operator.target, {**axes.sizes, **integers})


def needs_workspace(target: str) -> bool:
    """Whether an operator's CUDA kernel needs memory beside its arrays."""
    return target in module().cuda_workspaces()
