"""What the routes to CANN keep between calls, and what they copy, on the stand-in for CANN."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_ascend_compress
import test_ascend_select
from ascend.calls import COMPRESS
from ascend.compressed import USUAL, call, check
from ascend.device_route import DeviceRoute
from compress.problems import build as build_compress
from compress_attention.problems import build
from select_attention.calls import USUAL as SELECT_USUAL
from select_attention.problems import build as build_select

from jax_nsa import (
    backends,
    native,
    nsa_compress_attention_infer,
    nsa_compress_infer,
    nsa_select_attention_infer,
)
from jax_nsa.blocks import Blocks
from jax_nsa.compress_attention.door import OPERATOR
from jax_nsa.compress_attention.problem import Problem

pytest_plugins = ("ascend.fixtures",)

pytestmark = pytest.mark.usefixtures("fresh")


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
            attention, indices = harness.run(call, [*operands.values()])
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


def test_what_is_read_is_copied(standin):
    """In whole pages, of heads as large as the kernel takes, and nothing else."""
    geometry = replace(
        SELECT_USUAL,
        **test_ascend_select.HOST,
        lengths=(1000,),
        key_value_heads=2,
        k=3,
        block=64,
        window=200,
    )
    arguments = build_select(geometry)
    arguments["topk_indices"] = np.array([[[1, -1, 15], [0, 5, 0]]], np.int32)
    before = standin.counter("bytes to device")
    nsa_select_attention_infer(**arguments, implementation="ascend")
    copied = standin.counter("bytes to device") - before
    # Of the first head 64 + 40 positions, of the second 192, of the window 200 for both.
    pages = 1 + 2 + 2 * 2
    pools = pages * 128 * (192 + 128) * 2
    assert pools <= copied <= pools + 8 * 1024


def test_the_windows_that_end_are_copied_and_no_cache(standin):
    geometry = replace(
        COMPRESS, **test_ascend_compress.HOST, head_sizes=(16,), lengths=(49, 47, 80)
    )
    arguments = build_compress(geometry)
    arguments["cache"] = np.zeros((5000, 2, 16), arguments["cache"].dtype)
    before = [standin.counter(f"bytes to {where}") for where in ("device", "host")]
    nsa_compress_infer(**arguments, implementation="ascend")
    after = [standin.counter(f"bytes to {where}") for where in ("device", "host")]
    windows, row = 2, 2 * 16 * 2
    to_device, to_host = np.subtract(after, before)
    assert windows * 64 * row <= to_device <= windows * 64 * row + 3 * 1024
    assert to_host == windows * row
