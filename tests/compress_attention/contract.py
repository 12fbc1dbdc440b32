"""The contract of the compressed branch that every implementation is held to."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention import oracle
from compress_attention.agreement import assert_agrees
from compress_attention.calls import FLOATS, SEVERAL_TOKENS, USUAL
from compress_attention.choices import ChoicesOfBlocks
from compress_attention.faults import Faults
from compress_attention.problems import WINDOWS, Geometry, build
from compress_attention.programs import Programs
from contract import FORMS

from jax_nsa.blocks import Blocks
from jax_nsa.compress_attention.door import OPERATOR
from jax_nsa.compress_attention.problem import Problem

SEED_EXAMPLE = Geometry(
    lengths=(1024,) * 20, key_value_heads=2, group=4, head_size=192, value_size=128, page=128,
    spare_slots=0, window=(32, 16, 64), k=16, scale=1.0, hostile=False,
)  # fmt: skip


class CompressAttentionContract(ChoicesOfBlocks, Programs, Faults):
    """What every implementation must do, each test on the calls within its domain."""

    # One legal call after another.

    def test_seed_example(self, dtype):
        self.check(replace(SEED_EXAMPLE, dtype=dtype))

    def test_dtype(self, dtype):
        self.check(self.usual(dtype=dtype))

    @pytest.mark.parametrize("window", WINDOWS, ids=str)
    def test_window(self, window):
        self.check(self.usual(lengths=(61, 128), window=window, k=3, page=64))

    @pytest.mark.parametrize("page", [16, 48, 128])
    def test_page_sizes(self, page):
        self.check(self.usual(page=page))

    @pytest.mark.parametrize("group", [1, 8, 128])
    def test_groups(self, group):
        self.check(self.usual(group=group))

    @pytest.mark.parametrize("sizes", [(1, 1), (7, 5), (33, 1), (128, 128), (191, 127), (192, 128)])
    def test_head_sizes(self, dtype, sizes):
        head_size, value_size = sizes
        self.check(self.usual(dtype=dtype, head_size=head_size, value_size=value_size))

    def test_lengths_at_the_ends_of_pages(self):
        self.check(self.usual(lengths=(15, 16, 17, 31, 32, 33, 1, 2), k=1))

    def test_a_long_sequence_beside_short_ones(self):
        self.check(self.usual(lengths=(1, 3000, 2), page=128, k=1))

    def test_tiles_do_not_divide_a_page(self):
        """Two heads' 176 rows are 451 KB: the CPU kernels cut them at row 96, two pages in turn."""
        geometry = self.usual(
            dtype="float32", lengths=(500, 176, 1), page=176, head_size=192, value_size=128
        )
        self.require(geometry)
        self.check(geometry)

    def test_length_zero(self):
        geometry = self.usual(lengths=(0, 40, 0), return_lse=True)
        attention, indices, lse = self.check(geometry)
        assert np.all(attention[0] == 0)
        assert np.all(indices[0] == -1)
        assert np.all(lse[0] == -np.inf)

    def test_only_sequences_of_length_zero(self):
        self.check(self.usual(lengths=(0, 0)))

    def test_length_one(self):
        self.check(self.usual(lengths=(1,), k=1))

    @pytest.mark.parametrize("k", [1, 2, 3, 4, 38])
    def test_select_counts(self, k):
        self.check(self.usual(lengths=(150,), k=k))

    def test_more_selected_than_there_are_blocks(self):
        geometry = self.usual(lengths=(150, 1, 8), k=60)
        _, indices = self.check(geometry)
        blocks = np.sum(np.asarray(indices) >= 0, axis=-1)
        np.testing.assert_array_equal(blocks[:, 0], geometry.num_blocks)

    def test_shared_pages(self):
        self.check(self.usual(shared_pages=True, hostile=False))

    # Numbers.

    @pytest.mark.parametrize("scale", [0.0, -0.5, 1.0, 20.0, 1e-30])
    def test_scales(self, scale):
        self.check(self.usual(scale=scale))

    def test_scores_whose_exponentials_overflow(self):
        self.check(self.usual(scale=1.0, spread=100.0, return_lse=self.domain.returns_lse))

    @pytest.mark.parametrize("scale", [0.01, 1e4])
    def test_huge_scores(self, dtype, scale):
        # Far above the others', the greatest score has all probability, however it is rounded.
        geometry = self.usual(dtype=dtype, lengths=(128,), group=4, scale=scale, k=4)
        self.require(geometry)
        arguments = build(geometry)
        query, table = arguments["query"], arguments["block_table"][0]
        query *= 1e4
        arguments["key"] *= 1e4
        key, value = (
            np.asarray(arguments[name])[table[: 128 // geometry.page]]
            .astype(np.float64)
            .reshape(128, geometry.key_value_heads, -1)
            for name in ("key", "value")
        )
        heads = np.arange(query.shape[1]) // geometry.group
        scores = np.einsum("hd,phd->hp", query[0].astype(np.float64), key[:, heads])
        attention = np.asarray(self.call(arguments)[0])[0].astype(np.float64)
        want = value[scores.argmax(1), heads]
        np.testing.assert_allclose(attention, want, rtol=1e-6)

    def test_subnormal_halves(self):
        geometry = self.usual(dtype="float16", scale=0.1, return_lse=self.domain.returns_lse)
        self.require(geometry)
        arguments = build(geometry)
        arguments["query"][:] = 60000.0
        arguments["key"][:] = np.where(arguments["key"] > 0, 2.0**-15, 3 * 2.0**-17)
        arguments["value"][:] = 2.0**-15
        results = self.call(arguments)
        self.assert_agrees(results, arguments)
        np.testing.assert_array_equal(np.asarray(results[0]).astype(float), 2.0**-15)

    # What must not be read.

    @pytest.mark.parametrize("layout", ["TND", "BSND"])
    def test_garbage_changes_nothing(self, layout):
        geometry = self.usual(
            lengths=(150, 33, 0, 17), layout=layout, tokens=4, token_counts=(3, 0, 2, 1), k=4
        )
        self.require(geometry)
        clean = self.call(build(replace(geometry, hostile=False)))
        hostile = self.call(build(geometry))
        for one, other in zip(clean, hostile, strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()

    def test_a_nan_stays_in_its_sequence(self):
        geometry = self.usual(lengths=(150, 64, 97))
        self.require(geometry)
        arguments = build(geometry)
        clean = self.call(arguments)
        poisoned = {**arguments, "query": arguments["query"].copy()}
        poisoned["query"][1, 2, 0] = np.nan  # key/value head 0's third query head
        attention, indices = map(np.array, self.call(poisoned))
        assert np.all(np.isnan(attention[1, 2]))
        # NaN ranks below every number: blocks in ascending order, the forced ones first.
        blocks = geometry.num_blocks[1]
        assert indices[1, 0].tolist() == [0, blocks - 2, blocks - 1, 1, 2, 3, 4, 5]
        attention[1, 2], indices[1, 0] = clean[0][1, 2], clean[1][1, 0]
        self.assert_agrees((attention, indices), arguments)

    # Several tokens, masks and layouts.

    @pytest.mark.parametrize("form", FORMS)
    def test_tokens_of_ragged_sequences(self, form):
        self.check(self.usual(token_counts=(3, 1, 4)), form)

    @pytest.mark.parametrize("form", FORMS)
    def test_sequences_without_a_token(self, form):
        self.check(self.usual(lengths=(150, 33, 97, 5), token_counts=(0, 3, 0, 1), k=2), form)

    def test_rows_past_the_last_sequence(self):
        # Only run-time counts may leave rows over.
        geometry = self.usual(token_counts=(2, 1, 4))
        self.require(geometry)
        arguments = build(geometry)
        arguments["actual_seq_qlen"] = np.array([2, 1, 2], np.int32)
        results = self.call({**arguments, "return_lse": self.domain.returns_lse})
        self.assert_agrees(results, arguments)
        assert np.all(np.asarray(results[0])[5:] == 0)
        assert np.all(np.asarray(results[1])[5:] == -1)

    def test_batched_tokens(self, dtype):
        self.check(self.usual(dtype=dtype, layout="BSND", tokens=3))

    @pytest.mark.parametrize("form", FORMS)
    def test_padded_tokens(self, form):
        geometry = self.usual(layout="BSND", tokens=3, token_counts=(3, 1, 2))
        attention, indices = self.check(geometry, form)
        assert np.all(np.asarray(attention)[1, 1:] == 0)
        assert np.all(np.asarray(indices)[1, 1:] == -1)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("layout", ["TND", "BSND"])
    def test_mask(self, form, layout):
        # Tokens 0 and 1 of the first sequence, 0 of the second and none of the third end before
        # their sequence's last compressed position does.
        geometry = self.usual(
            layout=layout, tokens=4, token_counts=(4, 3, 2), masked=True, slack=(1, 1, 3)
        )
        self.check(geometry, form)

    def test_mask_matters(self):
        geometry = self.usual(token_counts=(4, 3, 2), masked=True, slack=(1, 1, 3))
        self.require(geometry)
        masked = np.asarray(self.call(build(geometry))[0])
        unmasked = np.asarray(self.call(build(replace(geometry, masked=False)))[0])
        differ = np.any(masked != unmasked, axis=(1, 2))
        assert differ.tolist() == [True, True, False, False, True, *[False] * 4]

    def test_mask_that_leaves_no_position(self):
        geometry = self.usual(
            lengths=(1, 40), token_counts=(2, 1), masked=True, slack=(0, 0), k=1,
            return_lse=self.domain.returns_lse,
        )  # fmt: skip
        attention, indices, *_ = self.check(geometry)
        assert np.all(np.asarray(attention)[0] == 0)
        assert np.all(np.asarray(attention)[1] != 0)
        assert np.all(np.asarray(indices)[:2] == 0)

    def test_mask_with_one_token_each_hides_nothing(self):
        self.check(self.usual(masked=True))

    # Further results.

    @pytest.mark.parametrize(
        "geometry",
        [USUAL, SEVERAL_TOKENS, replace(USUAL, layout="BSND", tokens=3, token_counts=(3, 0, 2))],
        ids=["one token", "ragged", "padded"],
    )
    def test_lse(self, dtype, geometry):
        self.check(replace(geometry, dtype=dtype, return_lse=True))

    @pytest.mark.parametrize("window", [(32, 16, 64), (48, 32, 64), (128, 16, 128), (16, 16, 16)])
    def test_block_scores(self, dtype, window):
        geometry = self.usual(dtype=dtype, lengths=(150, 1, 0, 64), window=window, return_lse=True)
        self.require(geometry)
        arguments = build(geometry)
        problem = Problem(
            blocks=Blocks(*window),
            scale=geometry.scale,
            key_value_heads=geometry.key_value_heads,
            select_block_count=geometry.k,
            return_lse=True,
            return_block_scores=True,
        )
        operands = {n: jnp.asarray(arguments[n]) for n in (*FLOATS, "block_table")}
        operands["query"] = operands["query"][:, None]
        operands["lengths"] = jnp.asarray(arguments["actual_cmp_seq_kvlen"])
        results = OPERATOR.bind(operands, problem=problem, implementation=(self.implementation,))
        assert results["attention"].dtype == np.float32  # unrounded, for merging
        assert_agrees(
            [r[:, 0] for r in results.values()],
            oracle.compress_attention(**arguments),
            attention_tolerance=self.attention_tolerance[dtype],
        )
