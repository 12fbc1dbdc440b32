"""The Ascend route on an NPU with the real CANN: `pytest -m ascend_hw`, in a process of its own."""

from __future__ import annotations

import ctypes
import json
import time
import types
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import select_attention.calls
import test_ascend_compress
import test_ascend_rules
import test_ascend_select
import test_ascend_step
from ascend.domain import CANN
from ascend.standin import StandIn
from compress_attention.contract import SEED_EXAMPLE, CompressAttentionContract
from compress_attention.problems import Geometry, build
from step.problems import Step, arguments_of
from test_step import assert_is_the_sum, step_of

from jax_nsa import native, nsa_compress_attention_infer
from jax_nsa.backends import ascend
from jax_nsa.operator import ALL as OPERATORS

pytestmark = pytest.mark.ascend_hw

EXAMPLES = {
    "torch_npu's example": replace(SEED_EXAMPLE, dtype="bfloat16"),
    "CANN's example": Geometry(
        dtype="float16", lengths=(4096,) * 20, key_value_heads=4, group=16, head_size=192,
        value_size=128, page=128, spare_slots=0, window=(32, 16, 64), k=16, scale=0.088388,
        hostile=False,
    ),
}  # fmt: skip

# The kernels round probabilities to the inputs' dtype before they meet the values.
TOLERANCE = {"bfloat16": 8e-3, "float16": 1.2e-3}
STEP = Step(
    replace(
        Step().original, dtype="bfloat16", lengths=(8192,) * 16, key_value_heads=4, group=16,
        head_size=192, value_size=128, page=128, k=16, window=512, hostile=False,
    ),
    compressed_page=128,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _real_cann():
    if StandIn.loaded:
        pytest.skip("the stand-in for CANN is loaded; run `pytest -m ascend_hw` by itself")
    for operator in OPERATORS.values():
        reason = ascend.unavailable(operator, "cpu")
        if reason is not None:
            pytest.fail(f"{operator.name}: {reason}")


class TestCompressAttention(CompressAttentionContract):
    implementation = "ascend"
    domain = CANN
    fails_on_faults = True
    attention_tolerance = TOLERANCE


class TestSelectAttention(test_ascend_select.Contract):
    """Heads choose different blocks here, and what they read is gathered for each apart."""

    implementation = "ascend"
    fails_on_faults = True

    @pytest.fixture(autouse=True)
    def _tolerance(self, monkeypatch):
        monkeypatch.setattr(select_attention.calls, "ATTENTION_TOLERANCE", TOLERANCE)

    test_any_legal_call = test_ascend_select.TestHostRoute.test_any_legal_call


class TestCompress(test_ascend_compress.Contract):
    implementation = "ascend"
    changes = test_ascend_compress.HOST
    fails_on_faults = True

    test_any_legal_call = test_ascend_compress.TestHostRoute.test_any_legal_call


@pytest.mark.parametrize("name", test_ascend_step.HOST)
def test_step(name):
    step = test_ascend_step.HOST[name]
    arguments = arguments_of(step)
    run, arrays = step_of(arguments, "ascend")
    assert_is_the_sum(*jax.jit(run)(*arrays), step, arguments)


def test_whose_blocks_the_heads_read(capsys):
    """Reports it. If each its own, more than one key/value head could be served under a plugin."""
    names = {"runtime": "libascendcl.so", "tensors": "libnnopbase.so", "operators": "libopapi.so"}
    cann = types.SimpleNamespace(**{role: ctypes.CDLL(name) for role, name in names.items()})
    values = test_ascend_rules.values_of_two_heads(cann)
    assert values in ([1, 1], [1, 2])
    with capsys.disabled():
        print(f"\nheads read blocks of {'the first' if values == [1, 1] else 'their own'}")


def test_memory_goes_back_and_calls_may_follow():
    for _ in range(3):
        arguments = build(Geometry(dtype="bfloat16", k=1))
        nsa_compress_attention_infer(**arguments, implementation="ascend")
        native.module().ascend_release()


@pytest.mark.parametrize("name", EXAMPLES)
def test_report_times(name, capsys):
    """Reports the median time of a call, arrays on the host; asserts nothing about it."""
    arguments = build(EXAMPLES[name])
    arrays = {n: jnp.asarray(v) if isinstance(v, np.ndarray) else v for n, v in arguments.items()}
    report(
        capsys, name, lambda implementation: nsa_compress_attention_infer(
            **arrays, implementation=implementation
        ),
    )  # fmt: skip


def test_report_times_of_a_step(capsys):
    arguments = arguments_of(STEP)
    steps = {}
    for implementation in ("cpu", "ascend"):
        run, arrays = step_of(arguments, implementation)
        steps[implementation] = jax.jit(run), arrays
    report(capsys, "a step", lambda implementation: steps[implementation][0](
        *steps[implementation][1]
    ))  # fmt: skip


def report(capsys, name, call):
    """Prints the median time of `call(implementation)`."""
    milliseconds = {}
    for implementation in ("cpu", "ascend"):
        times = []
        for _ in range(23):
            start = time.perf_counter()
            jax.block_until_ready(call(implementation))
            times.append(1e3 * (time.perf_counter() - start))
        milliseconds[implementation] = round(float(np.median(times[3:])), 3)
    with capsys.disabled():
        print(f"\n{name}, median of 20 calls in ms: {json.dumps(milliseconds)}")
