"""Sequences split over devices along their pages give what one device gives."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention import oracle
from compress_attention.agreement import assert_agrees
from compress_attention.problems import Geometry, build
from domain import ATTENTION_TOLERANCE, DTYPES
from jax.sharding import AxisType, PartitionSpec

from jax_nsa import nsa_compress_attention_infer

DEVICES = 4


@pytest.fixture(params=["cpu", "reference"])
def implementation(request):
    return request.param


# All blocks are selected, so that the order tells of every block's importance, also at the
# boundaries between devices.
USUAL = Geometry(
    lengths=(256, 65, 1, 0, 130), head_size=24, value_size=16, page=32, group=2, k=70,
    return_lse=True, hostile=False, spare_slots=0,
)  # fmt: skip


def split(geometry):
    """The whole sequences' arguments, and each device's pages and table columns put side by side.

    Every device has a pool of its own, in an order of its own, and names its pages from 0.
    """
    arguments = build(geometry)
    columns = -(-max(geometry.lengths) // geometry.page)
    columns = -(-columns // DEVICES) * DEVICES
    sequences = len(geometry.lengths)
    rng = np.random.default_rng(geometry.seed)
    each = sequences * columns // DEVICES
    tables = [rng.permutation(each).reshape(sequences, -1) for _ in range(DEVICES)]
    whole = np.concatenate([t + r * each for r, t in enumerate(tables)], axis=1)
    for name in ("key", "value"):
        shape = (DEVICES * each, *arguments[name].shape[1:])
        arguments[name] = rng.standard_normal(shape).astype(DTYPES[geometry.dtype])
    arguments["block_table"] = whole.astype(np.int32)
    return arguments, np.concatenate(tables, axis=1).astype(np.int32)


def context_parallel(arguments, implementation):
    """The operator over four devices, as a function of query, key, value and local tables."""
    rest = {n: v for n, v in arguments.items() if n not in ("query", "key", "value", "block_table")}

    def part(query, key, value, table):
        return nsa_compress_attention_infer(
            query, key, value, block_table=table, context_axis="context",
            implementation=implementation, **rest,
        )  # fmt: skip

    whole, pages = PartitionSpec(), PartitionSpec("context")
    return jax.jit(
        jax.shard_map(
            part,
            mesh=jax.make_mesh((DEVICES,), ("context",), axis_types=(AxisType.Auto,)),
            in_specs=(whole, pages, pages, PartitionSpec(None, "context")),
            out_specs=whole,
        )
    )


def run(geometry, implementation):
    arguments, tables = split(geometry)
    operands = [jnp.asarray(arguments[n]) for n in ("query", "key", "value")]
    results = context_parallel(arguments, implementation)(*operands, jnp.asarray(tables))
    return arguments, results


class TestContextParallel:
    @pytest.mark.parametrize(
        "window",
        [(32, 16, 64), (16, 16, 16), (128, 16, 128), (48, 32, 64), (64, 64, 64)],
        ids=str,
    )
    @pytest.mark.parametrize("name", ["float32", "bfloat16"])
    def test_agrees_with_the_oracle(self, implementation, window, name):
        arguments, results = run(replace(USUAL, window=window, dtype=name), implementation)
        tolerance = ATTENTION_TOLERANCE[name]
        expected = oracle.compress_attention(**arguments)
        assert_agrees(results, expected, attention_tolerance=tolerance)

    @pytest.mark.parametrize("window", [(48, 16, 48), (96, 16, 96), (64, 16, 112)], ids=str)
    def test_blocks_of_odd_sizes(self, implementation, window):
        stride = window[2] // window[1]
        columns = DEVICES * stride  # so that each device's positions end where a block does
        geometry = replace(USUAL, window=window, page=16, lengths=(16 * columns, 17, 100))
        arguments, results = run(geometry, implementation)
        expected = oracle.compress_attention(**arguments)
        assert_agrees(results, expected, attention_tolerance=1e-5)

    @pytest.mark.parametrize("lengths", [(65, 64, 63, 128), (129, 1, 2, 127)])
    def test_lengths_around_the_boundaries(self, implementation, lengths):
        arguments, results = run(replace(USUAL, lengths=lengths, page=16), implementation)
        expected = oracle.compress_attention(**arguments)
        assert_agrees(results, expected, attention_tolerance=1e-5)

    @pytest.mark.parametrize("layout", ["TND", "BSND"])
    # The last position is its device's first, or one of several there.
    @pytest.mark.parametrize("lengths", [(65, 64, 1), (33, 96, 97), (40, 64, 78), (51, 96, 105)])
    def test_several_tokens(self, implementation, layout, lengths):
        geometry = replace(
            USUAL, lengths=lengths, page=16, layout=layout, tokens=4, token_counts=(3, 0, 4),
            masked=True, slack=(1, 0, 2),
        )  # fmt: skip
        arguments, results = run(geometry, implementation)
        expected = oracle.compress_attention(**arguments)
        assert_agrees(results, expected, attention_tolerance=1e-5)

    def test_traffic_does_not_grow_with_the_length(self, implementation):
        """Devices exchange the attention and the blocks' importance, not pages or scores."""

        def exchanged(pages):
            geometry = replace(USUAL, lengths=(32 * pages,), dtype="bfloat16")
            arguments, tables = split(geometry)
            operands = [jnp.asarray(arguments[n]) for n in ("query", "key", "value")]
            program = context_parallel(arguments, implementation).lower(*operands, tables).compile()
            text = program.as_text()
            assert not re.search("all-gather|all-to-all|collective-permute", text)
            reduces = re.findall(r"= (.*) all-reduce(?:-start)?\(", text)
            shapes = re.findall(r"\w+\[([\d,]*)\]", " ".join(reduces))
            return sum(int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes)

        heads, key_value_heads, value_size = 4, 2, 16
        for pages in (8, 64):
            blocks = 32 * pages // 4 + 2
            # Two numbers and a flag of each head beside the attention and the importances.
            bound = heads * value_size + key_value_heads * blocks + 3 * heads
            assert 0 < exchanged(pages) <= bound

    def test_faulty_lengths(self):
        arguments, tables = split(USUAL)
        arguments["actual_cmp_seq_kvlen"] = jnp.asarray([256, -1, 257, 0, 130])
        operands = [jnp.asarray(arguments[n]) for n in ("query", "key", "value")]
        operator = context_parallel(arguments, "reference")
        attention, indices, lse = operator(*operands, jnp.asarray(tables))
        assert np.all(np.isnan(attention[1:3]))
        assert np.all(np.isnan(lse[1:3]))
        assert np.all(np.asarray(indices[1:4]) == -1)
        assert np.all(np.isfinite(attention[np.array([0, 3, 4])]))

    def test_a_faulty_page_of_one_device_spoils_its_sequence_alone(self):
        arguments, tables = split(USUAL)
        tables[0, 5] = -1
        operands = [jnp.asarray(arguments[n]) for n in ("query", "key", "value")]
        operator = context_parallel(arguments, "reference")
        attention, indices, _ = operator(*operands, jnp.asarray(tables))
        assert np.all(np.isnan(attention[0]))
        assert np.all(np.asarray(indices[0]) == -1)
        assert np.all(np.isfinite(attention[1:]))

    def test_a_nan_spoils_its_head_alone(self):
        arguments, tables = split(USUAL)
        arguments["query"][0, 0, 0] = np.nan
        operands = [jnp.asarray(arguments[n]) for n in ("query", "key", "value")]
        results = context_parallel(arguments, "reference")(*operands, jnp.asarray(tables))
        expected = nsa_compress_attention_infer(**arguments, implementation="reference")
        assert np.all(np.isnan(results[0][0, 0]))
        for result, want in zip(results, expected, strict=True):
            np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-6)

    def test_host_lengths_are_checked_against_all_devices(self):
        arguments, tables = split(USUAL)
        operands = [jnp.asarray(arguments[n]) for n in ("query", "key", "value")]
        arguments["actual_cmp_seq_kvlen"] = [257, 0, 0, 0, 0]
        with pytest.raises(ValueError, match=r"actual_cmp_seq_kvlen\[0\] must be in \[0, 256\]"):
            context_parallel(arguments, "reference")(*operands, jnp.asarray(tables))

    def test_positions_that_do_not_end_with_a_block(self):
        with pytest.raises(ValueError, match=r"multiple of .* = 3 positions, got .* 2 columns"):
            run(replace(USUAL, window=(48, 16, 48)), "reference")

    @pytest.mark.parametrize("axis", ["context", 3, ["context"], []], ids=str)
    def test_outside_shard_map(self, axis):
        arguments, _ = split(USUAL)
        query = arguments.pop("query")

        def operator(query):
            return nsa_compress_attention_infer(query, **arguments, context_axis=axis)

        for call in (operator, jax.jit(operator)):
            with pytest.raises(ValueError, match=r"context_axis must be a mesh axis .* got .*"):
                call(query)

    def test_in_double_precision_mode(self, implementation):
        with jax.enable_x64(True):
            arguments, results = run(USUAL, implementation)
        expected = oracle.compress_attention(**arguments)
        assert_agrees(results, expected, attention_tolerance=1e-5)

    def test_derivative(self):
        arguments, tables = split(USUAL)
        floats = [jnp.asarray(arguments.pop(n)) for n in ("query", "key", "value")]
        weights = np.random.default_rng(0).standard_normal((5, 4, 16)).astype(np.float32)
        parts = context_parallel(arguments, "reference")

        def whole(*floats):
            return nsa_compress_attention_infer(*floats, **arguments, implementation="reference")

        def loss(operator, *floats):
            attention, _, lse = operator(*floats)
            return (attention * weights).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()

        actual = jax.grad(lambda *f: loss(lambda *g: parts(*g, tables), *f), (0, 1, 2))(*floats)
        expected = jax.grad(lambda *f: loss(whole, *f), (0, 1, 2))(*floats)
        for one, other in zip(actual, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
