"""The whole decode step on CANN's operators, composed of them, on the stand-in for CANN."""

from __future__ import annotations

import functools
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
    )
    for name, step in HOST.items()
    if step.window_page is None
}
LAUNCHES = ("aclnnNsaCompressAttentionInfer", "aclnnNsaSelectedAttentionInfer")
STATUS = 507899
FAILING = (
    "aclrtMemcpyAsync", "aclrtSynchronizeStream", "aclCreateTensor", "aclCreateIntArray",
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


@pytest.mark.parametrize("function", FAILING)
def test_each_call_of_a_step_fails(standin, function):
    """A cold step tells which call failed, leaves nothing, and the next one is right to the bit."""
    run, arrays = step_of(arguments_of(USUAL), "ascend")
    step = jax.jit(run)
    expected = jax.block_until_ready(step(*arrays))
    release = native.module().ascend_release
    release()
    streams = standin.live()["stream"]
    before = standin.counter(function)
    jax.block_until_ready(step(*arrays))
    calls = standin.counter(function) - before
    assert calls >= len(LAUNCHES) or function.startswith(LAUNCHES)
    for nth in range(1, calls + 1):
        release()
        standin.plan_fault(function, STATUS, call=nth)
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=function):
            jax.block_until_ready(step(*arrays))
        assert standin.clear_faults() == 0
        release()
        live = standin.live()
        assert live.pop("stream") == streams
        assert not any(live.values()), live
        for result, want in zip(step(*arrays), expected, strict=True):
            np.testing.assert_array_equal(np.asarray(result), np.asarray(want))


@pytest.mark.parametrize(("form", "waits"), [("traced", 1), ("constant", 0)])
def test_waits_of_a_step_on_the_device(standin, harness, form, waits):
    """Lengths that are constants of the program cost no wait, others one for each run.

    Chosen blocks are not why: what comes to the host is the compressed branch's table and lengths.
    """
    arguments = arguments_of(DEVICE["one token"])
    run, arrays = step_of(arguments, DeviceRoute.NAME)
    if form == "constant":
        names = ("compressed", "selected")
        caches = {
            name: replace(cache, lengths=arguments[name].lengths)
            for name, cache in zip(names, arrays[2:4], strict=True)
        }
        step = functools.partial(_with_lengths, run, caches)
    else:
        step = run
    step = jax.jit(step)
    jax.block_until_ready(step(*arrays))
    counters = ("aclrtSynchronizeStream", "bytes to host")
    before = [standin.counter(name) for name in counters]
    jax.block_until_ready(step(*arrays))
    waited, fetched = (standin.counter(n) - b for n, b in zip(counters, before, strict=True))
    harness_waits = 3
    assert waited - harness_waits == waits
    table, lengths = arguments["compressed"].block_table, arguments["compressed"].lengths
    assert fetched == (0 if form == "constant" else 4 * (np.size(table) + waits * len(lengths)))


def _with_lengths(run, caches, *arrays):
    """The step with lengths that the host knows."""
    query, gates, *given = arrays
    known = [
        replace(cache, lengths=caches[name].lengths)
        for cache, name in zip(given, caches, strict=True)
    ]
    return run(query, gates, *known)
