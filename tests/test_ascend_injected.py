"""CANN fails: every call that the Ascend route makes, of every operator, one at a time."""

from __future__ import annotations

import concurrent.futures
import threading

import jax
import numpy as np
import pytest
from ascend.calls import FUNCTIONS, TARGETS, call
from ascend.device_route import DEVICE, DeviceRoute
from ascend.standin import StandIn

from jax_nsa import native

pytest_plugins = ("ascend.fixtures",)

STATUS = 507899
# JAX raises the one or the other, as the program is new or known.
ERRORS = (ValueError, jax.errors.JaxRuntimeError)
# Its failure is an answer: the thread has no current device.
ANSWERS = ("aclrtGetDevice",)
CREATORS = (
    "aclrtCreateStream", "aclrtMalloc", "aclrtMallocHost", "aclCreateTensor", "aclCreateIntArray",
)  # fmt: skip
OTHERS = (
    "aclrtGetDevice", "aclrtSetDevice", "aclrtSynchronizeStream", "aclrtMemcpyAsync",
    "aclDestroyTensor", "aclDestroyIntArray",
)  # fmt: skip
# (operator, function of CANN, whether it gives an object)
CALLS = [
    *((target, function, True) for target in TARGETS for function in CREATORS),
    *((target, function, False) for target in TARGETS for function in OTHERS),
    *((target, f"{name}GetWorkspaceSize", True) for target, name in FUNCTIONS.items()),
    *((target, name, False) for target, name in FUNCTIONS.items()),
    ("compress_attention", "aclrtMemsetAsync", False),
]


def call_from_a_new_thread(target):
    """Calls from a thread that has set no device."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(call, target).result()


def failure(standin, target, function, nth, *, null, call):
    """What a call says where CANN fails the nth call of a function; "" where that is no matter."""
    for _ in range(20):
        native.module().ascend_release()
        standin.plan_fault(function, STATUS, call=nth, null=null)
        text = ""
        try:
            call(target)
        except ERRORS as error:
            text = str(error)
        if standin.clear_faults() == 0:
            return text
        # XLA may run a call on a thread of its own, which has its device from an earlier call.
        assert (function, text) == ("aclrtSetDevice", "")
    raise AssertionError(f"{function} is called no {nth} times any more")


def assert_nothing_leaked(standin: StandIn, streams: int) -> None:
    native.module().ascend_release()
    live = standin.live()
    assert live.pop("stream") == streams
    assert not any(live.values()), live


def assert_same(results, expected):
    for one, other in zip(results, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("standin")
class TestHostRoute:
    @pytest.fixture(autouse=True)
    def _cold(self, standin):
        native.module().ascend_release()

    @pytest.mark.parametrize(
        ("target", "function", "null"),
        [(*each, null) for *each, gives in CALLS for null in ([False, True] if gives else [False])],
    )
    def test_each_call(self, standin, target, function, null):
        self.fail_each(standin, target, function, null=null)

    @pytest.mark.parametrize("function", ["aclrtGetDevice", "aclrtSetDevice", "aclrtMalloc"])
    def test_beside_another_user_of_cann(self, standin, function):
        """The calling thread has a device of its own, which is left and put back."""
        standin.runtime.aclrtSetDevice(DEVICE)
        self.fail_each(standin, TARGETS[0], function, null=False, call=call)

    def fail_each(self, standin, target, function, *, null, call=call_from_a_new_thread):
        streams = standin.live()["stream"]
        expected = call(target)
        native.module().ascend_release()
        before = standin.counter(function)
        call(target)
        calls = standin.counter(function) - before
        assert calls > 0
        for nth in range(1, calls + 1):
            text = failure(standin, target, function, nth, null=null, call=call)
            if text:
                assert f"injected fault in {function}" in text
                said = f"{function} returned null" if null else f"{function} failed with status"
                if function in ("aclCreateTensor", "aclCreateIntArray"):
                    said = f"{function} returned null"  # they have no status
                assert said in text
                assert null or "returned null" in text or str(STATUS) in text
            else:
                # Putting back the caller's device comes after the results.
                assert function in ANSWERS or (function == "aclrtSetDevice" and nth == calls > 1)
            assert_nothing_leaked(standin, streams)
            assert_same(call(target), expected)

    @pytest.mark.parametrize("target", TARGETS)
    def test_where_no_call_may_fail(self, standin, target, capfd):
        """CANN's failure leaves results that say so, and its words on the standard error stream."""
        expected = call(target)
        standin.plan_fault(FUNCTIONS[target], STATUS)
        results = call(target, on_fault="nan")
        assert f"{FUNCTIONS[target]} failed with status {STATUS}" in capfd.readouterr().err
        assert not all(map(np.array_equal, results, expected))
        if target != "compress":  # whose windows are not written
            assert np.all((results[0] & 0x7FFF) > 0x7F80)  # NaN

    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize(
        "function",
        ["aclrtSetDevice", "aclrtSynchronizeStream", "aclrtFree", "aclrtFreeHost",
         "aclrtDestroyStream"],
    )  # fmt: skip
    def test_release(self, standin, target, function):
        streams = standin.live()["stream"]
        call(target)
        standin.runtime.aclrtSetDevice(DEVICE)  # so that there is another device to set
        standin.plan_fault(function, STATUS)
        with pytest.raises(RuntimeError, match=f"{function} failed with status {STATUS}"):
            native.module().ascend_release()
        if function == "aclrtSetDevice":
            # Without its device a context could only be dropped; its destructor tried once more.
            standin.take_violations(expected=True)
        assert_nothing_leaked(standin, streams)
        call(target)

    def test_growing(self, standin):
        """Memory that is replaced by larger memory fails to go."""
        streams = standin.live()["stream"]
        for function in ("aclrtSynchronizeStream", "aclrtFree", "aclrtFreeHost"):
            native.module().ascend_release()
            call("compress_attention")
            standin.plan_fault(function, STATUS)
            with pytest.raises(ERRORS, match=f"{function} failed"):
                call("compress_attention", lengths=(150, 120))
            assert_nothing_leaked(standin, streams)

    @pytest.mark.parametrize("target", TARGETS)
    def test_every_call_at_once_from_many_threads(self, standin, target):
        """Errors of one call are no other's."""
        streams = standin.live()["stream"]
        call(target)
        outcomes = []

        def work():
            for _ in range(4):
                try:
                    call(target)
                    outcomes.append(True)
                except ERRORS:
                    outcomes.append(False)

        standin.plan_fault(FUNCTIONS[target], STATUS, call=3)
        standin.plan_fault("aclrtMemcpyAsync", STATUS, call=9)
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes.count(False) == 2
        assert_nothing_leaked(standin, streams)


class TestDeviceRoute:
    """The harness's own calls come first and last, so only some of all are the handlers'."""

    @pytest.fixture(autouse=True)
    def _cold(self, standin):
        native.module().ascend_release()

    @pytest.mark.parametrize(
        ("target", "function"),
        [
            (target, function)
            for target, function, _ in CALLS
            if function not in ("aclrtCreateStream", "aclrtGetDevice", "aclrtSetDevice")
        ],
    )
    def test_each_call(self, standin, harness, target, function):
        expected = call(target, DeviceRoute.NAME)
        for run, calls in enumerate(self.calls_of_handlers(standin, harness, target, function)):
            for nth in range(1, calls + 1):
                native.module().ascend_release()
                self.plan(standin, harness, function, run=run, nth=nth)
                with pytest.raises(ERRORS, match=f"injected fault in {function}"):
                    call(target, DeviceRoute.NAME)
                harness.on_entry = None
                assert standin.clear_faults() == 0
                assert_nothing_leaked(standin, streams=1)
                assert_same(call(target, DeviceRoute.NAME), expected)

    def calls_of_handlers(self, standin, harness, target, function):
        """How often each handler of a cold call calls a function of CANN."""
        counts = []
        native.module().ascend_release()
        harness.on_entry = harness.on_exit = lambda: counts.append(standin.counter(function))
        call(target, DeviceRoute.NAME)
        harness.on_entry = harness.on_exit = None
        return [after - before for before, after in zip(counts[::2], counts[1::2], strict=True)]

    def plan(self, standin, harness, function, *, run, nth):
        """Plans a fault for one of the call's handlers."""
        runs = iter(range(run + 1))

        def on_entry():
            if next(runs, None) == run:
                standin.plan_fault(function, STATUS, call=nth)

        harness.on_entry = on_entry
