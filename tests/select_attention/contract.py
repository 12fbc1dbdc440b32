"""The contract of selected and window attention that every implementation is held to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import ATTENTION_TOLERANCE
from hypothesis import given
from select_attention import oracle
from select_attention.problems import Geometry, build, geometries

from jax_nsa import nsa_select_attention_infer, nsa_window_attention_infer

FLOATS = ("query", "key", "value")
INTEGERS = ("topk_indices", "block_table", "actual_seq_kvlen", "actual_seq_qlen")
FORMS = ("eager, host values", "eager, arrays", "jit, host values", "jit, arrays")
USUAL = Geometry()
# Block-sparse decoding of released models: a block set for each key/value head.
RELEASED = {
    "D 128, blocks of a page": Geometry(
        lengths=(700,), key_value_heads=2, group=16, head_size=128, value_size=128, page=128,
        block=128, k=4, window=None,
    ),
    "D 128, blocks of 64": Geometry(
        lengths=(1000,), key_value_heads=2, group=16, head_size=128, value_size=128, page=64,
        block=64, k=12, window=None,
    ),
    "D 64, blocks of 16": Geometry(
        lengths=(600,), key_value_heads=2, group=16, head_size=64, value_size=64, page=16, block=16,
        k=16, window=128,
    ),
    "D 192, Dv 128": Geometry(
        lengths=(900, 130), key_value_heads=2, group=4, head_size=192, value_size=128, page=128,
        block=64, k=8, window=200,
    ),
}  # fmt: skip


class SelectAttentionContract:
    """What every implementation must do."""

    implementation: str
    # Whether faulty run-time values fail the call unless told otherwise.
    fails_on_faults = False

    def call(self, arguments: dict[str, Any], form: str = "eager, arrays", **options: Any) -> tuple:
        """Calls the operator with integers that are known beforehand or not."""
        traced = [n for n in FLOATS if n in arguments]
        if form.endswith("arrays"):
            traced += [n for n in INTEGERS if n in arguments]
        static = {n: v for n, v in arguments.items() if n not in traced}
        chosen = "topk_indices" in arguments
        operator = nsa_select_attention_infer if chosen else nsa_window_attention_infer

        def run(arrays: dict[str, jax.Array]) -> tuple:
            results = operator(**static, **arrays, implementation=self.implementation, **options)
            return results if isinstance(results, tuple) else (results,)

        run = jax.jit(run) if form.startswith("jit") else run
        return jax.block_until_ready(run({n: jnp.asarray(arguments[n]) for n in traced}))

    def check(self, geometry: Geometry, form: str = "eager, arrays", **changes: Any) -> tuple:
        """Asserts that a legal call agrees with the oracle; returns its results."""
        arguments = build(geometry) | changes
        results = self.call(arguments, form)
        self.assert_agrees(results, arguments)
        return results

    def assert_agrees(self, results: tuple, arguments: dict[str, Any]) -> None:
        """Asserts that results agree with the oracle's for these arguments."""
        known = {"topk_indices": None, "select_block_size": 16} | arguments
        return_lse = known.pop("return_lse", False)
        known.pop("select_block_count", None)
        known.pop("atten_mask", None)
        truth = oracle.select_attention(**known)
        query = arguments["query"]
        tolerance = ATTENTION_TOLERANCE[query.dtype.name]
        wanted = [
            (name, size)
            for name, size in zip(("attention", "window_attention"), truth.sizes, strict=True)
            if getattr(truth, name) is not None
        ]
        assert len(results) == len(wanted) * (1 + return_lse)
        for result, (name, size) in zip(results, wanted, strict=False):
            expected = getattr(truth, name)
            assert result.dtype == query.dtype
            assert result.shape == expected.shape
            shape = (*size.shape, -1)
            error = np.asarray(result, np.float64).reshape(shape) - expected.reshape(shape)
            slack = tolerance * (size + np.linalg.norm(expected.reshape(shape), axis=-1))
            slack = slack + 1e-5 * truth.score_size * size + 1e-30
            np.testing.assert_array_less(np.linalg.norm(error, axis=-1), slack + 1e-12)
        if not return_lse:
            return
        for result, (name, _) in zip(results[len(wanted) :], wanted, strict=True):
            expected = truth.lse if name == "attention" else truth.window_lse
            assert result.dtype == np.float32
            np.testing.assert_allclose(
                result, expected, rtol=1e-5, atol=1e-5 * (1 + truth.score_size.max())
            )

    # Forms, dtypes, layouts.

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_form(self, form, dtype):
        self.check(replace(USUAL, dtype=dtype, return_lse=True), form)

    @pytest.mark.parametrize("layout", ["TND", "BSND", "BSH"])
    @pytest.mark.parametrize("counts", [None, (3, 1), (0, 2)])
    @pytest.mark.parametrize("rank", [3, 4])
    def test_layout(self, layout, counts, rank):
        self.check(
            replace(
                USUAL, layout=layout, tokens=3, token_counts=counts, return_lse=True, pool_rank=rank
            )
        )

    def test_indices_without_an_axis_of_one_token(self):
        geometry = replace(USUAL, layout="BSND")
        arguments = build(geometry)
        whole = self.call(arguments)
        squeezed = self.call(arguments | {"topk_indices": arguments["topk_indices"][:, 0]})
        for a, b in zip(whole, squeezed, strict=True):
            np.testing.assert_array_equal(a, b)

    @given(geometry=geometries())
    def test_any_legal_call(self, geometry):
        self.check(geometry)

    @pytest.mark.parametrize("name", RELEASED)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_released_models(self, name, dtype):
        self.check(replace(RELEASED[name], dtype=dtype))

    @pytest.mark.parametrize("group", [1, 2, 8, 32, 128])
    @pytest.mark.parametrize("head_size", [1, 17, 64, 192])
    def test_heads(self, group, head_size):
        self.check(
            replace(
                USUAL, lengths=(70,), group=group, head_size=head_size,
                value_size=min(head_size, 128), dtype="bfloat16", return_lse=True,
            )
        )  # fmt: skip

    @pytest.mark.parametrize("page", [16, 48, 128, 256])
    @pytest.mark.parametrize("block", [16, 48, 80, 128])
    def test_pages_and_blocks_cross(self, page, block):
        self.check(replace(USUAL, lengths=(300, 257), page=page, block=block, k=4, window=70))

    # What ids may be.

    @pytest.mark.parametrize("ids", [[-1, 0, 2], [0, -1, 2], [-1, -1, -1], [2, 2, 0], [3, 3, 3]])
    def test_ids(self, ids):
        """-1 anywhere is skipped, and an id listed twice counts twice."""
        geometry = replace(USUAL, lengths=(100, 100), return_lse=True)
        arguments = build(geometry)
        arguments["topk_indices"] = np.broadcast_to(
            np.array(ids, np.int32), arguments["topk_indices"].shape
        )
        results = self.call(arguments)
        self.assert_agrees(results, arguments)
        if set(ids) == {-1}:
            np.testing.assert_array_equal(results[0], 0)
            np.testing.assert_array_equal(results[2], -np.inf)

    def test_order_does_not_matter(self):
        geometry = replace(USUAL, lengths=(200, 200), k=4)
        arguments = build(geometry)
        ids = np.array([5, 0, 3, 1], np.int32)
        shape = arguments["topk_indices"].shape
        one, other = (
            self.call(arguments | {"topk_indices": np.broadcast_to(i, shape)})[0]
            for i in (ids, np.sort(ids))
        )
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)

    def test_every_head_has_its_own_ids(self):
        geometry = replace(USUAL, lengths=(200,), key_value_heads=3, k=1, window=None)
        arguments = build(geometry)
        arguments["topk_indices"] = np.array([[[0], [3], [6]]], np.int32)
        self.assert_agrees(self.call(arguments), arguments)

    def test_blocks_wholly_past_a_token(self):
        """The first of four tokens does not see the block that the last three are in."""
        geometry = replace(USUAL, lengths=(67,), token_counts=(4,), k=1, return_lse=True)
        arguments = build(geometry)
        arguments["topk_indices"] = np.full((4, geometry.key_value_heads, 1), 2, np.int32)
        results = self.call(arguments)
        self.assert_agrees(results, arguments)
        np.testing.assert_array_equal(np.asarray(results[0])[0], 0)
        assert np.all(np.asarray(results[0])[1:] != 0)

    def test_all_blocks_are_dense_attention_and_so_is_a_long_window(self):
        geometry = replace(USUAL, lengths=(150,), k=5, window=150, dtype="float32")
        arguments = build(geometry)
        arguments["topk_indices"] = np.broadcast_to(np.arange(5, dtype=np.int32), (1, 2, 5))
        selected, window = self.call(arguments)
        np.testing.assert_allclose(selected, window, rtol=1e-5, atol=1e-6)
        self.assert_agrees((selected, window), arguments)

    @pytest.mark.parametrize("lengths", [(1, 1), (0, 5), (16, 32), (33, 15)])
    def test_short_sequences(self, lengths):
        self.check(replace(USUAL, lengths=lengths, window=500, return_lse=True))

    def test_more_tokens_than_length(self):
        """The first tokens see nothing."""
        self.check(replace(USUAL, lengths=(2, 40), token_counts=(4, 4), return_lse=True))

    def test_one_long_sequence(self):
        self.check(replace(USUAL, lengths=(9000,), k=40, window=3000, page=64, block=64))

    def test_mask_changes_nothing(self):
        arguments = build(USUAL)
        plain = self.call(arguments)
        masked = self.call(arguments | {"atten_mask": np.ones((1, 1), bool)})
        for a, b in zip(plain, masked, strict=True):
            np.testing.assert_array_equal(a, b)

    # Transformations.

    def test_vmap(self):
        geometries_ = [replace(USUAL, seed=seed) for seed in range(3)]
        each = [build(g) for g in geometries_]
        names = [*FLOATS, "topk_indices", "block_table", "actual_seq_kvlen"]
        stacked = {n: jnp.stack([a[n] for a in each]) for n in names}
        static = {n: v for n, v in each[0].items() if n not in names}

        def run(arrays):
            return nsa_select_attention_infer(
                **static, **arrays, implementation=self.implementation
            )

        for index, arguments in enumerate(each):
            self.assert_agrees(tuple(r[index] for r in jax.vmap(run)(stacked)), arguments)

    def test_vmap_over_queries_of_shared_pools(self):
        arguments = build(replace(USUAL, token_counts=(2, 1)))
        queries = np.stack([arguments["query"], -arguments["query"]])
        static = {n: v for n, v in arguments.items() if n != "query"}

        def run(query):
            return nsa_select_attention_infer(query, **static, implementation=self.implementation)

        results = jax.vmap(run)(queries)
        for index, query in enumerate(queries):
            self.assert_agrees(tuple(r[index] for r in results), arguments | {"query": query})

    def test_no_sequences(self):
        arguments = build(USUAL)
        for name in ("query", "topk_indices", "block_table", "actual_seq_kvlen"):
            arguments[name] = arguments[name][:0]
        attention, window = self.call(arguments)
        assert attention.shape == window.shape == (0, 4, 8)

    # Faulty values that only the running program can see.

    @pytest.mark.parametrize(
        ("name", "index", "value", "message"),
        [
            ("actual_seq_kvlen", 1, -1, "actual_seq_kvlen[1] must be in [0, 128]"),
            ("actual_seq_kvlen", 1, 129, "actual_seq_kvlen[1] must be in [0, 128]"),
            ("block_table", (1, 2), -1, "block_table[1, 2] must be in [0, 12)"),
            ("block_table", (1, 2), 12, "block_table[1, 2] must be in [0, 12)"),
            ("topk_indices", (1, 0, 1), -2, "topk_indices[1, 0, 1] must be in [-1, 1]"),
            ("topk_indices", (1, 1, 2), 2, "topk_indices[1, 1, 2] must be in [-1, 1]"),
            ("topk_indices", (1, 1, 2), 2**31 - 1, "topk_indices[1, 1, 2] must be in [-1, 1]"),
        ],
    )
    def test_faults(self, name, index, value, message):
        geometry = replace(USUAL, return_lse=True)
        arguments = build(geometry)
        truth = self.call(arguments)
        arguments[name] = arguments[name].copy()
        arguments[name][index] = value
        if self.fails_on_faults:
            with pytest.raises((jax.errors.JaxRuntimeError, ValueError)) as caught:
                self.call(arguments, "jit, arrays")
            assert message in str(caught.value)
        results = self.call(arguments, "jit, arrays", on_fault="nan")
        for result, right in zip(results, truth, strict=True):
            np.testing.assert_array_equal(result[0], right[0])
            spoilt = np.isnan(np.asarray(result)[1])
            if name == "topk_indices":
                head = index[1]
                assert np.all(spoilt[2 * head : 2 * head + 2])
                assert not np.any(spoilt[2 * (1 - head) : 2 * (1 - head) + 2])
            else:
                assert np.any(spoilt)

    def test_lengths_past_the_block_table(self):
        """They are faults also where each entry of the table is a page."""
        arguments = build(replace(USUAL, spare_slots=0, hostile=False))
        truth = self.call(arguments)
        capacity = arguments["block_table"].shape[1] * arguments["page_block_size"]
        arguments["actual_seq_kvlen"] = np.array([100, capacity + 1], np.int32)
        if self.fails_on_faults:
            with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="actual_seq_kvlen"):
                self.call(arguments, "jit, arrays")
        for result, right in zip(
            self.call(arguments, "jit, arrays", on_fault="nan"), truth, strict=True
        ):
            np.testing.assert_array_equal(result[0], right[0])
            assert np.all(np.isnan(result[1]))

    def test_faulty_counts(self):
        arguments = build(replace(USUAL, layout="BSND", tokens=2, token_counts=(2, 1)))
        arguments["actual_seq_qlen"] = np.array([2, 3], np.int32)
        if self.fails_on_faults:
            with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="actual_seq_qlen"):
                self.call(arguments, "jit, arrays")
        attention, _ = self.call(arguments, "jit, arrays", on_fault="nan")
        assert np.all(np.isnan(np.asarray(attention)[1]))
        assert np.all(np.isfinite(np.asarray(attention)[0]))
