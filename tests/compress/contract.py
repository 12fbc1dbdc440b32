"""The contract of compression into the cache that every implementation is held to."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress import oracle
from compress.problems import CACHES, WINDOWS, Geometry, build, geometries
from hypothesis import given

from jax_nsa import nsa_compress_infer

FLOATS = ("input", "weight", "cache", "bias")
INTEGERS = ("slot_mapping", "block_table", "actual_seq_len", "actual_seq_qlen")
FORMS = ("eager, host values", "eager, arrays", "jit, host values", "jit, arrays")
# Half the distance between neighbours, relative: what one rounding does.
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
SUBNORMAL = {"bfloat16": 2.0**-134, "float16": 2.0**-25, "float32": 2.0**-150}
USUAL = Geometry()
PAIR = Geometry(head_sizes=(7, 4))
# Sequences 0, 2 and 3 complete a window; 1 does not.
COUNTED = replace(USUAL, lengths=(49, 47, 95, 32), token_counts=(3, 2, 16, 1))


def listed(value: Any) -> list[Any]:
    """The arrays of an argument that is one or a pair."""
    return list(value) if isinstance(value, tuple) else [value]


def bits(array: Any) -> np.ndarray:
    """An array's bits, so that NaN equals NaN."""
    array = np.asarray(array)
    return array.view(f"u{array.itemsize}")


class CompressContract:
    """What every implementation must do."""

    implementation: str
    # Whether faulty run-time values fail the call unless told otherwise.
    fails_on_faults = False

    def call(self, arguments: dict[str, Any], form: str = "eager, arrays", **options: Any) -> Any:
        """Calls the operator with integers that are known beforehand or not."""
        traced = [n for n in FLOATS if n in arguments]
        if form.endswith("arrays"):
            traced += [n for n in INTEGERS if n in arguments]
        static = {n: v for n, v in arguments.items() if n not in traced}

        def run(arrays: dict[str, Any]) -> Any:
            return nsa_compress_infer(
                **static, **arrays, implementation=self.implementation, **options
            )

        run = jax.jit(run) if form.startswith("jit") else run
        arrays = {n: jax.tree.map(jnp.asarray, arguments[n]) for n in traced}
        return jax.block_until_ready(run(arrays))

    def check(self, geometry: Geometry, form: str = "eager, arrays", **changes: Any) -> Any:
        """Asserts that a legal call agrees with the oracle; returns its results."""
        arguments = build(geometry) | changes
        results = self.call(arguments, form)
        self.assert_agrees(results, arguments)
        return results

    def assert_agrees(
        self, results: Any, arguments: dict[str, Any], *, unwritten: tuple[int, ...] = ()
    ) -> int:
        """Asserts that each cache is as the oracle says, but for windows of some sequences.

        Returns:
            How many rows are written.
        """
        results = listed(results)
        slots = np.array(arguments["slot_mapping"], np.int64)
        slots[list(unwritten)] = -1
        arguments = {**arguments, "slot_mapping": slots}
        assert len(results) == len(listed(arguments["cache"]))
        for i, result in enumerate(results):
            own = {n: listed(v)[i] if n in FLOATS else v for n, v in arguments.items()}
            expected = oracle.compress(**own)
            before = own["cache"]
            assert result.dtype == before.dtype
            assert result.shape == before.shape
            shape = self._shape(own)
            rows = np.asarray(result).reshape(shape)
            untouched = [r for r in range(len(rows)) if r not in expected.rows]
            np.testing.assert_array_equal(
                bits(rows[untouched]), bits(before.reshape(shape)[untouched]), "other rows"
            )
            for row, truth in expected.rows.items():
                error = abs(rows[row].astype(np.float64) - truth)
                name = result.dtype.name
                # Float32 accumulates a sum to about this, and rounds it to the cache's dtype.
                legal = ROUNDING[name] * abs(truth) + 2.0**-21 * expected.sizes[row]
                np.testing.assert_array_less(error, legal + 2 * SUBNORMAL[name], f"row {row}")
        return len(expected.rows)

    @staticmethod
    def _shape(own: dict[str, Any]) -> tuple[int, int, int]:
        """Rows, heads and head size of a cache."""
        heads = own["weight"].shape[1]
        head_size = int(np.prod(own["input"].shape[2:])) // heads
        return own["cache"].size // (heads * head_size), heads, head_size

    # Forms, dtypes, shapes.

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    @pytest.mark.parametrize("geometry", [USUAL, PAIR, COUNTED], ids=["one", "pair", "counted"])
    def test_form(self, form, dtype, geometry):
        self.check(replace(geometry, dtype=dtype), form)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("bias", [False, True])
    def test_float32_weights(self, dtype, bias):
        self.check(replace(USUAL, dtype=dtype, weight_dtype="float32", bias=bias))

    @pytest.mark.parametrize("input_rank", [3, 4])
    @pytest.mark.parametrize("cache", CACHES)
    def test_shapes(self, input_rank, cache):
        self.check(replace(PAIR, input_rank=input_rank, cache=cache))

    @pytest.mark.parametrize("window", WINDOWS, ids=str)
    def test_window(self, window):
        size, stride = window
        lengths = (size, size + 3 * stride, size + stride - 1, size + stride)
        self.check(replace(USUAL, window=window, lengths=lengths, page=48))

    @pytest.mark.parametrize("page", [16, 48, 128, 256])
    @pytest.mark.parametrize("size", [16, 80, 128])
    def test_windows_across_pages(self, page, size):
        self.check(replace(USUAL, page=page, window=(size, 16), lengths=(size, 272 + size, 144)))

    @pytest.mark.parametrize(("heads", "size"), [(1, 1), (3, 17), (16, 64), (1, 256), (130, 3)])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_heads(self, heads, size, dtype):
        self.check(replace(USUAL, heads=heads, head_sizes=(size,), dtype=dtype))

    @given(geometry=geometries())
    def test_any_legal_call(self, geometry):
        self.check(geometry)

    def test_many_sequences(self):
        lengths = tuple(int(n) for n in np.random.default_rng(0).integers(0, 20, 200) * 8)
        self.check(replace(PAIR, lengths=lengths, dtype="bfloat16"))

    # Which windows end.

    @pytest.mark.parametrize("window", [(32, 16), (48, 32), (64, 64)])
    @pytest.mark.parametrize("count", [0, 1, 2, 15, 16])
    def test_every_length(self, window, count):
        lengths = tuple(range(window[0] + 2 * window[1] + 3))
        geometry = replace(
            USUAL, window=window, lengths=lengths, token_counts=(count,) * len(lengths), heads=1
        )
        arguments = build(geometry)
        written = self.assert_agrees(self.call(arguments), arguments)
        assert written == sum(e is not None for e in geometry.ends)
        assert (written > 0) == (count > 0)

    def test_no_window_ends_before_the_first_one(self):
        """Also where nothing else would stop it."""
        geometry = replace(USUAL, lengths=(0, 15, 16, 31, 32), hostile=False)
        arguments = build(geometry)
        assert self.assert_agrees(self.call(arguments, "jit, arrays"), arguments) == 1

    def test_a_step_passes_over_no_window(self):
        """The window ends two tokens before the last one."""
        geometry = replace(USUAL, lengths=(50,), token_counts=(4,))
        arguments = build(geometry)
        assert self.assert_agrees(self.call(arguments), arguments) == 1
        arguments["actual_seq_qlen"][:] = 2
        assert self.assert_agrees(self.call(arguments), arguments) == 0

    def test_more_tokens_than_length(self):
        self.check(replace(USUAL, lengths=(3, 16), token_counts=(16, 16), window=(16, 16)))

    def test_negative_slots_are_skipped(self):
        geometry = replace(PAIR, skipped=(0, 2))
        arguments = build(geometry)
        for slot in (-1, -2, -(2**31)):
            arguments["slot_mapping"][0] = slot
            for form in FORMS:
                written = self.assert_agrees(self.call(arguments, form), arguments)
                assert written == 1

    def test_first_and_last_row(self):
        arguments = build(replace(USUAL, lengths=(32, 48, 31)))
        arguments["slot_mapping"][:2] = len(arguments["cache"]) - 1, 0
        assert self.assert_agrees(self.call(arguments), arguments) == 2

    def test_weights_of_every_place_and_head(self):
        """Each weight counts for its own token and head alone."""
        arguments = build(replace(USUAL, lengths=(48,), bias=False, heads=3))
        for t, head in ((0, 0), (31, 2), (16, 1)):
            weight = np.zeros((32, 3), np.float32)
            weight[t, head] = 1
            row = np.asarray(self.call(arguments | {"weight": weight}))
            row = row[arguments["slot_mapping"][0]]
            page = arguments["block_table"][0, (16 + t) // 16]
            token = arguments["input"].reshape(-1, 16, 3, 5)[page, t % 16]
            np.testing.assert_array_equal(row[head], token[head])
            np.testing.assert_array_equal(np.delete(row, head, 0), 0)

    def test_float32_accumulation(self):
        """128 terms of which bfloat16 would lose all but the first."""
        geometry = replace(
            USUAL, dtype="bfloat16", lengths=(128,), window=(128, 16), bias=False, hostile=False
        )
        arguments = build(geometry)
        arguments["input"][:] = 1
        arguments["weight"][:] = 1
        arguments["weight"][0] = 256
        row = np.asarray(self.call(arguments))[arguments["slot_mapping"][0]]
        np.testing.assert_array_equal(row.astype(np.float32), 384)  # 383 rounded

    def test_no_sequences(self):
        arguments = build(PAIR)
        for name in ("slot_mapping", "block_table", "actual_seq_len"):
            arguments[name] = arguments[name][:0]
        self.assert_agrees(self.call(arguments), arguments)

    def test_a_cache_without_rows(self):
        arguments = build(replace(USUAL, lengths=(32, 31), skipped=(0,)))
        arguments["cache"] = arguments["cache"][:0]
        assert self.call(arguments).shape == (0, 2, 5)

    def test_a_pair_is_two_calls(self):
        arguments = build(PAIR)
        together = self.call(arguments)
        for i, cache in enumerate(together):
            own = {n: v[i] if n in FLOATS else v for n, v in arguments.items()}
            np.testing.assert_array_equal(bits(self.call(own)), bits(cache))

    # Transformations.

    def test_vmap(self):
        each = [build(replace(PAIR, seed=seed)) for seed in range(3)]
        names = ("input", "cache", "slot_mapping", "block_table", "actual_seq_len")
        stacked = {n: jax.tree.map(lambda *a: jnp.stack(a), *(a[n] for a in each)) for n in names}
        shared = {n: v for n, v in each[0].items() if n not in names}

        def run(arrays):
            return nsa_compress_infer(**shared, **arrays, implementation=self.implementation)

        results = jax.vmap(run)(stacked)
        for i, arguments in enumerate(each):
            self.assert_agrees(tuple(np.asarray(r[i]) for r in results), arguments | {
                n: shared[n] for n in ("weight", "bias") if n in shared
            })  # fmt: skip

    @pytest.mark.parametrize("mapped", ["weight", "cache", "input", "slot_mapping", "bias"])
    def test_vmap_over_one_argument(self, mapped):
        arguments = build(replace(COUNTED, hostile=False))
        if mapped not in arguments:
            pytest.skip(f"{self.implementation} takes no {mapped}")
        value = arguments[mapped]
        values = np.stack([value, value[::-1]])
        static = {n: v for n, v in arguments.items() if n != mapped}

        def run(one):
            return nsa_compress_infer(**static, **{mapped: one}, implementation=self.implementation)

        results = jax.vmap(run)(jnp.asarray(values))
        for result, one in zip(results, values, strict=True):
            self.assert_agrees(np.asarray(result), arguments | {mapped: one})

    def test_nested_vmap(self):
        arguments = build(replace(USUAL, hostile=False))  # all slots may be used
        caches = np.stack([arguments["cache"]] * 6).reshape(2, 3, *arguments["cache"].shape)
        slots = np.stack([np.roll(arguments["slot_mapping"], i) for i in range(3)])
        slots = np.where(slots >= len(arguments["cache"]), -1, slots)

        def run(cache, slot_mapping):
            given = {**arguments, "cache": cache, "slot_mapping": slot_mapping}
            return nsa_compress_infer(**given, implementation=self.implementation)

        results = jax.vmap(jax.vmap(run), (0, None))(jnp.asarray(caches), jnp.asarray(slots))
        for i in range(2):
            for j in range(3):
                given = arguments | {"slot_mapping": slots[j]}
                self.assert_agrees(np.asarray(results[i, j]), given)

    def test_scan_over_growing_sequences(self):
        """Two sequences decode 60 tokens; every window that ends on the way is in the cache."""
        size, stride, page, steps = 32, 16, 16, 60
        geometry = replace(USUAL, lengths=(95, 80), heads=2, hostile=False)
        arguments = build(geometry)
        random = np.random.default_rng(3)
        dtype = arguments["input"].dtype
        pool = random.standard_normal(arguments["input"].shape).astype(dtype)
        table = random.permutation(12)[: 2 * 6].reshape(2, 6).astype(np.int32) % len(pool)
        start = np.array([30, 17], np.int32)
        cache = np.full((20, 2, 5), np.nan, dtype)
        given = {**arguments, "input": pool, "block_table": table}
        given = {n: v for n, v in given.items() if n not in ("slot_mapping", "actual_seq_len")}

        def step(carry, _):
            lengths, cache = carry
            lengths = lengths + 1
            slots = (lengths - size) // stride + jnp.array([0, 10])
            cache = nsa_compress_infer(
                **{**given, "cache": cache}, slot_mapping=slots, actual_seq_len=lengths,
                implementation=self.implementation,
            )  # fmt: skip
            return (lengths, cache), None

        decode = jax.jit(lambda *carry: jax.lax.scan(step, carry, length=steps)[0])
        lengths, result = decode(start, cache)
        written = {10 * b + (int(e) - size) // stride: (b, e)
                   for b in range(2) for e in range(start[b] + 1, int(lengths[b]) + 1)
                   if e >= size and (e - size) % stride == 0}  # fmt: skip
        assert len(written) == 7
        for row in range(20):
            if row not in written:
                assert np.all(np.isnan(result[row]))
                continue
            b, e = written[row]
            tokens = np.stack([pool[table[b, i // page], i % page] for i in range(e - size, e)])
            truth = np.einsum(
                "lhd,lh->hd", tokens.reshape(size, 2, 5), given["weight"], dtype=np.float64
            )
            error = np.asarray(result[row], np.float64) - truth - given.get("bias", 0)
            limit = 1e-4 + ROUNDING[dtype.name] * abs(truth) + 1e-4 * abs(truth)
            np.testing.assert_array_less(abs(error), limit)

    # The cache is updated in place.

    @pytest.mark.parametrize("cache", CACHES)
    @pytest.mark.parametrize("scanned", [False, True])
    def test_a_donated_cache_is_not_copied(self, cache, scanned):
        geometry = replace(PAIR, cache=cache, lengths=(48, 47, 80))
        arguments = build(geometry)
        static = {n: v for n, v in arguments.items() if n in INTEGERS or isinstance(v, int)}
        floats = {n: v for n, v in arguments.items() if n in FLOATS and n != "cache"}
        integers = {n: jnp.asarray(static.pop(n)) for n in INTEGERS if n in static}

        def step(cache, floats, integers):
            return nsa_compress_infer(
                **static, **floats, **integers, cache=cache, implementation=self.implementation
            )

        def steps(cache, floats, integers):
            return jax.lax.scan(
                lambda cache, _: (step(cache, floats, integers), None), cache, length=3
            )[0]

        run = jax.jit(steps if scanned else step, donate_argnums=0)
        caches = jax.tree.map(jnp.asarray, arguments["cache"])
        compiled = run.lower(caches, floats, integers).compile()
        sizes = {c.size for c in caches}
        for line in compiled.as_text().splitlines():
            if found := re.search(r"= \w+\[([\d,]*)\]\S* copy\(", line):
                size = np.prod([int(n) for n in found[1].split(",") if n])
                assert size not in sizes, f"a cache is copied: {line}"
        aliased = compiled.memory_analysis().alias_size_in_bytes
        assert aliased >= sum(c.nbytes for c in caches)
        self.assert_agrees(jax.tree.map(np.asarray, compiled(caches, floats, integers)), arguments)

    def test_a_cache_that_is_still_needed_stays(self):
        arguments = build(USUAL)
        cache = jnp.asarray(arguments["cache"])

        @jax.jit
        def run(cache):
            given = {**arguments, "cache": cache}
            return cache + 0, nsa_compress_infer(**given, implementation=self.implementation)

        before, after = run(cache)
        np.testing.assert_array_equal(np.isnan(before), np.isnan(arguments["cache"]))
        np.testing.assert_array_equal(bits(cache), bits(arguments["cache"]))
        self.assert_agrees(np.asarray(after), arguments)

    # Faulty values that only the running program can see.

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
        arguments = build(replace(COUNTED, head_sizes=(5, 3), hostile=hostile))
        faulty = {**arguments, name: arguments[name].copy()}
        faulty[name][index] = value
        self._check_fault(faulty, arguments, message, unwritten=(2,))

    def test_a_row_for_two(self):
        arguments = build(COUNTED)
        slots = arguments["slot_mapping"].copy()
        slots[3] = slots[0]
        faulty = {**arguments, "slot_mapping": slots}
        self._check_fault(faulty, arguments, "slot_mapping[3]", unwritten=(0, 3))

    def test_a_row_for_three_of_which_one_has_no_window(self):
        """A sequence that completes no window claims no row, one with a bad page does."""
        arguments = build(COUNTED)
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
        arguments = build(COUNTED)
        arguments["slot_mapping"][1] = 2**31 - 1
        arguments["block_table"][1] = -7
        assert self.assert_agrees(self.call(arguments, "jit, arrays"), arguments) == 3

    def test_pages_outside_the_window_are_not_needed(self):
        arguments = build(replace(USUAL, lengths=(96,), hostile=False))
        arguments["block_table"][0, :4] = -1
        arguments["block_table"][0, 6:] = 999
        for form in FORMS:
            assert self.assert_agrees(self.call(arguments, form), arguments) == 1

    def test_every_fault_at_once(self):
        arguments = build(COUNTED)
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
                # JAX raises XLA's InvalidArgument as the one or the other.
                with pytest.raises((ValueError, jax.errors.JaxRuntimeError)) as caught:
                    self.call(faulty, form)
                assert message in str(caught.value)
                assert "INVALID_ARGUMENT" in str(caught.value)
            results = self.call(faulty, form, on_fault="nan")
            self.assert_agrees(results, arguments, unwritten=unwritten)
