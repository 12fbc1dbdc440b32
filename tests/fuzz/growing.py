"""Histories of a cache that grows: sequences join, grow, are cut short and leave."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import caches
import jax
import jax.numpy as jnp
import numpy as np

from fuzz.draw import Random, pick


@functools.cache
def programs_of(block: int, stride: int, *, interleaved: bool) -> caches.Programs:
    """The programs for one kind of cache, which histories share."""
    del interleaved  # other pools would compile the same programs anew
    return caches.Programs(block, stride)


@dataclasses.dataclass(frozen=True)
class History:
    """What happens to a cache.

    Attributes:
        window: compress_block_size and compress_stride.
        events: what happens, and a number for each slot.
        seed: decides the rows.
        interleaved: whether keys and values lie in one pool.
    """

    window: tuple[int, int]
    events: tuple[tuple[str, tuple[int, ...]], ...]
    seed: int
    interleaved: bool


def draw_history(random: Random) -> History:
    """A history of any window that the tests compile programs for."""
    events = []
    for _ in range(pick(random, range(1, 13))):
        kind = pick(random, "step", "step", "prompt", "truncate", "free")
        most = {"step": 1, "prompt": caches.PROMPT, "truncate": 90, "free": 1}[kind]
        numbers = tuple(pick(random, range(most + 1)) for _ in range(caches.SIZES["slots"]))
        events.append((kind, numbers))
    window = caches.WINDOWS[random.integers(len(caches.WINDOWS))]
    return History(
        window, tuple(events), int(random.integers(2**31)), interleaved=bool(random.integers(2))
    )


def replay(history: History) -> None:
    """Runs a history in JAX and in lists, which must agree after each event."""
    random = np.random.default_rng(history.seed)
    programs = programs_of(*history.window, interleaved=history.interleaved)
    model = caches.Lists(*history.window, **caches.SIZES)
    empty = caches.empty_interleaved if history.interleaved else caches.empty
    tables, pools = empty(*history.window)
    sizes = caches.HEAD_SIZE, caches.HEAD_SIZE if history.interleaved else caches.VALUE_SIZE
    # A whole pool may lie anywhere: what no sequence owns must not matter.
    pools = jax.tree.map(lambda pool: jnp.full_like(pool, jnp.nan), pools)
    for kind, numbers in history.events:
        if kind == "free":
            tables = programs.free(tables, np.array(numbers, bool))
            for slot in np.flatnonzero(numbers):
                model.rows[int(slot)] = []
        elif kind == "truncate":
            tables = programs.truncate(tables, np.array(numbers, np.int32))
            for slot, rows in model.rows.items():
                del rows[numbers[slot] :]
        else:
            tokens = caches.PROMPT if kind == "prompt" else 1
            shape = (caches.SIZES["slots"], tokens, caches.KEY_VALUE_HEADS)
            key, value = (random.normal(size=(*shape, size)).astype(np.float32) for size in sizes)
            counts = np.array(numbers, np.int32)
            tables, pools, fits = programs.step(tables, pools, counts, key, value)
            assert fits.tolist() == model.step(numbers, key, value)
        caches.assert_holds(model, tables, pools)


class Growing:
    """The cache, as the operators' contracts show themselves."""

    implementation: str

    def check(self, history: History, form: str) -> None:
        """Asserts that a cache holds what lists hold; the same in every form."""
        del form
        replay(history)

    def call(self, arguments: Any, form: str) -> None:
        """There is no illegal history: what does not fit is refused as data."""
        raise NotImplementedError
