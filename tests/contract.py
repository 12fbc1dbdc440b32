"""The contract that every implementation is held to.

A test file subclasses `CompressAttentionContract`, names its implementation and, if it does not
serve every legal call, states its domain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from agreement import ATTENTION_TOLERANCE, assert_agrees
from choices import ChoicesOfBlocks
from hypothesis import given
from hypothesis import strategies as st
from problems import WINDOWS, Domain, Geometry, build, geometries

from jax_nsa import nsa_compress_attention_infer
from jax_nsa.blocks import Blocks
from jax_nsa.compress_attention.door import OPERATOR
from jax_nsa.compress_attention.problem import Problem

ARRAYS = ("query", "key", "value")
INTEGERS = ("block_table", "actual_cmp_seq_kvlen", "actual_seq_qlen", "actual_sel_seq_kvlen")
FORMS = ("eager, host values", "eager, arrays", "jit, host values", "jit, arrays")

SEED_EXAMPLE = Geometry(
    lengths=(1024,) * 20, key_value_heads=2, group=4, head_size=192, value_size=128, page=128,
    spare_slots=0, window=(32, 16, 64), k=16, scale=1.0, hostile=False,
)  # fmt: skip
# Blocks enough that most are a matter of choice, pages and heads enough to be mixed up.
USUAL = Geometry(lengths=(150, 33, 97), head_size=24, value_size=12, page=16, k=8, group=4)
SEVERAL_TOKENS = replace(USUAL, token_counts=(3, 1, 4))


class CompressAttentionContract(ChoicesOfBlocks):
    """What every implementation must do, each test on the calls within its domain."""

    implementation: str
    domain = Domain()
    attention_tolerance = ATTENTION_TOLERANCE
    # Whether calls with faulty run-time values fail, or else give NaN and -1.
    fails_on_faults = False

    # How the tests call it.

    def call(self, arguments: dict[str, Any], form: str = "eager, arrays") -> tuple:
        """Calls the operator with integers that are known beforehand or not."""
        traced = [n for n in ARRAYS if n in arguments]
        if form.endswith("arrays"):
            traced += [n for n in INTEGERS if n in arguments]
        static = {n: v for n, v in arguments.items() if n not in traced}

        def operator(arrays: dict[str, jax.Array]) -> tuple:
            return nsa_compress_attention_infer(
                **static, **arrays, implementation=self.implementation
            )

        operator = jax.jit(operator) if form.startswith("jit") else operator
        return jax.block_until_ready(operator({n: jnp.asarray(arguments[n]) for n in traced}))

    def check(self, geometry: Geometry, form: str = "eager, arrays") -> tuple:
        """Asserts that a legal call agrees with the oracle; returns its results."""
        self.require(geometry)
        arguments = build(geometry)
        results = self.call(arguments, form)
        self.assert_agrees(results, arguments)
        return results

    def assert_agrees(self, results: tuple, arguments: dict[str, Any], **options: Any) -> None:
        """Asserts that results agree with the oracle's for these arguments."""
        assert results[0].dtype == arguments["query"].dtype
        assert_agrees(
            results,
            oracle.compress_attention(**arguments),
            attention_tolerance=self.attention_tolerance[results[0].dtype.name],
            **options,
        )

    def require(self, geometry: Geometry) -> None:
        """Skips a test whose call the implementation does not serve."""
        if not self.domain.contains(geometry):
            pytest.skip(f"outside the domain of {self.implementation}")

    def usual(self, geometry: Geometry = USUAL, **changes: Any) -> Geometry:
        """A geometry in the implementation's last dtype: float32 where it has that."""
        return replace(geometry, **{"dtype": self.domain.dtypes[-1]} | changes)

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

    @given(data=st.data())
    def test_any_legal_call(self, data):
        geometry = data.draw(geometries(self.domain))
        self.check(geometry, data.draw(st.sampled_from(FORMS)))

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

    def test_equal_bits_each_time(self, dtype):
        geometry = self.usual(SEVERAL_TOKENS, dtype=dtype)
        self.require(geometry)
        arguments = build(geometry)
        first = self.call(arguments)
        for _ in range(3):
            for one, other in zip(first, self.call(arguments), strict=True):
                assert np.asarray(one).tobytes() == np.asarray(other).tobytes()

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

    # Forms of a program.

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("geometry", [USUAL, SEVERAL_TOKENS], ids=["one token", "several"])
    def test_forms(self, form, geometry):
        self.check(self.usual(geometry), form)

    def test_scan(self):
        geometry = self.usual(lengths=(31, 8), spare_slots=2, hostile=False, shared_pages=True, k=2)
        arguments, operator = self._operator_of_lengths(geometry)
        start = jnp.asarray(geometry.lengths, jnp.int32)

        def step(lengths, _):
            return lengths + 1, operator(lengths)

        _, results = jax.jit(lambda lengths: jax.lax.scan(step, lengths, length=4))(start)
        for i in range(4):
            step_arguments = {**arguments, "actual_cmp_seq_kvlen": np.asarray(start) + i}
            self.assert_agrees(tuple(r[i] for r in results), step_arguments)

    def test_while_loop(self):
        geometry = self.usual(lengths=(31, 8), spare_slots=2, hostile=False, shared_pages=True, k=2)
        arguments, operator = self._operator_of_lengths(geometry)
        start = jnp.asarray(geometry.lengths, jnp.int32)

        @jax.jit
        def loop(lengths):
            def body(state):
                lengths, _ = state
                return lengths + 1, operator(lengths + 1)

            return jax.lax.while_loop(
                lambda state: state[0][0] < 35, body, (lengths, operator(lengths))
            )

        lengths, results = loop(start)
        assert lengths.tolist() == [35, 12]
        self.assert_agrees(results, {**arguments, "actual_cmp_seq_kvlen": np.asarray(lengths)})

    def test_map(self):
        geometry = self.usual(lengths=(31, 8), spare_slots=0, hostile=False, shared_pages=True, k=2)
        arguments, operator = self._operator_of_lengths(geometry)
        lengths = jnp.asarray([[31, 8], [8, 31], [12, 24]], jnp.int32)
        results = jax.jit(lambda lengths: jax.lax.map(operator, lengths))(lengths)
        for i in range(3):
            step_arguments = {**arguments, "actual_cmp_seq_kvlen": np.asarray(lengths[i])}
            self.assert_agrees(tuple(r[i] for r in results), step_arguments)

    def _operator_of_lengths(self, geometry: Geometry) -> tuple[dict[str, Any], Callable]:
        """Arguments whose pages serve any lengths, and the operator with all but lengths bound."""
        self.require(geometry)
        arguments = build(geometry)
        num_pages = len(arguments["key"])
        rng = np.random.default_rng(1)
        shape = arguments["block_table"].shape
        arguments["block_table"] = rng.integers(0, num_pages, shape, dtype=np.int32)
        for name in ("key", "value"):
            pool = arguments[name]
            arguments[name] = rng.standard_normal(pool.shape).astype(pool.dtype)
        bound = {
            n: jnp.asarray(v) if n in (*ARRAYS, "block_table") else v
            for n, v in arguments.items()
            if n != "actual_cmp_seq_kvlen"
        }

        def operator(lengths: jax.Array) -> tuple:
            return nsa_compress_attention_infer(
                **bound, actual_cmp_seq_kvlen=lengths, implementation=self.implementation
            )

        return arguments, operator

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
        operands = {n: jnp.asarray(arguments[n]) for n in (*ARRAYS, "block_table")}
        operands["query"] = operands["query"][:, None]
        operands["lengths"] = jnp.asarray(arguments["actual_cmp_seq_kvlen"])
        results = OPERATOR.bind(operands, problem=problem, implementation=(self.implementation,))
        assert results["attention"].dtype == np.float32  # unrounded, for merging
        assert_agrees(
            [r[:, 0] for r in results.values()],
            oracle.compress_attention(**arguments),
            attention_tolerance=self.attention_tolerance[dtype],
        )

    # Faulty values that only the running program can see.

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
            self._assert_fails(arguments, "actual_seq_qlen[0]")
        else:
            self._assert_blank(self.call(arguments))

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
                self._assert_fails(arguments, "[0]")
            else:
                self._assert_blank(self.call(arguments))

    def _check_fault(self, geometry, name, index, value, message, *, faulty) -> None:
        """Asserts what one faulty integer does to the `faulty` rows and to the others."""
        self.require(geometry)
        arguments = build(geometry)
        expected = oracle.compress_attention(**arguments)
        arguments[name][index] = value
        if self.fails_on_faults:
            self._assert_fails(arguments, name, message)
            return
        results = self.call(arguments)
        self._assert_blank(results, faulty)
        if others := [row for row in range(len(results[0])) if row not in faulty]:
            tolerance = self.attention_tolerance[geometry.dtype]
            assert_agrees(results, expected, attention_tolerance=tolerance, rows=others)

    def _assert_fails(self, arguments, *messages) -> None:
        for form in ("eager, arrays", "jit, arrays"):
            # JAX raises XLA's InvalidArgument as the one or the other.
            with pytest.raises((ValueError, jax.errors.JaxRuntimeError)) as failure:
                self.call(arguments, form)
            for message in ("INVALID_ARGUMENT", *messages):
                assert message in str(failure.value)

    def _assert_blank(self, results, rows=...) -> None:
        for result in (np.asarray(r)[rows] for r in results):
            blank = np.full_like(result, -1 if result.dtype == np.int32 else np.nan)
            np.testing.assert_array_equal(result, blank)
