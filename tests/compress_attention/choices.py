"""The part of the contract that says which blocks are chosen."""

from __future__ import annotations

import numpy as np
import pytest
from compress_attention.calls import Calls
from compress_attention.problems import WINDOWS, Geometry, build

# How open codes choose blocks, by who trains with it: the geometry, and how many of the first and
# of the last blocks are always chosen.
SETTINGS = {
    "fla": ((64, 64, 64), 1, 2),
    "fla-org/native-sparse-attention": ((64, 64, 64), 0, 1),
    "NSA-1B": ((16, 16, 16), 0, 1),
    "XunhaoLai": ((32, 16, 64), 1, 2),
    "mdy666": ((32, 16, 64), 1, 2),
    "FSA": ((32, 16, 64), 1, 2),
}
# Pairs of init_blocks and local_blocks.
FORCED = ((0, 0), (0, 1), (1, 2), (3, 0), (2, 9), (2**31 - 1, 0), (0, 2**31 - 1), (30, 30))


class ChoicesOfBlocks(Calls):
    """Which blocks every implementation chooses, by CANN's rule and by that of open codes."""

    def test_initial_and_local_blocks_lead(self):
        geometry = self.usual(lengths=(150, 97), k=5)
        _, indices = self.check(geometry)
        for b, blocks in enumerate(geometry.num_blocks):
            leading = np.asarray(indices)[b, :, :3].tolist()
            assert leading == [[0, blocks - 2, blocks - 1]] * 2

    @pytest.mark.parametrize(("length", "blocks"), [(1, [0]), (4, [0, 1]), (8, [0, 1, 2])])
    def test_few_blocks(self, length, blocks):
        _, indices = self.check(self.usual(lengths=(length,), k=len(blocks)))
        assert np.asarray(indices)[0, 0].tolist() == blocks

    def test_equals_in_ascending_order(self, dtype):
        # Equal scores over a power of two of positions: probabilities, and their sums, are exact.
        for scale, page, window in ((0.0, 16, (32, 16, 64)), (0.0, 128, (16, 16, 16))):
            geometry = Geometry(
                dtype=dtype, lengths=(256,), scale=scale, page=page, window=window, k=9
            )
            self.require(geometry)
            arguments = build(geometry)
            results = self.call(arguments)
            self.assert_agrees(results, arguments)
            blocks = geometry.num_blocks[0]
            want = [0, blocks - 2, blocks - 1, 1, 2, 3, 4, 5, 6]
            assert np.asarray(results[1]).tolist() == [[want] * 2]

    def test_blocks_without_weight_tie(self):
        # One position takes all probability, the others' is exactly zero.
        geometry = self.usual(lengths=(128,), group=1, scale=1.0, k=33)
        self.require(geometry)
        arguments = build(geometry)
        arguments["query"][:] = 32.0
        arguments["key"][:] = -8.0
        arguments["key"][arguments["block_table"][0, 4], 6] = 8.0  # position 70
        results = self.call(arguments)
        self.assert_agrees(results, arguments)
        # Score j sums positions 4j to 4j + 4, so 70 counts for block 17 alone.
        rest = [j for j in range(1, 31) if j != 17]
        assert np.asarray(results[1])[0, 0].tolist() == [0, 31, 32, 17, *rest]

    @pytest.mark.parametrize("importance", ["cann", "aligned"])
    @pytest.mark.parametrize("forced", FORCED, ids=str)
    def test_forced_blocks_lead(self, importance, forced):
        init_blocks, local_blocks = forced
        geometry = self.usual(
            importance=importance, init_blocks=init_blocks, local_blocks=local_blocks, k=7
        )
        _, indices = self.check(geometry)
        for b, blocks in enumerate(geometry.num_blocks):
            first = range(min(init_blocks, blocks))
            last = range(max(len(first), blocks - local_blocks), blocks)
            want = [*first, *last][:7]
            assert np.asarray(indices)[b, :, : len(want)].tolist() == [want] * 2

    # Blocks as open codes choose them.

    @pytest.mark.parametrize("window", WINDOWS, ids=str)
    def test_aligned_window(self, window):
        compress, stride, _ = window
        self.check(
            self.usual(
                lengths=(61, 128, 0, 33), slack=(stride - 1, 0, compress - 1, 1), window=window,
                k=6, page=64, importance="aligned", init_blocks=0, local_blocks=1,
            )
        )  # fmt: skip

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_the_block_that_holds_a_peak_is_chosen(self, setting):
        """Wherever the window of the position with the peak lies wholly inside of a block."""
        window, init_blocks, local_blocks = SETTINGS[setting]
        compress, stride, select = window
        forced = init_blocks + local_blocks
        inside = [i for i in range(33, 48) if i * stride % select + compress <= select]
        geometry = self.usual(
            lengths=(80,) * len(inside), window=window, k=forced + 1, hostile=False,
            importance="aligned", init_blocks=init_blocks, local_blocks=local_blocks,
        )  # fmt: skip
        self.require(geometry)
        arguments = build(geometry)
        arguments["query"][:] = 1
        arguments["key"][:] = 0
        for b, i in enumerate(inside):
            page = arguments["block_table"][b, i // geometry.page]
            arguments["key"][page, i % geometry.page] = 5
        results = self.call(arguments)
        self.assert_agrees(results, arguments)
        holders = [i * stride // select for i in inside]
        assert np.asarray(results[1])[:, :, forced].tolist() == [[j, j] for j in holders]
        if compress == select:
            # CANN's rule ranks the block before it.
            arguments |= {"importance": "cann", "init_blocks": 1, "local_blocks": 2}
            _, indices = self.call(arguments | {"select_block_count": 4})
            assert np.asarray(indices)[:, :, 3].tolist() == [[j - 1, j - 1] for j in holders]

    def test_each_token_counts_the_blocks_that_it_sees(self):
        geometry = self.usual(
            token_counts=(40, 3, 17), slack=(1, 15, 0), masked=True, window=(16, 16, 16), k=155,
            importance="aligned", init_blocks=0, local_blocks=1,
        )  # fmt: skip
        _, indices = self.check(geometry)
        first = 0
        for tokens, length in zip(geometry.counts, geometry.original_lengths, strict=True):
            for t in range(tokens):
                blocks = -(-(length - (tokens - 1 - t)) // 16)
                assert np.all(np.asarray(indices)[first + t, :, 0] == blocks - 1)
                assert np.all(np.sum(np.asarray(indices)[first + t] >= 0, axis=-1) == blocks)
            first += tokens

    def test_tokens_that_are_not_causal_count_all_blocks(self):
        geometry = self.usual(
            token_counts=(40, 3, 17), slack=(1, 15, 0), window=(16, 16, 16), k=155,
            importance="aligned",
        )  # fmt: skip
        _, indices = self.check(geometry)
        blocks = np.repeat(geometry.num_blocks, geometry.counts)
        np.testing.assert_array_equal(np.sum(np.asarray(indices) >= 0, axis=-1)[:, 0], blocks)

    def test_more_tokens_than_the_sequence_has(self):
        """Those that come before the sequence's first have no block."""
        geometry = self.usual(
            lengths=(1, 0, 2), token_counts=(50, 9, 3), slack=(3, 5, 0), masked=True,
            importance="aligned", local_blocks=0,
        )  # fmt: skip
        _, indices = self.check(geometry)
        indices = np.asarray(indices)[:, 0]
        assert indices[:15].tolist() == [[-1] * 8] * 15
        assert indices[50:54].tolist() == [[-1] * 8] * 4
        assert np.all(indices[[*range(15, 50), *range(54, 59)], 0] == 0)

    def test_before_any_position(self):
        geometry = self.usual(
            lengths=(0, 0, 20), slack=(31, 0, 15), k=3, return_lse=True, importance="aligned",
            init_blocks=0, local_blocks=0,
        )  # fmt: skip
        attention, indices, lse = (np.asarray(r) for r in self.check(geometry))
        assert np.all(attention[:2] == 0)
        assert np.all(lse[:2] == -np.inf)
        assert indices[:2, 0].tolist() == [[0, -1, -1], [-1, -1, -1]]

    def test_a_block_that_no_position_reaches(self):
        geometry = self.usual(
            lengths=(20, 150), slack=(5, 15), window=(16, 16, 16), k=160, init_blocks=0,
            local_blocks=0, importance="aligned",
        )  # fmt: skip
        _, indices = self.check(geometry)
        # The last one holds less than a stride of tokens, and nothing makes it important.
        assert np.all(np.asarray(indices)[0, :, 20] == 20)
        assert np.all(np.asarray(indices)[1, :, 150] == 150)

    def test_aligned_equals_in_ascending_order(self, dtype):
        geometry = Geometry(
            dtype=dtype, lengths=(256,), scale=0.0, k=70, importance="aligned", init_blocks=0,
            local_blocks=1,
        )  # fmt: skip
        self.require(geometry)
        arguments = build(geometry)
        results = self.call(arguments)
        self.assert_agrees(results, arguments)
        # Positions 4j - 1 to 4j + 3 weigh 1, 2, 2, 2, 1 in block j; block 0 lacks the first.
        want = [64, *range(1, 64), 0, *[-1] * 5]
        assert np.asarray(results[1]).tolist() == [[want] * 2]

    @pytest.mark.parametrize(("b", "length"), [(1, 33), (2, 0)])
    @pytest.mark.parametrize("beyond", [-1, 0, -(2**31) + 10_000, 2**31 - 10_000])
    def test_faulty_length_of_aligned_blocks(self, b, length, beyond):
        geometry = self.usual(lengths=(150, 33, 0), slack=(2, 3, 4), importance="aligned")
        least, most = ((length - 1) * 16 + 32, length * 16 + 31) if length else (0, 31)
        value = least - 1 if beyond == -1 else most + 1 + beyond
        message = f"[{b}] must be in [{least}, {most}], the original lengths that compress to "
        message += f"actual_cmp_seq_kvlen[{b}] = {length}, got {value}"
        self._check_fault(geometry, "actual_sel_seq_kvlen", b, value, message, faulty=[b])
