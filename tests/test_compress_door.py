"""Compression into the cache: every rule for values that are known at the call, and the helpers."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress import oracle
from compress.problems import Geometry, build

from jax_nsa import nsa_compress_infer
from jax_nsa.compress.window import completed_window, gather_window, window_slots

# Sequences 0 and 2 complete a window of 32 tokens; 9 rows; pages of 16 rows.
GEOMETRY = Geometry(lengths=(48, 47, 80), hostile=False)
ARGUMENTS = build(GEOMETRY)
PAIR = build(replace(GEOMETRY, head_sizes=(5, 3)))
PAGES = len(ARGUMENTS["input"])
ROWS = len(ARGUMENTS["cache"])


def call(**arguments):
    return nsa_compress_infer(**{"implementation": "reference"} | arguments)


def table_with(b, p, value):
    table = ARGUMENTS["block_table"].astype(np.int64)
    table[b, p] = value
    return table


REFUSED = [
    *[
        (changes, TypeError, message)
        for name in ("input", "weight", "cache", "bias")
        for changes, message in [
            ({name: ARGUMENTS[name].astype(np.float64)}, f"{name} must have dtype .*float64"),
            ({name: np.ma.masked_array(ARGUMENTS[name])}, f"{name} must be .* got MaskedArray"),
        ]
    ],
    ({"weight": None}, TypeError, "weight must be a JAX or NumPy array, got NoneType"),
    ({"cache": None}, TypeError, "cache must be a JAX or NumPy array, got NoneType"),
    (
        {"cache": ARGUMENTS["cache"].astype(np.float16)},
        TypeError,
        "input and cache must have the same dtype, got float32 and float16",
    ),
    (
        {"weight": ARGUMENTS["weight"].astype(np.float16)},
        TypeError,
        "weight must have input's dtype float32, got float16",
    ),
    (
        {"bias": ARGUMENTS["bias"].astype(np.float16)},
        TypeError,
        "bias must have input's dtype float32, got float16",
    ),
    ({"weight": np.zeros((31, 2), np.float32)}, ValueError, r"weight must .*\(32, 2\).*\(31, 2\)"),
    ({"weight": np.zeros((32,), np.float32)}, ValueError, r"weight must have shape .*\(32,\)"),
    ({"weight": np.zeros((32, 0), np.float32)}, ValueError, r"weight must have shape .*\(32, 0\)"),
    ({"weight": np.zeros((32, 3), np.float32)}, ValueError, "input must have shape .*3 \\* head"),
    ({"input": np.zeros((4, 32, 10), np.float32)}, ValueError, r"input must .*\(4, 32, 10\)"),
    ({"input": np.zeros((4, 16, 3, 5), np.float32)}, ValueError, r"input must .*\(4, 16, 3, 5\)"),
    ({"input": np.zeros((0, 16, 10), np.float32)}, ValueError, r"input must .*\(0, 16, 10\)"),
    ({"input": np.zeros((16, 10), np.float32)}, ValueError, r"input must .*\(16, 10\)"),
    (
        {"input": np.zeros((4, 16, 2 * 257), np.float32)},
        ValueError,
        "input's head size must be at most 256, got 257",
    ),
    ({"cache": np.zeros((9, 2, 4), np.float32)}, ValueError, r"cache must have shape .*\(9, 2, 4"),
    ({"cache": np.zeros((9, 10), np.float32)}, ValueError, r"cache must have shape .*\(9, 10\)"),
    ({"cache": np.zeros((3, 3, 5, 2), np.float32)}, ValueError, r"cache .*\(3, 3, 5, 2\)"),
    ({"bias": np.zeros((5, 2), np.float32)}, ValueError, r"bias must have shape \(2, 5\).*\(5, 2"),
    # Sizes.
    ({"compress_block_size": 31}, ValueError, "compress_block_size must be a multiple .* got 31"),
    ({"compress_block_size": 144}, ValueError, "compress_block_size must be a multiple .*144"),
    ({"compress_block_size": 16, "compress_stride": 32}, ValueError, "compress_block_size must"),
    ({"compress_block_size": 32.0}, TypeError, "compress_block_size must be a Python integer"),
    ({"compress_stride": 24}, ValueError, "compress_stride must be one of .* got 24"),
    ({"compress_stride": None}, TypeError, "compress_stride must be a Python integer"),
    ({"page_block_size": 17}, ValueError, "page_block_size must be a multiple of 16 .* got 17"),
    ({"page_block_size": 272}, ValueError, "page_block_size must be .* got 272"),
    ({"page_block_size": True}, TypeError, "page_block_size must be a Python integer"),
    # Integers.
    ({"block_table": None}, ValueError, "block_table is required, got None"),
    ({"actual_seq_len": None}, ValueError, "actual_seq_len is required, got None"),
    ({"slot_mapping": None}, ValueError, "slot_mapping is required, got None"),
    ({"slot_mapping": [0.0, 1.0, 2.0]}, TypeError, "slot_mapping must hold integers"),
    ({"slot_mapping": [0, 1]}, ValueError, r"slot_mapping must have an entry .*\(2,\)"),
    ({"actual_seq_len": [48, 47]}, ValueError, r"actual_seq_len must have an entry .*\(2,\)"),
    ({"actual_seq_qlen": [1]}, ValueError, r"actual_seq_qlen must have an entry .*\(1,\)"),
    ({"block_table": [[]] * 3}, ValueError, "block_table must not be empty"),
    (
        {"actual_seq_len": [48, -1, 80]},
        ValueError,
        r"actual_seq_len\[1\] must be in \[0, 96\] .*got -1",
    ),
    (
        {"actual_seq_len": [48, 47, 97]},
        ValueError,
        r"actual_seq_len\[2\] must be in \[0, 96\] .*got 97",
    ),
    (
        {"actual_seq_qlen": [1, 17, 1]},
        ValueError,
        r"actual_seq_qlen\[1\] must be in \[0, 16\] .*compress_stride.*got 17",
    ),
    ({"actual_seq_qlen": [1, 1, -1]}, ValueError, r"actual_seq_qlen\[2\] must be .*got -1"),
    *[
        (
            {"block_table": table_with(2, p, value)},
            ValueError,
            rf"block_table\[2, {p}\] must be in \[0, {PAGES}\), the pages of input, got {value}",
        )
        for p, value in ((3, -1), (4, PAGES), (4, 2**40))
    ],
    *[
        (
            {"slot_mapping": [0, 1, value]},
            ValueError,
            rf"slot_mapping\[2\] must be below {ROWS}, the rows of cache, got {value}",
        )
        for value in (ROWS, 2**40)
    ],
    (
        {"slot_mapping": [4, 1, 4]},
        ValueError,
        r"slot_mapping\[2\] must not be slot_mapping\[0\], as both .* got 4 for both",
    ),
    # Others.
    ({"implementation": "gpu"}, ValueError, "implementation must name some of"),
    ({"on_fault": "raise"}, ValueError, "on_fault must be one of"),
    # Pairs.
    ({"input": ()}, ValueError, "input must be an array or up to 2 of them, got 0"),
    ({"input": (ARGUMENTS["input"],) * 3}, ValueError, "input must be .* got 3"),
    ({"input": (ARGUMENTS["input"],) * 2}, TypeError, "weight must be a sequence of 2 arrays"),
    (PAIR | {"cache": PAIR["cache"][:1]}, TypeError, "cache must be a sequence of 2 .*tuple of 1"),
    (
        PAIR | {"input": (PAIR["input"][0], PAIR["input"][1].astype(np.float16))},
        TypeError,
        r"input and input\[1\] must have the same dtype, got float32 and float16",
    ),
    (
        PAIR | {"input": (PAIR["input"][0], PAIR["input"][1][1:])},
        ValueError,
        r"input\[0\] and input\[1\] must have as many pages",
    ),
    (
        PAIR | {"cache": (PAIR["cache"][0], PAIR["cache"][1][1:])},
        ValueError,
        r"cache\[0\] and cache\[1\] must have as many rows, got 6 and 5",
    ),
    (
        PAIR | {"weight": (PAIR["weight"][0], PAIR["weight"][1][:, :1])},
        ValueError,
        r"weight\[1\] must have shape .*\(32, 2\), got \(32, 1\)",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED)
def test_refused(changes, error, message):
    with pytest.raises(error, match=message):
        call(**ARGUMENTS | changes)


class TestKnownValues:
    def test_what_no_window_needs_is_not_looked_at(self):
        table = ARGUMENTS["block_table"].copy()
        table[0, 0] = table[1] = -5
        changes = {"block_table": table, "slot_mapping": [4, 2**40, 3]}
        result = call(**ARGUMENTS | changes)
        truth = call(**ARGUMENTS | {"slot_mapping": [4, -1, 3]})
        np.testing.assert_array_equal(result, truth)

    def test_lengths_that_are_not_known_check_nothing(self):
        changes = {
            "actual_seq_len": jnp.asarray(ARGUMENTS["actual_seq_len"]),
            "slot_mapping": [2, 99, 2],
        }
        np.testing.assert_array_equal(call(**ARGUMENTS | changes), ARGUMENTS["cache"])

    def test_equal_negative_slots_are_no_conflict(self):
        changes = {"slot_mapping": [-1, -1, -1]}
        np.testing.assert_array_equal(call(**ARGUMENTS | changes), ARGUMENTS["cache"])

    def test_an_array_is_not_waited_for(self):
        with jax.transfer_guard_device_to_host("disallow"):
            call(**{n: jnp.asarray(v) if np.ndim(v) else v for n, v in ARGUMENTS.items()})

    def test_one_array_in_a_list_gives_a_tuple(self):
        names = ("input", "weight", "cache", "bias")
        (cache,) = call(**ARGUMENTS | {n: [ARGUMENTS[n]] for n in names})
        np.testing.assert_array_equal(cache, call(**ARGUMENTS))

    def test_one_bias_of_two(self):
        arguments = PAIR | {"bias": (None, PAIR["bias"][1])}
        key, value = call(**arguments)
        both = call(**PAIR)
        np.testing.assert_array_equal(value, both[1])
        slot = PAIR["slot_mapping"][0]
        want = np.asarray(both[0])[slot] - PAIR["bias"][0]
        np.testing.assert_allclose(np.asarray(key)[slot], want, rtol=1e-4, atol=1e-5)


class TestWindows:
    """The helpers for models that summarise a window in their own way."""

    def test_agrees_with_the_operator(self):
        geometry = Geometry(
            lengths=(49, 47, 95, 32, 3), token_counts=(3, 2, 16, 1, 0), hostile=True, bias=False
        )
        arguments = build(geometry)
        sizes = {"compress_block_size": 32, "compress_stride": 16}
        window = jax.jit(lambda *a: completed_window(*a, **sizes))(
            arguments["actual_seq_len"], arguments["actual_seq_qlen"]
        )
        ends = [None if not c else int(f) + 32 for c, f in zip(*window[:2], strict=True)]
        assert ends == list(geometry.ends)
        tokens = gather_window(
            arguments["input"], arguments["block_table"], window,
            key_value_head_num=2, compress_block_size=32,
        )  # fmt: skip
        assert tokens.shape == (5, 32, 2, 5)
        summary = np.einsum("blhd,lh->bhd", tokens, arguments["weight"])
        expected = oracle.compress(**arguments)
        for b, completes in enumerate(window.completes):
            truth = expected.rows[int(arguments["slot_mapping"][b])] if completes else 0
            np.testing.assert_allclose(summary[b], np.broadcast_to(truth, (2, 5)), atol=1e-4)

    def test_slots(self):
        window = completed_window(
            np.array([32, 33, 304, 320, 48]), compress_block_size=32, compress_stride=16
        )
        np.testing.assert_array_equal(window.position, [0, 0, 17, 18, 1])
        table = np.array([[3, 9], [1, 1], [5, 2], [7, -1], [0, -1]])
        np.testing.assert_array_equal(
            window_slots(window, table, page_block_size=16), [48, -1, 2 * 16 + 1, -1, 1]
        )

    @pytest.mark.parametrize("page", [16, 48, 256])
    def test_pages_past_any_pool_do_not_wrap(self, page):
        """Times the rows of a page, their ids are small again in 32 bits."""
        window = completed_window([32] * 3, compress_block_size=32, compress_stride=16)
        table = np.array([[2**32 // page + 1], [2**31 // page], [2**31 - 1]])
        slots = window_slots(window, np.minimum(table, 2**31 - 1), page_block_size=page)
        assert np.all(np.asarray(slots) >= 2**31 - 2 * page)

    def test_lengths_that_cannot_be(self):
        window = completed_window(
            np.array([-(2**31), 48, 48]), np.array([1, 17, -1]), compress_block_size=32,
            compress_stride=16,
        )  # fmt: skip
        assert not np.any(window.completes)

    def test_refused(self):
        with pytest.raises(ValueError, match="compress_stride must be one of"):
            completed_window(np.array([1]), compress_block_size=32, compress_stride=8)


class TestWindowHelpers:
    """What users build a compression of their own from never names a row that is not there."""

    SIZES: ClassVar = {"compress_block_size": 16, "compress_stride": 16}

    def test_no_slot_past_the_table(self):
        window = completed_window(np.array([272]), **self.SIZES)
        assert window.position[0] == 16
        np.testing.assert_array_equal(window_slots(window, [[0]], page_block_size=16), [-1])
        np.testing.assert_array_equal(window_slots(window, [[0, 3]], page_block_size=16), [48])

    @pytest.mark.parametrize("page", [-1, 2, 99])
    def test_no_tokens_of_another_page(self, page):
        window = completed_window(np.array([32]), **self.SIZES)
        pool = np.ones((2, 16, 3), np.float32)
        gathered = functools.partial(
            gather_window, pool, window=window, key_value_head_num=1, compress_block_size=16
        )
        assert np.all(np.isnan(gathered(np.array([[0, page]]))))
        np.testing.assert_array_equal(gathered(np.array([[page, 1]])), np.ones((1, 16, 1, 3)))

    @pytest.mark.parametrize("lengths", [np.array([16.9]), [[16]], None])
    def test_lengths_are_integers(self, lengths):
        with pytest.raises((TypeError, ValueError), match="actual_seq_len"):
            completed_window(lengths, **self.SIZES)

    def test_as_many_counts_as_lengths(self):
        with pytest.raises(
            ValueError, match=r"actual_seq_qlen must have an entry for each of .* 3"
        ):
            completed_window(np.array([16, 17, 18]), np.array([1]), **self.SIZES)

    def test_pages_are_pages(self):
        window = completed_window(np.array([16]), **self.SIZES)
        with pytest.raises(ValueError, match=r"page_block_size must .* got 7"):
            gather_window(np.ones((2, 7, 2), np.float32), [[0]], window,
                key_value_head_num=1, compress_block_size=16)  # fmt: skip

    def test_no_length_wraps(self):
        assert not completed_window(np.array([2**32 + 16]), **self.SIZES).completes[0]

    def test_page_size(self):
        window = completed_window(np.array([16]), **self.SIZES)
        with pytest.raises(ValueError, match="page_block_size"):
            window_slots(window, [[0]], page_block_size=0)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"window": (True, 0, 0)}, TypeError, "window must be what completed_window returns"),
            ({"block_table": [0]}, ValueError, "block_table must have rank 2"),
            ({"block_table": [[0.5]]}, TypeError, "block_table must hold integers"),
            ({"block_table": [[0], [1]]}, ValueError, "a row for each of window's 1 sequences"),
            ({"block_table": [[]]}, ValueError, r"of one page or more, got shape \(1, 0\)"),
            ({"pool": np.ones((0, 16, 4), np.float32)}, ValueError, r"pool must .*\(0, 16, 4\)"),
            ({"pool": np.ones((2, 16, 3), np.int32)}, TypeError, "pool must have dtype"),
            ({"pool": np.ones((2, 16, 3), np.float32)}, ValueError, r"pool must have .*\(2, 16, 3"),
            ({"pool": np.ones((2, 16, 4, 3), np.float32)}, ValueError, "pool must have shape"),
            ({"key_value_head_num": 0}, ValueError, "key_value_head_num must be in"),
            ({"compress_block_size": 17}, ValueError, "compress_block_size must be a multiple"),
        ],
    )
    def test_refused(self, changes, error, message):
        window = completed_window(np.array([16]), **self.SIZES)
        arguments = {
            "pool": np.ones((2, 16, 2, 3), np.float32), "block_table": [[0]], "window": window,
            "key_value_head_num": 2, "compress_block_size": 16,
        }  # fmt: skip
        assert gather_window(**arguments).shape == (1, 16, 2, 3)
        with pytest.raises(error, match=message):
            gather_window(**arguments | changes)
        if changes.keys() <= {"window", "block_table"}:
            table, window = ((arguments | changes)[n] for n in ("block_table", "window"))
            with pytest.raises(error, match=message):
                window_slots(window, table, page_block_size=16)
