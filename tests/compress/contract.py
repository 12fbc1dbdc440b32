"""The contract of compression into the cache that every implementation is held to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress.calls import FLOATS, PAIR, USUAL
from compress.faults import Faults
from compress.problems import CACHES, WINDOWS, build
from compress.transformations import Transformations
from contract import FORMS, bits

from jax_nsa import nsa_compress_infer


class CompressContract(Transformations, Faults):
    """What every implementation must do."""

    # Forms, dtypes, shapes.

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_dtype(self, dtype, example):
        self.check(self.usual(example, dtype=dtype))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("bias", [False, True])
    def test_float32_weights(self, dtype, bias):
        self.check(self.usual(USUAL, dtype=dtype, weight_dtype="float32", bias=bias))

    @pytest.mark.parametrize("input_rank", [3, 4])
    @pytest.mark.parametrize("cache", CACHES)
    def test_shapes(self, input_rank, cache):
        self.check(self.usual(PAIR, input_rank=input_rank, cache=cache))

    @pytest.mark.parametrize("window", WINDOWS, ids=str)
    def test_window(self, window):
        size, stride = window
        lengths = (size, size + 3 * stride, size + stride - 1, size + stride)
        self.check(self.usual(USUAL, window=window, lengths=lengths, page=48))

    @pytest.mark.parametrize("page", [16, 48, 128, 256])
    @pytest.mark.parametrize("size", [16, 80, 128])
    def test_windows_across_pages(self, page, size):
        self.check(self.usual(USUAL, page=page, window=(size, 16), lengths=(size, 272 + size, 144)))

    @pytest.mark.parametrize(("heads", "size"), [(1, 1), (3, 17), (16, 64), (1, 256), (130, 3)])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_heads(self, heads, size, dtype):
        self.check(self.usual(USUAL, heads=heads, head_sizes=(size,), dtype=dtype))

    def test_many_sequences(self):
        lengths = tuple(int(n) for n in np.random.default_rng(0).integers(0, 20, 200) * 8)
        self.check(self.usual(PAIR, lengths=lengths, dtype="bfloat16"))

    # Which windows end.

    @pytest.mark.parametrize("window", [(32, 16), (48, 32), (64, 64)])
    @pytest.mark.parametrize("count", [0, 1, 2, 15, 16])
    def test_every_length(self, window, count):
        lengths = tuple(range(window[0] + 2 * window[1] + 3))
        geometry = self.usual(
            USUAL, window=window, lengths=lengths, token_counts=(count,) * len(lengths), heads=1
        )
        arguments = build(geometry)
        written = self.assert_agrees(self.call(arguments), arguments)
        assert written == sum(e is not None for e in geometry.ends)
        assert (written > 0) == (count > 0)

    def test_no_window_ends_before_the_first_one(self):
        """Also where nothing else would stop it."""
        geometry = self.usual(USUAL, lengths=(0, 15, 16, 31, 32), hostile=False)
        arguments = build(geometry)
        assert self.assert_agrees(self.call(arguments, "jit, arrays"), arguments) == 1

    def test_a_step_passes_over_no_window(self):
        """The window ends two tokens before the last one."""
        geometry = self.usual(USUAL, lengths=(50,), token_counts=(4,))
        arguments = build(geometry)
        assert self.assert_agrees(self.call(arguments), arguments) == 1
        arguments["actual_seq_qlen"][:] = 2
        assert self.assert_agrees(self.call(arguments), arguments) == 0

    def test_more_tokens_than_length(self):
        self.check(self.usual(USUAL, lengths=(3, 16), token_counts=(16, 16), window=(16, 16)))

    def test_negative_slots_are_skipped(self):
        geometry = self.usual(PAIR, skipped=(0, 2))
        arguments = build(geometry)
        for slot in (-1, -2, -(2**31)):
            arguments["slot_mapping"][0] = slot
            for form in FORMS:
                written = self.assert_agrees(self.call(arguments, form), arguments)
                assert written == 1

    def test_first_and_last_row(self):
        arguments = build(self.usual(USUAL, lengths=(32, 48, 31)))
        arguments["slot_mapping"][:2] = len(arguments["cache"]) - 1, 0
        assert self.assert_agrees(self.call(arguments), arguments) == 2

    def test_weights_of_every_place_and_head(self):
        """Each weight counts for its own token and head alone."""
        arguments = build(self.usual(USUAL, lengths=(48,), bias=False, heads=3))
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
        geometry = self.usual(
            USUAL, dtype="bfloat16", lengths=(128,), window=(128, 16), bias=False, hostile=False
        )
        arguments = build(geometry)
        arguments["input"][:] = 1
        arguments["weight"][:] = 1
        arguments["weight"][0] = 256
        row = np.asarray(self.call(arguments))[arguments["slot_mapping"][0]]
        np.testing.assert_array_equal(row.astype(np.float32), 384)  # 383 rounded

    def test_no_sequences(self):
        arguments = build(self.usual(PAIR))
        for name in ("slot_mapping", "block_table", "actual_seq_len"):
            arguments[name] = arguments[name][:0]
        self.assert_agrees(self.call(arguments), arguments)

    def test_a_cache_without_rows(self):
        arguments = build(self.usual(USUAL, lengths=(32, 31), skipped=(0,)))
        arguments["cache"] = arguments["cache"][:0]
        assert self.call(arguments).shape == (0, 2, 5)

    def test_a_pair_is_two_calls(self):
        arguments = build(self.usual(PAIR))
        together = self.call(arguments)
        for i, cache in enumerate(together):
            own = {n: v[i] if n in FLOATS else v for n, v in arguments.items()}
            np.testing.assert_array_equal(bits(self.call(own)), bits(cache))

    @pytest.mark.parametrize("others", [("rows", "pages"), ("pages of heads", "rows")])
    def test_caches_of_two_shapes(self, others):
        arguments = build(self.usual(PAIR))
        caches = [
            build(self.usual(PAIR, cache=cache))["cache"][i] for i, cache in enumerate(others)
        ]
        given = arguments | {"cache": tuple(caches)}
        self.assert_agrees(self.call(given, "jit, arrays"), given)

    @pytest.mark.parametrize("names", [("cache",), ("input", "cache")], ids=str)
    def test_one_array_as_several(self, names):
        """Two caches are one array, or inputs and caches are: what is read is what was given."""
        arguments = build(self.usual(USUAL, head_sizes=(5, 5), cache="pages", hostile=False))
        array = arguments[names[0]][0]
        given = arguments | dict.fromkeys(names, (array, array))

        def run(array):
            return nsa_compress_infer(
                **given | dict.fromkeys(names, (array, array)),
                implementation=self.implementation,
            )

        results = jax.jit(run, donate_argnums=0)(jnp.array(array))
        self.assert_agrees(results, given)
