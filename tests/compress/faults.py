"""What every implementation must do about faulty values that only the running program sees."""

from __future__ import annotations

import numpy as np
import pytest
from compress.calls import COUNTED, INTEGERS, USUAL, Calls
from compress.problems import build
from contract import FORMS


class Faults(Calls):
    """Each fault alone, and all together."""

    @pytest.mark.parametrize(
        ("name", "index", "value", "message"),
        [
            ("actual_seq_len", 2, -1, "actual_seq_len[2] must be in [0, 112]"),
            ("actual_seq_len", 2, 113, "actual_seq_len[2] must be in [0, 112]"),
            ("actual_seq_len", 2, 2**31 - 1, "got 2147483647"),
            ("actual_seq_len", 2, -(2**31), "got -2147483648"),
            ("actual_seq_qlen", 2, 17, "actual_seq_qlen[2] must be in [0, 16]"),
            ("actual_seq_qlen", 2, -1, "actual_seq_qlen[2] must be in [0, 16]"),
            ("actual_seq_qlen", 2, -(2**31), "got -2147483648"),
            ("block_table", (2, 3), -1, "block_table[2, 3] must be in [0, 17)"),
            ("block_table", (2, 4), 17, "block_table[2, 4] must be in [0, 17)"),
            ("block_table", (2, 4), 2**31 - 1, "the pages of input, got 2147483647"),
            ("slot_mapping", 2, 9, "slot_mapping[2] must be below 9, the rows of cache"),
            ("slot_mapping", 2, 2**31 - 1, "got 2147483647"),
        ],
    )
    @pytest.mark.parametrize("hostile", [True, False])
    def test_faults(self, name, index, value, message, hostile):
        """Also where nothing else would stop a window that there is not."""
        arguments = build(self.usual(COUNTED, head_sizes=(5, 3), hostile=hostile))
        faulty = {**arguments, name: arguments[name].copy()}
        faulty[name][index] = value
        self._check_fault(faulty, arguments, message, unwritten=(2,))

    def test_a_row_for_two(self):
        arguments = build(self.usual(COUNTED))
        slots = arguments["slot_mapping"].copy()
        slots[3] = slots[0]
        faulty = {**arguments, "slot_mapping": slots}
        self._check_fault(faulty, arguments, "slot_mapping[3]", unwritten=(0, 3))

    def test_a_row_for_three_of_which_one_has_no_window(self):
        """A sequence that completes no window claims no row, one with a bad page does."""
        arguments = build(self.usual(COUNTED))
        slots = arguments["slot_mapping"].copy()
        slots[1] = slots[2]
        arguments["slot_mapping"] = slots
        assert self.assert_agrees(self.call(arguments, "jit, arrays"), arguments) == 3
        faulty = {**arguments, "slot_mapping": slots.copy()}
        faulty["slot_mapping"][0] = slots[2]
        faulty["block_table"] = arguments["block_table"].copy()
        faulty["block_table"][0, 1] = -1
        self._check_fault(faulty, arguments, "", unwritten=(0, 2))

    def test_faults_of_sequences_without_a_window_are_none(self):
        arguments = build(self.usual(COUNTED))
        arguments["slot_mapping"][1] = 2**31 - 1
        arguments["block_table"][1] = -7
        assert self.assert_agrees(self.call(arguments, "jit, arrays"), arguments) == 3

    def test_pages_outside_the_window_are_not_needed(self):
        arguments = build(self.usual(USUAL, lengths=(96,), hostile=False))
        arguments["block_table"][0, :4] = -1
        arguments["block_table"][0, 6:] = 999
        for form in FORMS:
            assert self.assert_agrees(self.call(arguments, form), arguments) == 1

    def test_every_fault_at_once(self):
        arguments = build(self.usual(COUNTED))
        random = np.random.default_rng(0)
        for _ in range(5):
            faulty = dict(arguments)
            for name in INTEGERS:
                shape = arguments[name].shape
                faulty[name] = random.integers(-(2**31), 2**31, shape).astype(np.int32)
            self._check_fault(faulty, arguments, "", unwritten=(0, 1, 2, 3))

    def _check_fault(self, faulty, arguments, message, *, unwritten) -> None:
        """Asserts what a fault does: it fails the call, or these windows alone are not written."""
        for form in ("eager, arrays", "jit, arrays"):
            if self.fails_on_faults:
                self.assert_fails(faulty, message)
            results = self.call(faulty, form, on_fault="nan")
            self.assert_agrees(results, arguments, unwritten=unwritten)
