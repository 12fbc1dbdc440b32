"""Why pools do not stay on the NPU under host JAX: what JAX does to a handle that names them.

Each test is a legal program of pure functions, whose right results follow from its text alone. A
cache that trusts its handles gives wrong numbers or runs writes as often as XLA likes; one that
checks them refuses legal programs instead. docs/ascend.md draws the conclusion.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ascend.resident import HEADS, PAGE, PAGES, SCALE, SIZE, WINDOW, ResidentCache
from jax.experimental import io_callback

from jax_nsa import nsa_compress_attention_infer

pytest_plugins = ("ascend.fixtures",)

TABLE = jnp.arange(2, dtype=jnp.int32)[None]
ONE, TWO = (jnp.full((1, 2, SIZE), value, jnp.bfloat16) for value in (1, 2))
FIRST = jnp.zeros(1, jnp.int32)  # row
QUERY = jnp.ones((1, HEADS, SIZE), jnp.bfloat16)
LENGTH = jnp.ones(1, jnp.int32)
REFUSED = pytest.raises(Exception, match=r"the handle is of version \d, and cache \d+ is at \d")


@pytest.fixture
def trusting(standin):
    cache = ResidentCache(standin, checks=False)
    yield cache
    cache.close()


@pytest.fixture
def checking(standin):
    cache = ResidentCache(standin, checks=True)
    yield cache
    cache.close()


@pytest.fixture(params=["trusting", "checking"])
def cache(request):
    return request.getfixturevalue(request.param)


def value_of(cache, handle, query=QUERY):
    """The value in the first row, as attention to it alone."""
    attention, _ = cache.attend(handle, query, TABLE, LENGTH)
    return attention[0, 0, 0]


def on_each_device(function):
    """A function that each of four devices runs on the same operands."""
    mesh, spec = jax.make_mesh((4,), ("x",)), jax.sharding.PartitionSpec()
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def test_a_linear_program_is_right_and_moves_little(cache, standin):
    """Each handle used once: rows go in, query, table and results; the pools stay."""
    key = jax.random.key(0)
    rows = jax.random.normal(key, (20, 1, 2, SIZE), jnp.bfloat16)
    query = jax.random.normal(key, (20, 1, HEADS, SIZE), jnp.bfloat16)
    at = jnp.arange(20, dtype=jnp.int32)[:, None]

    @jax.jit
    def decode(handle, rows, query):
        def step(handle, operands):
            rows, query, at = operands
            handle = cache.write(handle, rows, at)
            return handle, cache.attend(handle, query, TABLE, at + 1)

        return jax.lax.scan(step, handle, (rows, query, at))

    before = [standin.counter(f"bytes to {where}") for where in ("device", "host")]
    handle, (attention, indices) = jax.block_until_ready(decode(cache.handle, rows, query))
    after = [standin.counter(f"bytes to {where}") for where in ("device", "host")]
    assert handle.tolist() == [cache.number, 20]
    moved = [sum(array.nbytes for array in group) for group in (
        (rows, query, jnp.tile(TABLE, (20, 1))), (attention, indices),
    )]  # fmt: skip
    assert np.subtract(after, before).tolist() == moved

    pools = jnp.zeros((2, PAGES * PAGE, SIZE), jnp.bfloat16).at[:, :20].set(
        rows[:, 0].swapaxes(0, 1)
    ).reshape(2, PAGES, PAGE, SIZE)  # fmt: skip
    for t in (0, 7, 19):
        expected, blocks = nsa_compress_attention_infer(
            query[t], *pools, SCALE, HEADS, 1, WINDOW[2], 1, PAGE, *WINDOW[:2],
            block_table=TABLE, actual_cmp_seq_kvlen=at[t] + 1, implementation="reference",
        )  # fmt: skip
        np.testing.assert_allclose(
            attention[t].astype(np.float32), expected.astype(np.float32), atol=2e-2
        )
        np.testing.assert_array_equal(indices[t], blocks)


class TestTwoFuturesOfOneHandle:
    """As beams, or drafts of which one is taken."""

    def program(self, cache):
        @jax.jit
        def both(handle):
            one, two = cache.write(handle, ONE, FIRST), cache.write(handle, TWO, FIRST)
            return value_of(cache, one), value_of(cache, two)

        return jax.block_until_ready(both(cache.handle))

    def test_trusted(self, trusting):
        assert [*map(float, self.program(trusting))] != [1, 2]

    def test_checked(self, checking):
        with REFUSED:
            self.program(checking)

    def test_under_vmap(self, checking):
        with REFUSED:
            jax.vmap(lambda rows: checking.write(checking.handle, rows, FIRST))(
                jnp.stack([ONE, TWO])
            ).block_until_ready()


class TestAnOldHandle:
    """A value does not change because another was made of it: it is 0 before the write."""

    def program(self, cache):
        @jax.jit
        def read_behind_a_write(old):
            new = cache.write(old, ONE, FIRST)
            query = QUERY + 0 * new.sum().astype(QUERY.dtype)
            return value_of(cache, old, query)

        return float(read_behind_a_write(cache.handle))

    def test_trusted(self, trusting):
        assert self.program(trusting) == 1

    def test_checked(self, checking):
        with REFUSED:
            self.program(checking)

    def test_the_same_call_twice(self, checking):
        """As to measure it, or after an error elsewhere."""
        step = jax.jit(lambda handle: value_of(checking, checking.write(handle, ONE, FIRST)))
        handle = checking.handle
        assert float(step(handle)) == 1
        with REFUSED:
            float(step(handle))


class TestHowOftenAWriteRuns:
    """As often as XLA finds right, for a function of its operands."""

    def test_equal_writes_are_merged(self, trusting):
        two = jax.jit(lambda h: [trusting.write(h, ONE, FIRST) for _ in range(2)])
        jax.block_until_ready(two(trusting.handle))
        assert trusting.writes == 1

    def test_unused_writes_are_dropped(self, trusting):
        def write_and_forget(handle):
            trusting.write(handle, ONE, FIRST)
            return handle

        jax.block_until_ready(jax.jit(write_and_forget)(trusting.handle))
        assert trusting.writes == 0

    def test_every_device_writes(self, trusting):
        """Four that hold one handle between them."""
        write = on_each_device(lambda handle: trusting.write(handle, ONE, FIRST))
        jax.block_until_ready(jax.jit(write)(trusting.handle))
        assert trusting.writes == 4

    def test_every_device_but_one_is_refused(self, checking):
        write = on_each_device(lambda handle: checking.write(handle, ONE, FIRST))
        with REFUSED:
            jax.block_until_ready(jax.jit(write)(checking.handle))


class TestEffectsInPlaceOfValues:
    """JAX's ordered effects run once each, in the order of the text, but for callbacks alone.

    A custom call can at most be neither merged nor dropped.
    """

    def write(self, cache, rows):
        def now(*operands):
            return cache.write_now(*operands)[0]

        new = jax.ShapeDtypeStruct((2,), np.int32)
        return io_callback(now, new, cache.handle, rows, FIRST, ordered=True)

    def test_each_runs(self, trusting):
        two = jax.jit(lambda rows: [self.write(trusting, rows) for _ in range(2)])
        jax.block_until_ready(two(ONE))
        assert trusting.writes == 2

    def test_not_under_vmap(self, trusting):
        with pytest.raises(ValueError, match="Cannot `vmap` ordered"):
            jax.vmap(partial(self.write, trusting))(jnp.stack([ONE, TWO]))

    def test_once_for_each_device(self, trusting):
        jax.block_until_ready(jax.jit(on_each_device(partial(self.write, trusting)))(ONE))
        assert trusting.writes == 4


def test_nothing_frees_what_a_handle_names(checking, standin):
    """An array that goes calls nobody: the memory is the owner's, and programs may outlive him."""
    live = standin.counter("live device memory")
    handle = checking.write(checking.handle, ONE, FIRST)
    step = jax.jit(lambda: value_of(checking, handle))
    assert float(step()) == 1
    assert standin.counter("live device memory") == live
    checking.close()
    with pytest.raises(Exception, match=r"of cache \d+, which is not there"):
        float(step())
