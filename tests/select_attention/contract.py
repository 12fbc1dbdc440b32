"""The contract of selected and window attention that every implementation is held to."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from select_attention.calls import USUAL
from select_attention.faults import Faults
from select_attention.problems import Geometry, build

from jax_nsa import nsa_select_attention_infer

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


class SelectAttentionContract(Faults):
    """What every implementation must do."""

    # Forms, dtypes, layouts.

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_dtype(self, dtype, example):
        self.check(self.usual(example, dtype=dtype))

    @pytest.mark.parametrize("layout", ["TND", "BSND", "BSH"])
    @pytest.mark.parametrize("counts", [None, (3, 1), (0, 2)])
    @pytest.mark.parametrize("rank", [3, 4])
    def test_layout(self, layout, counts, rank):
        self.check(
            self.usual(
                USUAL, layout=layout, tokens=3, token_counts=counts, return_lse=True, pool_rank=rank
            )
        )

    def test_indices_without_an_axis_of_one_token(self):
        geometry = self.usual(USUAL, layout="BSND")
        arguments = build(geometry)
        whole = self.call(arguments)
        squeezed = self.call(arguments | {"topk_indices": arguments["topk_indices"][:, 0]})
        for a, b in zip(whole, squeezed, strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize("name", RELEASED)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_released_models(self, name, dtype):
        self.check(replace(RELEASED[name], dtype=dtype))

    @pytest.mark.parametrize("group", [1, 2, 8, 32, 128])
    @pytest.mark.parametrize("head_size", [1, 17, 64, 192])
    def test_heads(self, group, head_size):
        self.check(
            self.usual(
                USUAL, lengths=(70,), group=group, head_size=head_size,
                value_size=min(head_size, 128), dtype="bfloat16", return_lse=True,
            )
        )  # fmt: skip

    @pytest.mark.parametrize("page", [16, 48, 128, 256])
    @pytest.mark.parametrize("block", [16, 48, 80, 128])
    def test_pages_and_blocks_cross(self, page, block):
        self.check(self.usual(USUAL, lengths=(300, 257), page=page, block=block, k=4, window=70))

    # What ids may be.

    @pytest.mark.parametrize("ids", [[-1, 0, 2], [0, -1, 2], [-1, -1, -1], [2, 2, 0], [3, 3, 3]])
    def test_ids(self, ids):
        """-1 anywhere is skipped, and an id listed twice counts twice."""
        geometry = self.usual(USUAL, lengths=(100, 100), return_lse=True)
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
        geometry = self.usual(USUAL, lengths=(200, 200), k=4)
        arguments = build(geometry)
        ids = np.array([5, 0, 3, 1], np.int32)
        shape = arguments["topk_indices"].shape
        one, other = (
            self.call(arguments | {"topk_indices": np.broadcast_to(i, shape)})[0]
            for i in (ids, np.sort(ids))
        )
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)

    def test_every_head_has_its_own_ids(self):
        geometry = self.usual(USUAL, lengths=(200,), key_value_heads=3, k=1, window=None)
        arguments = build(geometry)
        arguments["topk_indices"] = np.array([[[0], [3], [6]]], np.int32)
        self.assert_agrees(self.call(arguments), arguments)

    def test_blocks_wholly_past_a_token(self):
        """The first of four tokens does not see the block that the last three are in."""
        geometry = self.usual(USUAL, lengths=(67,), token_counts=(4,), k=1, return_lse=True)
        arguments = build(geometry)
        arguments["topk_indices"] = np.full((4, geometry.key_value_heads, 1), 2, np.int32)
        results = self.call(arguments)
        self.assert_agrees(results, arguments)
        np.testing.assert_array_equal(np.asarray(results[0])[0], 0)
        assert np.all(np.asarray(results[0])[1:] != 0)

    def test_all_blocks_are_dense_attention_and_so_is_a_long_window(self):
        geometry = self.usual(USUAL, lengths=(150,), k=5, window=150, dtype="float32")
        arguments = build(geometry)
        arguments["topk_indices"] = np.broadcast_to(np.arange(5, dtype=np.int32), (1, 2, 5))
        selected, window = self.call(arguments)
        np.testing.assert_allclose(selected, window, rtol=1e-5, atol=1e-6)
        self.assert_agrees((selected, window), arguments)

    @pytest.mark.parametrize("lengths", [(1, 1), (0, 5), (16, 32), (33, 15)])
    def test_short_sequences(self, lengths):
        self.check(self.usual(USUAL, lengths=lengths, window=500, return_lse=True))

    @pytest.mark.parametrize("window", [2**31 - 100, 2**31 - 1])
    def test_a_window_that_no_sequence_fills(self, window):
        self.check(self.usual(USUAL, token_counts=(3, 1), window=window, return_lse=True))

    def test_more_tokens_than_length(self):
        """The first tokens see nothing."""
        self.check(self.usual(USUAL, lengths=(2, 40), token_counts=(4, 4), return_lse=True))

    def test_one_long_sequence(self):
        self.check(self.usual(USUAL, lengths=(9000,), k=40, window=3000, page=64, block=64))

    def test_mask_changes_nothing(self):
        arguments = build(self.usual(USUAL))
        plain = self.call(arguments)
        masked = self.call(arguments | {"atten_mask": np.ones((1, 1), bool)})
        for a, b in zip(plain, masked, strict=True):
            np.testing.assert_array_equal(a, b)

    # Transformations.

    def test_vmap_over_queries_of_shared_pools(self):
        arguments = build(self.usual(USUAL, token_counts=(2, 1)))
        queries = np.stack([arguments["query"], -arguments["query"]])
        static = {n: v for n, v in arguments.items() if n != "query"}

        def run(query):
            return nsa_select_attention_infer(query, **static, implementation=self.implementation)

        results = jax.vmap(run)(queries)
        for index, query in enumerate(queries):
            self.assert_agrees(tuple(r[index] for r in results), arguments | {"query": query})

    def test_no_sequences(self):
        arguments = build(self.usual(USUAL))
        for name in ("query", "topk_indices", "block_table", "actual_seq_kvlen"):
            arguments[name] = arguments[name][:0]
        attention, window = self.call(arguments)
        assert attention.shape == window.shape == (0, 4, 8)
