"""What is particular to the Ascend route, on the stand-in for CANN.

What it refuses and when, what it keeps and copies, on which device, and how it is chosen.
"""

from __future__ import annotations

import ctypes
import re
import threading
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ascend.device_route import DEVICE, DeviceRoute
from compress_attention import oracle
from compress_attention.agreement import assert_agrees
from compress_attention.problems import Geometry, build
from domain import ATTENTION_TOLERANCE

from jax_nsa import backends, native, nsa_compress_attention_infer
from jax_nsa.backends import ascend
from jax_nsa.blocks import Blocks
from jax_nsa.compress_attention.door import OPERATOR
from jax_nsa.compress_attention.problem import Problem

pytest_plugins = ("ascend.fixtures",)

USUAL = Geometry(
    dtype="bfloat16", lengths=(150, 33, 97), page=16, k=8, group=4, head_size=24, value_size=12
)
LAUNCHES = "launches libopapi.so"

TARGET, HOST_TARGET = "jax_nsa_compress_attention_ascend", "jax_nsa_compress_attention_ascend_host"


@pytest.fixture(autouse=True)
def _fresh(standin):
    native.module().ascend_release()
    yield
    native.module().ascend_release()
    live = standin.live()
    assert not any(live[kind] for kind in live if kind != "stream")


@pytest.fixture(params=["ascend", DeviceRoute.NAME])
def implementation(request, harness):
    """Both routes."""
    return request.param


def call(arguments, implementation="ascend"):
    """Calls the operator with arrays, as values that only the run knows."""
    arrays = {n: jnp.asarray(v) if isinstance(v, np.ndarray) else v for n, v in arguments.items()}
    return jax.block_until_ready(
        nsa_compress_attention_infer(**arrays, implementation=implementation)
    )


def check(arguments, implementation="ascend"):
    """Asserts that a call agrees with the oracle."""
    results = call(arguments, implementation)
    tolerance = ATTENTION_TOLERANCE[results[0].dtype.name]
    assert_agrees(results, oracle.compress_attention(**arguments), attention_tolerance=tolerance)


def assert_refused(standin, arguments, implementation, *messages):
    """Asserts that a call fails with all messages before anything reaches the operator."""
    asked = standin.counter("aclnnNsaCompressAttentionInferGetWorkspaceSize")
    with pytest.raises((ValueError, NotImplementedError, jax.errors.JaxRuntimeError)) as failure:
        call(arguments, implementation)
    for message in messages:
        assert message in str(failure.value)
    assert standin.counter("aclnnNsaCompressAttentionInferGetWorkspaceSize") == asked


class TestRefusals:
    """Each limit of CANN's kernel is refused by its name, before anything is launched."""

    def test_float32(self, standin, implementation):
        arguments = build(replace(USUAL, dtype="float32"))
        assert_refused(standin, arguments, implementation, "bfloat16 and float16, got float32")

    def test_log_sum_exp(self, standin, implementation):
        arguments = build(replace(USUAL, return_lse=True))
        assert_refused(standin, arguments, implementation, "return_lse")

    def test_length_zero(self, standin, implementation):
        arguments = build(USUAL)
        arguments["actual_cmp_seq_kvlen"][1] = 0
        assert_refused(
            standin, arguments, implementation,
            "actual_cmp_seq_kvlen[1] = 0", "1 to 8192 compressed positions",
        )  # fmt: skip

    def test_length_above_8192(self, standin, implementation):
        geometry = replace(
            USUAL, lengths=(8, 8193), page=128, window=(16, 16, 128), key_value_heads=1, group=1,
            head_size=1, value_size=1, k=1,
        )  # fmt: skip
        assert_refused(
            standin, build(geometry), implementation,
            "actual_cmp_seq_kvlen[1] = 8193", "1 to 8192 compressed positions",
        )  # fmt: skip

    def test_length_of_8192(self, implementation):
        geometry = replace(
            USUAL, lengths=(8192,), page=128, window=(16, 16, 128), key_value_heads=1, group=1,
            head_size=1, value_size=1, k=1,
        )  # fmt: skip
        check(build(geometry), implementation)

    def test_more_than_4096_blocks(self, standin, implementation):
        geometry = replace(
            USUAL, lengths=(4097,), page=128, window=(16, 16, 16), key_value_heads=1, group=1,
            head_size=1, value_size=1, k=1,
        )  # fmt: skip
        assert_refused(standin, build(geometry), implementation, "4097 select blocks", "4096")
        check(build(replace(geometry, lengths=(4096,))), implementation)

    def test_more_selected_than_the_smallest_has_blocks(self, standin, implementation):
        arguments = build(replace(USUAL, k=10))  # 33 positions make 9 blocks
        assert_refused(
            standin, arguments, implementation,
            "actual_cmp_seq_kvlen[1] = 33", "9 select blocks, fewer than select_block_count (10)",
        )  # fmt: skip

    def test_more_selected_than_any_has_blocks(self, standin, implementation):
        assert_refused(
            standin, build(replace(USUAL, k=1000)), implementation, "select_block_count = 1000"
        )

    @pytest.mark.parametrize("count", [0, 5])
    def test_token_counts(self, standin, implementation, count):
        arguments = build(replace(USUAL, token_counts=(2, count, 1)))
        assert_refused(
            standin, arguments, implementation,
            f"actual_seq_qlen[1] = {count}", "1 to 4 query tokens",
        )  # fmt: skip

    def test_five_batched_tokens(self, standin, implementation):
        arguments = build(replace(USUAL, layout="BSND", tokens=5))
        assert_refused(standin, arguments, implementation, "at most 4 query tokens", "got 5")

    def test_more_than_10000_sequences(self, standin, implementation):
        geometry = replace(
            USUAL, lengths=(1,) * 10_001, key_value_heads=1, group=1, head_size=1, value_size=1,
            k=1, shared_pages=True, hostile=False,
        )  # fmt: skip
        assert_refused(standin, build(geometry), implementation, "10000 sequences, got 10001")

    def test_pages_outside_the_pool(self, standin, implementation):
        arguments = build(USUAL)
        arguments["block_table"][2, 3] = 1000
        assert_refused(standin, arguments, implementation, "block_table[2, 3]", "got 1000")

    @pytest.mark.parametrize(
        ("length", "message"),
        [(0, "actual_cmp_seq_kvlen[1] = 0"), (8, "actual_cmp_seq_kvlen[1] = 8 with 3")],
    )
    def test_host_lengths_when_traced(self, length, message):
        """What the program's constants tell is refused when it is traced."""
        arguments = build(USUAL)
        arguments["actual_cmp_seq_kvlen"][1] = length
        query = jnp.asarray(arguments.pop("query"))
        with pytest.raises(NotImplementedError, match=re.escape(message)):
            jax.jit(
                lambda q: nsa_compress_attention_infer(q, **arguments, implementation="ascend")
            ).lower(query)

    def test_refusals_name_every_implementation(self):
        with pytest.raises(NotImplementedError, match='implementation="cuda"') as failure:
            call(build(replace(USUAL, dtype="float32")), ("cuda", "ascend"))
        assert 'implementation="ascend": CANN' in str(failure.value)


class TestMemory:
    """What is kept between calls, and what is copied."""

    def allocations(self, standin):
        names = "device allocations", "pinned allocations", "aclrtCreateStream"
        return [standin.counter(name) for name in names]

    @pytest.mark.parametrize("masked", [False, True])
    def test_warm_calls_allocate_nothing(self, standin, implementation, masked):
        geometry = replace(USUAL, token_counts=(3, 1, 4), masked=masked)
        arguments = build(geometry)
        call(arguments, implementation)
        harness = implementation == DeviceRoute.NAME  # which has operands and results of its own
        operands = 7 + 2 * masked + 2 if harness else 0
        before = self.allocations(standin)
        for _ in range(3):
            call(arguments, implementation)
        device, pinned, streams = np.subtract(self.allocations(standin), before)
        assert (device, pinned, streams) == (3 * operands, 0, 0)

    def test_a_growing_sequence_rarely_allocates(self, standin):
        geometry = replace(USUAL, lengths=(64,), k=1, group=1, key_value_heads=1)
        counts = []
        for length in range(64, 1024, 64):
            check(build(replace(geometry, lengths=(length,))))
            counts.append(self.allocations(standin)[0])
        assert len(set(counts)) <= 8 < len(counts)

    def test_only_the_pages_needed_are_copied(self, standin):
        arguments = build(replace(USUAL, lengths=(40, 7), k=1))
        few = self.bytes_to_device(standin, arguments)
        for name in ("key", "value"):
            unneeded = np.full((500, *arguments[name].shape[1:]), np.nan, arguments[name].dtype)
            arguments[name] = np.concatenate([arguments[name], unneeded])
        assert self.bytes_to_device(standin, arguments) == few
        pages, page_bytes = 4, 16 * 2 * (24 + 12) * 2
        assert pages * page_bytes <= few <= pages * page_bytes + 4 * 512

    def test_a_shared_page_is_copied_once(self, standin):
        arguments = build(replace(USUAL, lengths=(160, 160), k=1, hostile=False))
        apart = self.bytes_to_device(standin, arguments)
        arguments["block_table"][1] = arguments["block_table"][0]
        check(arguments)
        shared = self.bytes_to_device(standin, arguments)
        assert apart - shared == 10 * 16 * 2 * (24 + 12) * 2

    def test_rows_that_nobody_reads_reach_the_device_as_zeros(self, standin):
        """A kernel may multiply them by zero, which a NaN would survive."""
        arguments = build(replace(USUAL, lengths=(33, 20), k=1))
        assert np.isnan(arguments["key"].astype(np.float32)).any()
        before = standin.counter("values in the pools that are not finite")
        check(arguments)
        assert standin.counter("values in the pools that are not finite") == before

    def bytes_to_device(self, standin, arguments):
        before = standin.counter("bytes to device")
        call(arguments)
        return standin.counter("bytes to device") - before

    def test_one_wait_for_a_host_call(self, standin):
        arguments = build(USUAL)
        call(arguments)
        before = standin.counter("aclrtSynchronizeStream")
        call(arguments)
        assert standin.counter("aclrtSynchronizeStream") == before + 1

    @pytest.mark.parametrize(("form", "waits"), [("traced", 1), ("constant", 0)])
    def test_waits_of_a_device_call(self, standin, harness, form, waits):
        """Lengths that are constants of the program cost no wait for the stream."""
        arguments = build(USUAL)
        lengths = arguments.pop("actual_cmp_seq_kvlen")
        arrays = {n: jnp.asarray(arguments.pop(n)) for n in ("query", "key", "value")}
        operator = jax.jit(
            lambda lengths, **arrays: nsa_compress_attention_infer(
                **arrays, **arguments, implementation=DeviceRoute.NAME,
                actual_cmp_seq_kvlen=lengths if form == "traced" else [150, 33, 97],
            )
        )  # fmt: skip
        jax.block_until_ready(operator(jnp.asarray(lengths), **arrays))
        before = standin.counter("aclrtSynchronizeStream")
        jax.block_until_ready(operator(jnp.asarray(lengths), **arrays))
        harness_waits = 1
        assert standin.counter("aclrtSynchronizeStream") - before - harness_waits == waits

    def test_growing_waits_for_what_still_runs(self, harness):
        """A launch returns at once: memory it uses may not go for a larger call's sake."""

        def run(heads):
            query = np.ones((1, 1, heads, 16), np.float16)
            pool = np.ones((1, 16, 16), np.float16)
            operands = {
                "query": query, "key": pool, "value": pool,
                "block_table": np.zeros((1, 1), np.int32), "lengths": np.full(1, 8, np.int32),
            }  # fmt: skip
            problem = Problem(Blocks(32, 16, 64), 1.0, key_value_heads=1, select_block_count=2)
            call = backends.Call(
                OPERATOR, tuple(operands.values()), tuple(operands), problem,
                constants=(("lengths", (8,)),),
            )  # fmt: skip
            attention, indices = harness.run(call, [*operands.values()], call.results())
            np.testing.assert_array_equal(attention, np.ones_like(attention))
            assert indices.tolist() == [[[[0, 1]]]]

        def larger():
            harness.on_exit = None
            run(heads=64)

        harness.on_exit = larger
        run(heads=1)

    def test_release_gives_everything_back(self, standin):
        streams, executors = standin.live()["stream"], standin.counter("live executor")
        call(build(USUAL))
        assert standin.counter("live executor") == executors
        assert standin.live()["stream"] == streams + 1
        assert standin.live()["device memory"] > 0
        native.module().ascend_release()
        live = standin.live()
        assert live.pop("stream") == streams
        assert not any(live.values())
        check(build(USUAL))  # calls may follow


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
