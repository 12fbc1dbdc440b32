"""The whole decode step on CANN's operators, on the stand-in for CANN: both routes."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from ascend.device_route import DeviceRoute
from step.problems import Step, arguments_of
from test_step import assert_is_the_sum, step_of

from jax_nsa import native

pytest_plugins = ("ascend.fixtures",)

USUAL = Step(replace(Step().original, dtype="bfloat16", lengths=(300, 200), k=2))
TOKENS = Step(replace(USUAL.original, layout="BSND", tokens=3, token_counts=(3, 1)))
HOST = {
    "one token": USUAL,
    "tokens and rows without one": TOKENS,
    "a window of its own": replace(USUAL, window_page=48),
}
# What CANN's kernels take where nothing is gathered for them.
DEVICE = {
    name: replace(
        step,
        original=replace(step.original, key_value_heads=1, head_size=192, value_size=128, page=64),
        window_page=step.window_page and 64,
    )
    for name, step in (
        *HOST.items(),
        ("packed", Step(replace(USUAL.original, token_counts=(2, 3)))),
        # The last window ends with its sequence, so that tokens before do not see it.
        ("tokens that see less", Step(replace(USUAL.original, lengths=(480, 672), layout="BSND",
                                              tokens=4))),
    )
}  # fmt: skip
LAUNCHES = ("aclnnNsaCompressAttentionInfer", "aclnnNsaSelectedAttentionInfer")
STATUS = 507899
CREATED = ("aclCreateTensor", "aclCreateIntArray")
FAILING = (
    "aclrtMemcpyAsync", "aclrtSynchronizeStream", "aclrtMalloc", "aclrtMallocHost",
    *CREATED, "aclDestroyTensor", "aclDestroyIntArray",
    *(name for launch in LAUNCHES for name in (launch, f"{launch}GetWorkspaceSize")),
)  # fmt: skip


def launches(standin):
    return [standin.counter(f"launches of {function}") for function in LAUNCHES]


@pytest.mark.parametrize("name", HOST)
def test_host_route(standin, name):
    """The chosen blocks and the window are one run where they read one cache."""
    arguments = arguments_of(HOST[name])
    run, arrays = step_of(arguments, "ascend")
    before = launches(standin)
    assert_is_the_sum(*jax.jit(run)(*arrays), HOST[name], arguments)
    runs = 2 if HOST[name].window_page else 1
    assert launches(standin) == [before[0] + 1, before[1] + runs]


@pytest.mark.parametrize("name", DEVICE)
def test_device_route(standin, harness, name):
    arguments = arguments_of(DEVICE[name])
    run, arrays = step_of(arguments, DeviceRoute.NAME)
    before = launches(standin)
    assert_is_the_sum(*jax.jit(run)(*arrays), DEVICE[name], arguments)
    assert launches(standin) == [before[0] + 1, before[1] + 2]


class TestEachCallFails:
    """A cold step tells which call failed, leaves nothing, and the next is right to the bit."""

    @pytest.mark.parametrize("function", FAILING)
    def test_on_the_host(self, standin, function):
        run, arrays = step_of(arguments_of(USUAL), "ascend")
        step = jax.jit(run)
        expected = jax.block_until_ready(step(*arrays))
        native.module().ascend_release()
        streams, before = standin.live()["stream"], standin.counter(function)
        jax.block_until_ready(step(*arrays))
        calls = standin.counter(function) - before
        assert calls >= len(LAUNCHES) or function.startswith(LAUNCHES)

        def plan(nth):
            standin.plan_fault(function, STATUS, call=nth)

        self.fail_each(standin, lambda: step(*arrays), expected, function, calls, streams, plan)

    @pytest.mark.parametrize("function", [*FAILING, "aclrtMemsetAsync"])
    def test_on_the_device(self, standin, harness, function):
        """All of the step's calls are in one handler; the harness's own come before and after."""
        run, arrays = step_of(arguments_of(DEVICE["tokens and rows without one"]), DeviceRoute.NAME)
        step = jax.jit(run)
        expected = jax.block_until_ready(step(*arrays))
        native.module().ascend_release()
        counts = []
        harness.on_entry = harness.on_exit = lambda: counts.append(standin.counter(function))
        jax.block_until_ready(step(*arrays))
        harness.on_exit = None
        before, after = counts
        assert after > before

        def plan(nth):
            harness.on_entry = lambda: standin.plan_fault(function, STATUS, call=nth)

        def call():
            try:
                return jax.block_until_ready(step(*arrays))
            finally:
                harness.on_entry = None

        self.fail_each(standin, call, expected, function, after - before, 1, plan)

    def fail_each(self, standin, step, expected, function, calls, streams, plan):
        for nth in range(1, calls + 1):
            native.module().ascend_release()
            plan(nth)
            with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=function):
                jax.block_until_ready(step())
            assert standin.clear_faults() == 0
            native.module().ascend_release()
            live = standin.live()
            assert live.pop("stream") == streams
            assert not any(live.values()), live
            for result, want in zip(step(), expected, strict=True):
                np.testing.assert_array_equal(np.asarray(result), np.asarray(want))
