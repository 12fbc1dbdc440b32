"""The Ascend route on an NPU with the real CANN: `pytest -m ascend_hw`, in a process of its own."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ascend.domain import CANN
from ascend.standin import StandIn
from contract import SEED_EXAMPLE, CompressAttentionContract
from problems import Geometry, build

from jax_nsa import native, nsa_compress_attention_infer
from jax_nsa.backends import ascend

pytestmark = pytest.mark.ascend_hw

EXAMPLES = {
    "torch_npu's example": replace(SEED_EXAMPLE, dtype="bfloat16"),
    "CANN's example": Geometry(
        dtype="float16", lengths=(4096,) * 20, key_value_heads=4, group=16, head_size=192,
        value_size=128, page=128, spare_slots=0, window=(32, 16, 64), k=16, scale=0.088388,
        hostile=False,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _real_cann():
    if StandIn.loaded:
        pytest.skip("the stand-in for CANN is loaded; run `pytest -m ascend_hw` by itself")
    reason = ascend.unavailable("cpu")
    if reason is not None:
        pytest.fail(reason)


class TestHostRoute(CompressAttentionContract):
    implementation = "ascend"
    domain = CANN
    fails_on_faults = True
    # The kernel rounds probabilities to the inputs' dtype before they meet the values.
    attention_tolerance = {"bfloat16": 8e-3, "float16": 1.2e-3}  # noqa: RUF012


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
    milliseconds = {}
    for implementation in ("cpu", "ascend"):
        times = []
        for _ in range(23):
            start = time.perf_counter()
            jax.block_until_ready(
                nsa_compress_attention_infer(**arrays, implementation=implementation)
            )
            times.append(1e3 * (time.perf_counter() - start))
        milliseconds[implementation] = round(float(np.median(times[3:])), 3)
    with capsys.disabled():
        print(f"\n{name}, median of 20 calls in ms: {json.dumps(milliseconds)}")
