"""What every implementation must do with values that only the running program can see."""

from __future__ import annotations

import numpy as np
import pytest
from compress_attention import oracle
from compress_attention.agreement import assert_agrees
from compress_attention.calls import INTEGERS, SEVERAL_TOKENS, Calls
from compress_attention.problems import build


class Faults(Calls):
    """They fail the call, naming what is wrong, or else give NaN and -1 in the rows concerned."""

    @pytest.mark.parametrize(
        ("name", "index", "value", "message"),
        [
            (
                "actual_cmp_seq_kvlen",
                1,
                -1,
                "[1] must be in [0, 176] (11 pages of 16 rows)",
            ),
            ("actual_cmp_seq_kvlen", 1, 177, "[1] must be in [0, 176]"),
            ("actual_cmp_seq_kvlen", 1, 2**31 - 1, "got 2147483647"),
            ("actual_cmp_seq_kvlen", 1, -(2**31), "got -2147483648"),
            (
                "block_table",
                (1, 0),
                -1,
                "[1, 0] must be in [0, 21), the pages of key and value, got -1",
            ),
            (
                "block_table",
                (1, 2),
                21,
                "[1, 2] must be in [0, 21), the pages of key and value, got 21",
            ),
            ("block_table", (1, 1), 2**31 - 1, "[1, 1] must be in"),
            ("block_table", (1, 1), -(2**31), "[1, 1] must be in"),
        ],
    )
    def test_faulty_sequence(self, name, index, value, message):
        self._check_fault(self.usual(), name, index, value, message, faulty=[1])

    @pytest.mark.parametrize(
        ("b", "value", "first_faulty_row"),
        [
            (0, -1, 0),  # nobody knows where the later sequences start
            (1, -1, 3),
            (1, 6, 3),
            (2, 5, 4),
            (0, 2**31 - 1, 0),
            (1, -(2**31), 3),
        ],
    )
    def test_faulty_ragged_token_count(self, b, value, first_faulty_row):
        faulty = list(range(first_faulty_row, 8))
        geometry = self.usual(token_counts=(3, 1, 4))
        message = f"[{b}] must be in [0, {8 - first_faulty_row}] (what earlier sequences leave of "
        message += f"query's 8 rows), got {value}"
        self._check_fault(geometry, "actual_seq_qlen", b, value, message, faulty=faulty)

    def test_token_counts_whose_sum_overflows(self):
        geometry = self.usual(lengths=(150, 33, 97, 64), token_counts=(1, 1, 2, 4))
        self.require(geometry)
        arguments = build(geometry)
        arguments["actual_seq_qlen"][:] = 2**31 - 1, 2**31 - 1, 2, 8
        if self.fails_on_faults:
            self.assert_fails(arguments, "actual_seq_qlen[0]")
        else:
            self.assert_blank(self.call(arguments))

    @pytest.mark.parametrize("value", [-1, 5, 2**31 - 1, -(2**31)])
    def test_faulty_batched_token_count(self, value):
        geometry = self.usual(layout="BSND", tokens=4, token_counts=(3, 1, 4))
        message = f"[1] must be in [0, 4] (query's rows for each sequence), got {value}"
        self._check_fault(geometry, "actual_seq_qlen", 1, value, message, faulty=[1])

    @pytest.mark.parametrize("slack", [-1, 16, -(2**31) + 10_000, 2**31 - 10_000])
    def test_faulty_original_length(self, slack):
        geometry = self.usual(layout="BSND", tokens=2, masked=True, slack=(0, 0, 0))
        least = (geometry.lengths[1] - 1) * 16 + 32
        message = f"[1] must be in [{least}, {least + 15}], the original lengths that compress to "
        message += f"actual_cmp_seq_kvlen[1] = {geometry.lengths[1]}"
        self._check_fault(geometry, "actual_sel_seq_kvlen", 1, least + slack, message, faulty=[1])

    def test_faulty_sequence_of_several_tokens(self):
        geometry = self.usual(SEVERAL_TOKENS, return_lse=self.domain.returns_lse)
        self._check_fault(geometry, "actual_cmp_seq_kvlen", 0, -3, "[0]", faulty=[0, 1, 2])

    def test_every_fault_at_once(self):
        geometry = self.usual(token_counts=(3, 1, 4))
        self.require(geometry)
        arguments = build(geometry)
        rng = np.random.default_rng(0)
        for _ in range(5):
            for name in INTEGERS:
                if name in arguments:
                    shape = arguments[name].shape
                    arguments[name] = rng.integers(-(2**31), 2**31, shape).astype(np.int32)
            if self.fails_on_faults:
                self.assert_fails(arguments, "[0]")
            else:
                self.assert_blank(self.call(arguments))

    def _check_fault(self, geometry, name, index, value, message, *, faulty) -> None:
        """Asserts what one faulty integer does to the `faulty` rows and to the others."""
        self.require(geometry)
        arguments = build(geometry)
        expected = oracle.compress_attention(**arguments)
        arguments[name][index] = value
        if self.fails_on_faults:
            self.assert_fails(arguments, name, message)
            return
        results = self.call(arguments)
        self.assert_blank(results, faulty)
        if others := [row for row in range(len(results[0])) if row not in faulty]:
            tolerance = self.attention_tolerance[geometry.dtype]
            assert_agrees(results, expected, attention_tolerance=tolerance, rows=others)
