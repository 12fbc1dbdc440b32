"""Finds the compiled library, checks that this JAX can load it, and speaks its convention."""

from __future__ import annotations

import functools
import importlib
import pathlib
import re
from types import ModuleType
from typing import Any

import jax
import jax.export
import jaxlib.version
import numpy as np

from jax_nsa.problem import Problem

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


def export_disabled_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What `jax.export.export(..., disabled_checks=...)` needs to export calls of this package.

    `jax.export` guarantees the stability only of custom calls that it knows. Those of jax_nsa are
    named here; a process that runs the exported program must import jax_nsa first.
    """
    loaded, _ = _load()
    names = [] if loaded is None else [n for t in loaded.registrations().values() for n in t]
    return [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]


def register(backend: str) -> None:
    """Registers the custom-call targets that were compiled for `backend`."""
    for name, (platform, handler) in _targets(backend).items():
        jax.ffi.register_ffi_target(name, handler, platform=platform)


def unavailable(backend: str, target: str) -> str | None:
    """Why `target` was not registered for `backend`; None if it was."""
    _, reason = _load()
    if reason is None and target not in _targets(backend):
        reason = f"the installed library was compiled without its {backend} kernel"
    return reason


def ffi_lowering(target: str, problem: Problem, **attributes: Any) -> Any:
    """The lowering rule of a custom call with the attributes that every kernel takes."""
    window = problem.window
    return functools.partial(
        jax.ffi.ffi_lowering(target),
        problem={
            "scale": np.float32(problem.scale),
            "key_value_heads": np.int64(problem.key_value_heads),
            "compress_block_size": np.int64(window.compress_block_size),
            "compress_stride": np.int64(window.compress_stride),
            "select_block_size": np.int64(window.select_block_size),
        },
        **attributes,
    )
