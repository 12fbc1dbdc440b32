"""What every implementation must do under transformations, and in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress.calls import COUNTED, FLOATS, INTEGERS, PAIR, ROUNDING, USUAL, Calls, copies
from compress.problems import CACHES, build
from contract import bits

from jax_nsa import nsa_compress_infer


class Transformations(Calls):
    """Maps, loops, donated caches."""

    @pytest.mark.parametrize("mapped", ["weight", "cache", "input", "slot_mapping", "bias"])
    def test_vmap_over_one_argument(self, mapped):
        arguments = build(self.usual(COUNTED, hostile=False))
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
        arguments = build(self.usual(USUAL, hostile=False))  # all slots may be used
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
        geometry = self.usual(USUAL, lengths=(95, 80), heads=2, hostile=False)
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
        geometry = self.usual(PAIR, cache=cache, lengths=(48, 47, 80))
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
        assert copies(compiled, {c.size for c in caches}) == []
        aliased = compiled.memory_analysis().alias_size_in_bytes
        assert aliased >= sum(c.nbytes for c in caches)
        self.assert_agrees(jax.tree.map(np.asarray, compiled(caches, floats, integers)), arguments)

    def test_a_cache_that_is_still_needed_stays(self):
        arguments = build(self.usual(USUAL))
        cache = jnp.asarray(arguments["cache"])

        @jax.jit
        def run(cache):
            given = {**arguments, "cache": cache}
            return cache + 0, nsa_compress_infer(**given, implementation=self.implementation)

        before, after = run(cache)
        np.testing.assert_array_equal(*(np.float32(c) for c in (before, arguments["cache"])))
        np.testing.assert_array_equal(bits(cache), bits(arguments["cache"]))
        self.assert_agrees(np.asarray(after), arguments)
