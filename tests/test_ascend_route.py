"""On which device a call to CANN runs, on whose threads, and when the route is taken."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ascend.compressed import USUAL, call, check
from ascend.device_route import DEVICE, DeviceRoute
from compress_attention import oracle
from compress_attention.agreement import assert_agrees
from compress_attention.problems import build
from domain import ATTENTION_TOLERANCE

from jax_nsa import backends, native, nsa_compress_attention_infer
from jax_nsa.backends import ascend

pytest_plugins = ("ascend.fixtures",)

pytestmark = pytest.mark.usefixtures("fresh")

LAUNCHES = "launches libopapi.so"
TARGET, HOST_TARGET = "jax_nsa_compress_attention_ascend", "jax_nsa_compress_attention_ascend_host"


class TestDevices:
    """The device of a call, and whose threads it runs on."""

    def test_chosen_by_the_environment(self, standin, monkeypatch):
        monkeypatch.setenv(ascend.DEVICE_VARIABLE, "1")
        arguments = build(replace(USUAL, seed=1))
        jax.clear_caches()
        check(arguments)
        monkeypatch.setenv(ascend.DEVICE_VARIABLE, "5")
        jax.clear_caches()
        with pytest.raises(jax.errors.JaxRuntimeError, match="aclrtSetDevice failed with status"):
            call(arguments)
        monkeypatch.delenv(ascend.DEVICE_VARIABLE)
        jax.clear_caches()
        check(arguments)

    def test_the_threads_own_device_is_put_back(self, standin):
        standin.runtime.aclrtSetDevice(DEVICE)
        call(build(USUAL))  # small: runs on the calling thread
        current = ctypes.c_int32(-1)
        assert standin.runtime.aclrtGetDevice(ctypes.byref(current)) == 0
        assert current.value == DEVICE

    def test_xla_names_the_device_to_a_thread_without_one(self, harness):
        harness.in_new_thread = True
        try:
            check(build(USUAL), DeviceRoute.NAME)
        finally:
            harness.in_new_thread = False

    def test_many_threads(self, standin):
        geometries = [replace(USUAL, seed=s, lengths=(150 - 9 * s, 33, 97)) for s in range(6)]
        problems = [build(g) for g in geometries]
        errors = []

        def work(arguments):
            try:
                for _ in range(5):
                    check(arguments)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(p,)) for p in problems]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []

    def test_many_calls_of_one_program(self):
        arguments = build(USUAL)
        first = arguments.pop("actual_cmp_seq_kvlen")
        lengths = [jnp.asarray(first - i) for i in range(4)]

        @jax.jit
        def several(lengths):
            return [
                nsa_compress_attention_infer(
                    **arguments, actual_cmp_seq_kvlen=each, implementation="ascend"
                )
                for each in lengths
            ]

        for each, results in zip(lengths, several(lengths), strict=True):
            step = {**arguments, "actual_cmp_seq_kvlen": np.asarray(each)}
            expected = oracle.compress_attention(**step)
            assert_agrees(results, expected, attention_tolerance=ATTENTION_TOLERANCE["bfloat16"])


class TestSelection:
    """When the route is taken."""

    def test_host_jax_stays_on_its_own_kernel_unasked(self, standin):
        before = standin.counter(LAUNCHES)
        call(build(USUAL), implementation=None)
        assert standin.counter(LAUNCHES) == before

    def test_asked_by_the_environment(self, standin, monkeypatch):
        monkeypatch.setenv(backends.IMPLEMENTATION_VARIABLE, "ascend")
        before = standin.counter(LAUNCHES)
        call(build(USUAL), implementation=None)
        assert standin.counter(LAUNCHES) == before + 1

    def lowered(self, platform, implementation, *, constant_lengths=False):
        """The program for a platform that need not be there."""
        arguments = build(USUAL)
        if not constant_lengths:
            arguments["actual_cmp_seq_kvlen"] = jnp.asarray(arguments["actual_cmp_seq_kvlen"])
        query = jnp.asarray(arguments.pop("query"))
        traced = jax.jit(
            lambda q: nsa_compress_attention_infer(q, **arguments, implementation=implementation)
        ).trace(query)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    @pytest.mark.parametrize("implementation", [None, "ascend"])
    def test_default_on_an_ascend_platform(self, implementation):
        program = self.lowered("ascend", implementation)
        assert f"@{TARGET}(" in program
        assert "host_lengths = dense<> : tensor<0xi64>" in program

    def test_constant_lengths_are_in_the_program(self):
        program = self.lowered("ascend", None, constant_lengths=True)
        assert "host_lengths = dense<[150, 33, 97]> : tensor<3xi64>" in program

    def test_host_jax_has_a_target_of_its_own(self):
        program = self.lowered("cpu", "ascend")
        assert f"@{HOST_TARGET}(" in program
        assert "device = 0 : i64" in program

    def test_xla_reads_the_attributes(self):
        """As far as a platform that has no Ascend stream shows: nothing but that is missing."""
        _, handler = native.module().registrations()["ascend"][TARGET]
        jax.ffi.register_ffi_target("ascend_attributes", handler, platform="cpu")
        call = jax.ffi.ffi_call("ascend_attributes", jax.ShapeDtypeStruct((1,), np.float32))
        with pytest.raises(Exception, match=r"[Ss]tream"):
            call(problem={"scale": np.float32(1)}, host_lengths=np.asarray([3, 3], np.int64))

    def test_other_platforms_have_none(self):
        with pytest.raises(NotImplementedError, match="runs on platform cpu or ascend"):
            self.lowered("cuda", "ascend")

    def test_what_cann_cannot_do_falls_to_the_reference(self, harness):
        arguments = build(replace(USUAL, dtype="float32"))
        query = jnp.asarray(arguments.pop("query"))
        traced = jax.jit(lambda q: nsa_compress_attention_infer(q, **arguments)).trace(query)
        assert "custom_call" not in traced.lower(lowering_platforms=("ascend",)).as_text()
