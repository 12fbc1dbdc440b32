"""What every implementation must do with values that only the running program can see."""

from __future__ import annotations

import numpy as np
import pytest
from select_attention.calls import USUAL, Calls
from select_attention.problems import build


class Faults(Calls):
    """They fail the call, naming what is wrong, or else give NaN where they matter."""

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
        geometry = self.usual(USUAL, return_lse=True)
        arguments = build(geometry)
        truth = self.call(arguments)
        arguments[name] = arguments[name].copy()
        arguments[name][index] = value
        if self.fails_on_faults:
            self.assert_fails(arguments, message)
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

    @pytest.mark.parametrize("layout", ["BSND", "BSH"])
    def test_a_block_of_the_only_token(self, layout):
        if not self.fails_on_faults:
            pytest.skip("a bad value does not fail a call here")
        arguments = build(self.usual(USUAL, layout=layout, tokens=1))
        arguments["topk_indices"] = arguments["topk_indices"].copy()
        arguments["topk_indices"][1, 0, 1, 2] = -2
        self.assert_fails(arguments, "topk_indices[1, 0, 1, 2] must be in [-1, 1]")

    def test_lengths_past_the_block_table(self):
        """They are faults also where each entry of the table is a page."""
        arguments = build(self.usual(USUAL, spare_slots=0, hostile=False))
        truth = self.call(arguments)
        capacity = arguments["block_table"].shape[1] * arguments["page_block_size"]
        arguments["actual_seq_kvlen"] = np.array([100, capacity + 1], np.int32)
        if self.fails_on_faults:
            self.assert_fails(arguments, "actual_seq_kvlen")
        for result, right in zip(
            self.call(arguments, "jit, arrays", on_fault="nan"), truth, strict=True
        ):
            np.testing.assert_array_equal(result[0], right[0])
            assert np.all(np.isnan(result[1]))

    def test_faulty_counts(self):
        arguments = build(self.usual(USUAL, layout="BSND", tokens=2, token_counts=(2, 1)))
        arguments["actual_seq_qlen"] = np.array([2, 3], np.int32)
        if self.fails_on_faults:
            self.assert_fails(arguments, "actual_seq_qlen")
        attention, _ = self.call(arguments, "jit, arrays", on_fault="nan")
        assert np.all(np.isnan(np.asarray(attention)[1]))
        assert np.all(np.isfinite(np.asarray(attention)[0]))
