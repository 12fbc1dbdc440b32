"""CANN's operators on Ascend NPUs.

Two custom calls lead to each. Under an Ascend PJRT plugin, buffers are on the NPU and the operator
runs on XLA's stream. Under host JAX, the CPU platform's custom call copies what the call needs to
an NPU and the results back. The second is never chosen unasked: whether the copies pay depends on
the machine.

A module of this package for each operator says what CANN's cannot do, and where it must, what the
program does around it on the NPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np

from jax_nsa import native
from jax_nsa.backends import Call, decode_step
from jax_nsa.backends.ascend import compress, compress_attention, select_attention, step

if TYPE_CHECKING:
    from jax_nsa.operator import Operator

NAME = "ascend"
PLATFORMS = ("cpu", "ascend")
DEFAULT_PLATFORMS = ("ascend",)
DEVICE_VARIABLE = "JAX_NSA_ASCEND_DEVICE"

# Runs a call's custom call on arrays.
Run = Callable[[Call, Sequence[jax.Array]], Sequence[jax.Array]]


class CannOperator(Protocol):
    """What this backend knows of one operator."""

    def refuses(self, call: Call, platform: str) -> str | None:
        """Why CANN's operator cannot serve the call, as far as its shapes and constants tell."""


_OPERATORS: dict[str, CannOperator] = {
    "compress": compress,
    "compress_attention": compress_attention,
    "select_attention": select_attention,
}
# Of those whose calls CANN's operator does not serve as they are where arrays are on the NPU: the
# call in terms of calls that it serves.
_ON_DEVICE: dict[str, Callable[[Call, Sequence[jax.Array], Run], Sequence[jax.Array]]] = {
    "select_attention": select_attention.on_device,
}


def unavailable(operator: Operator, platform: str) -> str | None:
    """Why CANN, its operator or an NPU cannot be used, if so."""
    del platform
    if operator.target not in _OPERATORS:
        return f"jax_nsa does not yet call CANN's own operator for {operator.name}"
    return native.unavailable(NAME, operator.target) or native.module().ascend_unavailable(
        operator.target
    )


def refuses(call: Call, platform: str) -> str | None:
    """Why CANN's operator cannot serve the call, as far as its shapes and constants tell.

    What only the run-time values tell, the handlers refuse before they launch anything.
    """
    dtype = call.operands[0].dtype.name
    if dtype not in ("bfloat16", "float16"):
        return f"CANN's kernel takes bfloat16 and float16, got {dtype}"
    if getattr(call.problem, "interleaved", False):
        return (
            "CANN's kernel takes keys and values in pools of their own, "
            'got kv_layout="interleaved"'
        )
    return _OPERATORS[call.operator.target].refuses(call, platform)


def configuration(call: Call) -> Mapping[str, Any]:
    """The NPU that the environment names, and lengths that are constants of the program.

    They spare the device route a wait for the stream. A partitioned program has those of all its
    parts, which helps no part.
    """
    lengths = dict(call.constants).get("lengths", ())
    known = len(lengths) == call.operand("lengths").shape[0]
    return {
        "device": np.int64(os.environ.get(DEVICE_VARIABLE, "0")),
        "host_lengths": np.asarray(lengths if known else (), np.int64),
    }


def compute(call: Call, *operands: jax.Array) -> Sequence[jax.Array]:
    """The custom call: on the host's buffers, or where an Ascend plugin has them."""

    def run(backend: str, call: Call, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(native.custom_call(backend, call, arrays, **configuration(call)))

    return jax.lax.platform_dependent(
        *operands,
        cpu=lambda *arrays: run("ascend_host", call, arrays),
        default=lambda *arrays: tuple(
            on_device(call, arrays, lambda served, its: run(NAME, served, its))
        ),
    )


def on_device(call: Call, operands: Sequence[jax.Array], run: Run) -> Sequence[jax.Array]:
    """The call on arrays that are on the NPU; `run` runs one that CANN's operator serves."""
    around = _ON_DEVICE.get(call.operator.target)
    return run(call, operands) if around is None else around(call, operands, run)


def joins_here() -> bool:
    """Whether there is an Ascend plugin, under which one custom call makes all runs of a step."""
    try:
        return bool(jax.devices("ascend"))
    except RuntimeError:
        return False


def joint(
    calls: Sequence[Call], platform: str
) -> Callable[[step.Operands], Sequence[Sequence[jax.Array]]] | None:
    """The calls of a step as one, where arrays are on the NPU."""
    if platform != "ascend" or not decode_step.is_one(calls):
        return None

    def run(branches: Sequence[step.Branch]) -> Sequence[Sequence[jax.Array]]:
        return native.joint_call(
            NAME,
            decode_step.TARGET,
            {
                name: (*branch, configuration(branch[0]))
                for name, branch in zip(decode_step.BRANCHES, branches, strict=True)
            },
        )

    return lambda operands: step.joint(calls, operands, run)
