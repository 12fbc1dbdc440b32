"""Who holds which pages of a paged cache: slots that sequences join, grow in and leave.

For continuous batching: a program decodes a fixed number of slots, whatever sequences are in them.
All is pure and of fixed shapes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_nsa import blocks, checks, paged
from jax_nsa._compat import with_usual_promotion
from jax_nsa.checks import ArrayLike, IntegersLike


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["block_table", "free", "free_count"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Pages:
    """The pages of one kind of rows, and the slots that hold them; a pytree.

    Attributes:
        block_table: int32 `[B, P]`, each slot's pages in order; -1 behind the last.
        free: int32 `[pages]`, a stack of free pages: the first `free_count`, the last of them next.
        free_count: int32 `[]`.
    """

    block_table: Any
    free: Any
    free_count: Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["lengths", "counts", "original", "compressed"],
    meta_fields=["page_block_size", "compress_block_size", "compress_stride"],
)
@dataclasses.dataclass(frozen=True)
class PageTables:
    """How long the sequence in each slot is, and which pages it holds; a pytree.

    One serves all layers of a model. A sequence of `T` tokens holds the pages that `T` original
    rows and its `(T - l) // d + 1` compressed positions need, and no more; an empty slot none.

        tables, fits = tables.allocate(counts)      # before a step: its tokens
        tables = tables.truncate(lengths)           # after it: without those that were not accepted
        tables = tables.free(finished)

    Attributes:
        lengths: int32 `[B]`, tokens in each slot; 0: it is empty.
        counts: int32 `[B]`, how many of them the last `allocate` brought: this step's tokens.
        original: the pages of original tokens.
        compressed: the pages of compressed positions. There are enough for any sequences whose
            original tokens have pages.
        page_block_size: rows in a page, of either kind.
        compress_block_size: `l`, original tokens behind one compressed position.
        compress_stride: `d`, original tokens between two compressed positions.
    """

    lengths: Any
    counts: Any
    original: Pages
    compressed: Pages
    page_block_size: int
    compress_block_size: int
    compress_stride: int

    @classmethod
    def empty(
        cls, *, slots: int, pages: int, pages_per_slot: int, page_block_size: int,
        compress_block_size: int, compress_stride: int,
    ) -> PageTables:  # fmt: skip
        """Returns tables of empty slots.

        Args:
            slots: `B`, how many sequences there may be at one time.
            pages: pages of original tokens, for all slots together.
            pages_per_slot: `P`, pages that one slot may hold of them.
            page_block_size: rows in a page, a multiple of 16 up to 256.
            compress_block_size: `l`, a multiple of 16 up to 128, at least `compress_stride`.
            compress_stride: `d`: 16, 32, 48 or 64.

        Raises:
            TypeError: an argument that is not an integer.
            ValueError: an argument out of its range.
        """
        slots, pages = checks.count("slots", slots), checks.count("pages", pages)
        columns = checks.count("pages_per_slot", pages_per_slot)
        page = paged.page_size(page_block_size)
        # Numbers of positions, of rows in a pool, and of pages that all slots ask for are int32.
        for name, factor, by, times in (
            ("pages_per_slot", columns, "page_block_size", page),
            ("pages", pages, "page_block_size", page),
            ("slots", slots, "pages_per_slot", columns),
        ):
            if factor * times > checks.INT32_MAX:
                raise ValueError(
                    f"{name} * {by} must be at most {checks.INT32_MAX}, got {factor} * {times}"
                )
        size = checks.integer("compress_block_size", compress_block_size)
        blocks.check_block_size("compress_block_size", size)
        stride = checks.integer("compress_stride", compress_stride)
        blocks.check_stride(size, stride)
        # A slot's compressed pages are a d-th of its others, rounded up: this many at most.
        compressed_pages = (pages + min(slots, pages) * (stride - 1)) // stride
        return cls(
            lengths=jnp.zeros(slots, jnp.int32),
            counts=jnp.zeros(slots, jnp.int32),
            original=_all_free(slots, columns, pages),
            compressed=_all_free(slots, -(-columns // stride), compressed_pages),
            page_block_size=page,
            compress_block_size=size,
            compress_stride=stride,
        )

    @property
    def compressed_lengths(self) -> jax.Array:
        """int32 `[B]`, compressed positions of each slot."""
        return self._compressed(self.lengths)

    def allocate(self, counts: IntegersLike) -> tuple[PageTables, jax.Array]:
        """Brings each slot its next tokens: from now on they count, and have pages.

        Args:
            counts: integers `[B]`, tokens for each slot: 1 in a usual step, as many as its prompt
                has for one that joins, 0 for one that waits or is empty.

        Returns:
            The tables, and bool `[B]`: which slots have got what they asked for. A slot gets all or
            nothing, and one that gets nothing stays as it is, with `counts` 0. It gets nothing if
            it would hold more than `P` pages, if its count is negative, or if it needs new pages
            and there are not enough for it and for those before it.

        Raises:
            TypeError: counts that are not integers.
            ValueError: counts of another shape; known ones that are negative.
        """
        return _allocate(self, self._per_slot("counts", counts))

    def truncate(self, lengths: IntegersLike) -> PageTables:
        """Cuts sequences short, and frees the pages that they need no more.

        Args:
            lengths: integers `[B]`, how many tokens stay. A slot that has no more stays as it is.

        Raises:
            TypeError: lengths that are not integers.
            ValueError: lengths of another shape; known ones that are negative.
        """
        return _truncate(self, self._per_slot("lengths", lengths))

    def free(self, slots: ArrayLike) -> PageTables:
        """Empties slots.

        Args:
            slots: bool `[B]`, which.

        Raises:
            TypeError: slots that are not bools.
            ValueError: slots of another shape.
        """
        leaving = checks.bools("slots", slots)
        if leaving.shape != self.lengths.shape:
            raise ValueError(f"slots must have shape {self.lengths.shape}, got {leaving.shape}")
        return _truncate(self, jnp.where(leaving, jnp.int32(0), self.lengths))

    def _compressed(self, tokens: jax.Array) -> jax.Array:
        return blocks.compressed_length(tokens, self.compress_block_size, self.compress_stride)

    def _held(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """How many original and compressed pages sequences of so many tokens hold."""
        page = self.page_block_size
        return -(-tokens // page), -(-self._compressed(tokens) // page)

    def _per_slot(self, name: str, values: IntegersLike) -> jax.Array:
        integers = checks.Integers(name, values, rank=1)
        if integers.shape != self.lengths.shape:
            raise ValueError(
                f"{name} must have an entry for each of {len(self.lengths)} slots, "
                f"got shape {integers.shape}"
            )
        integers.check_range(None)
        return integers.array()


def _all_free(slots: int, columns: int, pages: int) -> Pages:
    return Pages(
        block_table=jnp.full((slots, columns), -1, jnp.int32),
        free=jnp.arange(pages - 1, -1, -1, dtype=jnp.int32),
        free_count=jnp.array(pages, jnp.int32),
    )


@jax.jit
@with_usual_promotion
def _allocate(tables: PageTables, asked: jax.Array) -> tuple[PageTables, jax.Array]:
    room = tables.original.block_table.shape[1] * tables.page_block_size - tables.lengths
    legal = (asked >= 0) & (asked <= room)
    wanted = tables.lengths + jnp.where(legal, asked, 0)
    new = tables._held(wanted)[0] - tables._held(tables.lengths)[0]
    enough = jnp.cumsum(new, dtype=jnp.int32) <= tables.original.free_count
    fits = legal & ((new == 0) | enough)
    lengths = jnp.where(fits, wanted, tables.lengths)
    return _with_lengths(tables, lengths, lengths - tables.lengths, _take), fits


@jax.jit
@with_usual_promotion
def _truncate(tables: PageTables, lengths: jax.Array) -> PageTables:
    shorter = (lengths >= 0) & (lengths < tables.lengths)
    lengths = jnp.where(shorter, lengths, tables.lengths)
    return _with_lengths(tables, lengths, jnp.where(shorter, 0, tables.counts), _give_back)


def _with_lengths(
    tables: PageTables, lengths: jax.Array, counts: jax.Array,
    change: Callable[[Pages, jax.Array, jax.Array], Pages],
) -> PageTables:  # fmt: skip
    original, compressed = map(
        change,
        (tables.original, tables.compressed),
        tables._held(tables.lengths),
        tables._held(lengths),
    )
    return dataclasses.replace(
        tables, lengths=lengths, counts=counts, original=original, compressed=compressed
    )


def _take(pages: Pages, held: jax.Array, wanted: jax.Array) -> Pages:
    """Gives slots that hold `held` pages more, up to `wanted`."""
    new, number = _between(held, wanted, pages)
    left = pages.free_count - jnp.sum(new, dtype=jnp.int32)
    table = jnp.where(new, pages.free[pages.free_count - 1 - number], pages.block_table)
    return Pages(table, pages.free, left)


def _give_back(pages: Pages, held: jax.Array, kept: jax.Array) -> Pages:
    """Takes from slots that hold `held` pages all but the first `kept`."""
    old, number = _between(kept, held, pages)
    place = jnp.where(old, pages.free_count + number, len(pages.free))  # or past the end: dropped
    free = pages.free.at[place].set(pages.block_table, mode="drop")
    count = pages.free_count + jnp.sum(old, dtype=jnp.int32)
    return Pages(jnp.where(old, -1, pages.block_table), free, count)


def _between(low: jax.Array, high: jax.Array, pages: Pages) -> tuple[jax.Array, jax.Array]:
    """Which columns of each slot are in `[low, high)`; these numbered from 0, through all slots."""
    column = jnp.arange(pages.block_table.shape[1], dtype=jnp.int32)
    inside = (low[:, None] <= column) & (column < high[:, None])
    end = jnp.cumsum(high - low, dtype=jnp.int32)
    return inside, (end - high)[:, None] + column
