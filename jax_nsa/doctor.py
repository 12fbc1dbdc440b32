"""What this machine can run, and whether it agrees with NumPy on a decode step."""

from __future__ import annotations

import functools
import os
import platform as python_platform
import textwrap
import time
from typing import Any

import jax
import jaxlib.version
import numpy as np

import jax_nsa
from jax_nsa import backends, native, trial
from jax_nsa.operator import ALL as OPERATORS

NVIDIA_DRIVER = "/proc/driver/nvidia/version"


def main() -> int:
    """Prints the report; returns the exit status, 0 only if everything available agrees."""
    device = jax.devices()[0]
    platform = platform_of(device)
    print(
        f"jax_nsa {jax_nsa.__version__}, JAX {jax.__version__}, jaxlib "
        f"{jaxlib.version.__version__}, Python {python_platform.python_version()}"
    )
    kind = device.device_kind if device.device_kind != platform else "host processor"
    print(f"platform {platform}, {len(jax.devices())} x {kind}")
    for advice in _advice(platform):
        print(textwrap.fill(advice, width=100, break_long_words=False, break_on_hyphens=False))

    reasons = {
        name: {n: backends.why_not(b, o, platform) for n, o in sorted(OPERATORS.items())}
        for name, b in backends.ALL.items()
    }
    served = {name: {t for t, why in of.items() if why is None} for name, of in reasons.items()}
    try:
        chosen = backends.parse(None) or backends.defaults(platform)
    except ValueError as error:  # a name in the environment that is none
        print(f"FAILED: {error}")
        return 1
    best = next((name for name in chosen if served.get(name)), None)
    print("\nImplementations, best first")
    for name, of_operators in reasons.items():
        print(_entry(name, _state(of_operators, is_default=name == best)))

    print(
        f"\nA decode step: {trial.SEQUENCES} sequences of {trial.TOKENS} tokens in pages of "
        f"{trial.PAGE}, {trial.HEADS}/{trial.KEY_VALUE_HEADS} heads of "
        f"{trial.HEAD_SIZE}/{trial.VALUE_SIZE}, bfloat16,\nchecked against NumPy in double "
        "precision; times are of warm calls"
    )
    checks = trial.checks()
    picture, failures = None, []
    for name, operators in served.items():
        for check in (c for c in checks if operators >= c.needs):
            try:
                results, seconds = _timed(check, name)
                agreement = check.judge(results)
            except NotImplementedError as error:
                print(_entry(name, f"{check.title}: not served: {_last_line(error)}"))
                continue
            except Exception as error:  # whatever one throws, the others are still worth a look
                print(_entry(name, f"{check.title}: FAILED: {_first_line(error)}"))
                failures.append(f"{name} ({check.title})")
                continue
            verdict = "agrees" if agreement.holds else "DISAGREES"
            print(_entry(name, f"{check.title}: {verdict}, {agreement}; {seconds * 1e3:.2f} ms"))
            if not agreement.holds:
                failures.append(f"{name} ({check.title})")
            elif check.title == "compressed attention" and picture is None:
                picture = name, np.asarray(results[1])[0, 0]
    if picture is not None:
        print(f"\nSequence 0, key/value head 0, by {picture[0]}")
        print(_draw(picture[1]))

    if best is None:
        print(f"\nNone of {', '.join(chosen)} can run here.")
    elif failures:
        print(f"\nNot well: {', '.join(failures)}.")
    else:
        print("\nAll is well.")
    return int(bool(failures) or best is None)


def platform_of(device: Any) -> str:
    """The platform that programs for `device` are compiled for, as lowering rules name it."""
    if device.platform != "gpu":
        return str(device.platform)
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def _advice(platform: str) -> list[str]:
    """What keeps this machine from its best, and the remedy."""
    advice = []
    compiled = native.compiled()
    if platform == "cuda" and "cuda" not in compiled:
        advice.append(
            "This JAX has a GPU, and the installed jax_nsa was compiled without CUDA kernels: "
            "reinstall it with nvcc on the PATH, or with NVIDIA's compiler from PyPI: "
            "`JAX_NSA_CUDA_COMPILER=pypi pip install --force-reinstall --no-deps .`"
        )
    if platform == "cpu" and os.path.exists(NVIDIA_DRIVER):
        advice.append(
            "This machine has an NVIDIA driver, and JAX sees no GPU: install JAX for it, as by "
            '`pip install "jax[cuda13]"` (or cuda12).'
        )
    advice.append(f"compiled kernels: {', '.join(compiled) or 'none'}")
    return advice


def _state(reasons: dict[str, str | None], *, is_default: bool) -> str:
    """Which operators an implementation serves here, and why not the others."""
    there = [target for target, why in reasons.items() if why is None]
    absent: dict[str, list[str]] = {}
    for target, why in reasons.items():
        if why is not None:
            absent.setdefault(why, []).append(target)
    parts = []
    if there:
        parts.append("the default here" if is_default else "available")
    for why, targets in absent.items():
        which = "" if len(targets) == len(reasons) else f" for {', '.join(targets)}"
        parts.append(f"not here{which}: {why}")
    return "; ".join(parts)


def _timed(check: trial.Check, implementation: str, repeats: int = 5) -> tuple[Any, float]:
    """A call's results, and the seconds of the fastest of a few more."""
    compiled = functools.partial(
        jax.jit(check.call, static_argnums=0), implementation, *check.arrays
    )
    results = jax.block_until_ready(compiled())
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled())
        best = min(best, time.perf_counter() - start)
    return results, best


def _entry(name: str, text: str) -> str:
    """A row about one implementation, its text wrapped beside the name."""
    return textwrap.fill(
        text,
        width=100,
        initial_indent=f"  {name:10}  ",
        subsequent_indent=" " * 14,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def _draw(chosen: np.ndarray, columns: int = 64) -> str:
    """Lists the chosen blocks and marks them on a map of the sequence."""
    row = "".join("#" if block in chosen else "." for block in range(trial.CHOOSABLE))
    size = trial.BLOCKS.select_block_size
    return "\n".join(
        [
            f"  chose blocks {' '.join(map(str, chosen))}",
            f"  of {trial.CHOOSABLE} blocks of {size} tokens:",
            *(f"  {at:5}  {row[at : at + columns]}" for at in range(0, len(row), columns)),
        ]
    )
