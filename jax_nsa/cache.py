"""A paged cache that grows: the rows that a layer keeps of the sequences in a batch's slots.

    tables = PageTables.empty(
        slots=8, pages=512, pages_per_slot=128, page_block_size=32,
        compress_block_size=32, compress_stride=16)
    layers = [PagePools.empty(tables, key_value_head_num, head_size) for _ in range(num_layers)]

    tables, fits = tables.allocate(counts)                  # once a step
    pools = pools.append(tables, key, value, weight)        # in each layer
    attention, _ = nsa_decode_step(
        query, gates, *pools.views(tables), actual_seq_qlen=tables.counts, ...)

A prompt is a step of many tokens, a speculative step one of several. Under `jax.jit` all shapes are
fixed, whichever sequences come and go.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_nsa import checks, paged, partition, pools
from jax_nsa._compat import updates_bfloat16_in_place, with_usual_promotion
from jax_nsa.blocks import BLOCK_GRANULE
from jax_nsa.checks import ArrayLike, IntegersLike
from jax_nsa.compress.door import nsa_compress_infer
from jax_nsa.compress.window import completed_window, pages_of, window_slots
from jax_nsa.pages import PageTables
from jax_nsa.pools import VALUE_SIZE_MAX
from jax_nsa.step import PagedKV


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "value", "compressed_key", "compressed_value"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class PagePools:
    """The pages of rows that one layer keeps; a pytree. Whose they are, a `PageTables` tells.

    Attributes:
        key: bfloat16, float16 or float32 `[pages, page, Nkv, D]` or `[pages, page, Nkv * D]`, rows
            of original tokens. Where keys and values are interleaved, `[pages, page, 2 * Nkv, D]`
            or `[pages, page, Nkv * 2 * D]`, rows of both.
        value: the same with `Dv`; None where `key` holds values too.
        compressed_key: the same as `key` with pages of its own, rows of compressed positions.
        compressed_value: the same with `Dv`, or None.
    """

    key: Any
    value: Any
    compressed_key: Any
    compressed_value: Any

    @classmethod
    def empty(
        cls, tables: PageTables, key_value_head_num: int, head_size: int,
        value_size: int | None = None, dtype: Any = jnp.bfloat16, kv_layout: str = "separate",
    ) -> PagePools:  # fmt: skip
        """Returns pools of zeros.

        Args:
            tables: what tells how many pages there are, and how large.
            key_value_head_num: `Nkv`.
            head_size: `D`, at most 192.
            value_size: `Dv`, at most 128 and `D`; None: `D`.
            dtype: bfloat16, float16 or float32.
            kv_layout: "separate" or "interleaved", as `nsa_decode_step` then takes the views.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: an argument out of its range.
        """
        _check_are_tables(tables)
        heads = checks.count("key_value_head_num", key_value_head_num)
        sizes = [checks.count("head_size", head_size)]
        if sizes[0] > paged.HEAD_SIZE_MAX:
            raise ValueError(f"head_size must be at most {paged.HEAD_SIZE_MAX}, got {sizes[0]}")
        sizes += sizes if value_size is None else [checks.count("value_size", value_size)]
        if not pools.is_value_size(sizes[-1], sizes[0]):
            raise ValueError(
                f"value_size must be at most {VALUE_SIZE_MAX} and at most head_size ({sizes[0]}), "
                f"got {sizes[-1]}{' as head_size' if value_size is None else ''}"
            )
        name = checks.choice("dtype", _dtype_name(dtype), checks.FLOATS)
        rows: list[tuple[int, int] | None] = [(heads, size) for size in sizes]
        if checks.choice("kv_layout", kv_layout, pools.KV_LAYOUTS) == "interleaved":
            if sizes[0] != sizes[1]:
                raise ValueError(
                    'value_size must equal head_size with kv_layout="interleaved", '
                    f"got {sizes[1]} and {sizes[0]}"
                )
            rows = [(2 * heads, sizes[0]), None]
        return cls(*(
            row and jnp.zeros((len(pages.free), tables.page_block_size, *row), name)
            for pages in (tables.original, tables.compressed) for row in rows
        ))  # fmt: skip

    def append(
        self,
        tables: PageTables,
        key: ArrayLike,
        value: ArrayLike,
        weight: tuple[ArrayLike, ArrayLike] | None,
        bias: tuple[ArrayLike | None, ArrayLike | None] | None = None,
        *,
        slots: IntegersLike | None = None,
        implementation: str | Sequence[str] | None = None,
        on_fault: str | None = None,
    ) -> PagePools:
        """Writes the rows of the tokens that `tables.allocate` brought, and what they compress to.

        Nothing else changes; of a slot that got more tokens than `key` has, the newest rows are
        NaN. Pools that the program owns, as under `jax.jit(..., donate_argnames=...)` or in the
        carry of `jax.lax.scan`, are updated in place.

        Args:
            tables: the tables that `allocate` returned.
            key: the pools' dtype `[n, S, Nkv, D]`. Row `[i, j]` is token `j` of those that slot `i`
                got; rows behind them are not read. `S` is at least as many as any slot got.
            value: the pools' dtype `[n, S, Nkv, Dv]`.
            weight: for keys and for values, `[l, Nkv]`, the pools' dtype or float32, as
                `nsa_compress_infer` takes them; `1 / l` everywhere is the mean. None: compressed
                rows stay, for a model that compresses in a way of its own.
            bias: for keys and for values, `[Nkv, D]` and `[Nkv, Dv]`, or None.
            slots: integers `[n]`, which slots the rows are of, each named once; negative: the row
                is padding. None: all, in order.
            implementation: as `nsa_compress_infer` takes it.
            on_fault: as `nsa_compress_infer` takes it.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: an argument with an illegal value or shape.
        """
        self._check(tables)
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                partition.check_only_heads_split(f"pools' {field.name}", getattr(self, field.name))
        if slots is not None:
            tables = _rows_of(tables, _checked_slots(slots, len(tables.lengths)))
        interleaved = self.value is None
        of_values = self.key if interleaved else self.value
        key, value = (
            _check_rows(name, rows, pool, len(tables.lengths), kinds=1 + interleaved)
            for name, rows, pool in (("key", key, self.key), ("value", value, of_values))
        )
        tokens = key.shape[1]
        if value.shape[1] != tokens:
            raise ValueError(
                f"key and value must have as many tokens, got {tokens} and {value.shape[1]}"
            )
        options: dict[str, Any] = {"implementation": implementation, "on_fault": on_fault}
        rows = (pools.in_turn(key, value, axis=3),) if interleaved else (key, value)
        kept = self.key, self.value
        original = tuple(_write(p, r, tables, **options) for p, r in zip(kept, rows, strict=False))
        compressed = (self.compressed_key, self.compressed_value)[: len(original)]
        if weight is not None:
            factors: Any = weight, bias
            if interleaved:
                factors = _factors_in_turn(weight, bias, tables, key.shape[2:])
            compress = functools.partial(
                _compress, tables=tables, original=original,
                options={"weight": factors[0], "bias": factors[1], **options},
            )  # fmt: skip
            parts = -(-tokens // tables.compress_stride)
            if parts == 1:
                compressed = compress(compressed, 0)
            else:
                compressed, _ = lax.scan(
                    lambda caches, part: (compress(caches, part), None),
                    compressed, jnp.arange(parts, dtype=jnp.int32),
                )  # fmt: skip
        none = (None,) * interleaved
        return PagePools(*original, *none, *compressed, *none)

    def views(self, tables: PageTables) -> tuple[PagedKV, PagedKV]:
        """Returns the compressed and the original cache, as `nsa_decode_step` takes them.

        Args:
            tables: the tables that tell whose pages are whose.

        Raises:
            TypeError: tables that are no `PageTables`.
            ValueError: tables of other pools.
        """
        self._check(tables)
        return (
            PagedKV(
                self.compressed_key, self.compressed_value, tables.compressed.block_table,
                tables.compressed_lengths,
            ),
            PagedKV(self.key, self.value, tables.original.block_table, tables.lengths),
        )  # fmt: skip

    def _check(self, tables: PageTables) -> None:
        _check_are_tables(tables)
        for field in dataclasses.fields(self):
            pages = tables.compressed if field.name.startswith("compressed") else tables.original
            expected = (len(pages.free), tables.page_block_size)
            if self.value is None and field.name.endswith("value"):
                if getattr(self, field.name) is not None:
                    raise ValueError(f"{field.name} must be None where value is None")
                continue
            shape = jnp.shape(getattr(self, field.name))
            if len(shape) not in (3, 4) or shape[:2] != expected:
                raise ValueError(
                    f"{field.name} must have {expected[0]} pages of {expected[1]} rows, as tables "
                    f"has, and shape [pages, page, heads * size] or [pages, page, heads, size], "
                    f"got {shape}"
                )


def _check_are_tables(tables: Any) -> None:
    if not isinstance(tables, PageTables):
        raise TypeError(f"tables must be a PageTables, got {type(tables).__name__}")


def _dtype_name(dtype: Any) -> str:
    """The name of what JAX takes for a dtype; of all else, what it is."""
    try:
        return str(jnp.dtype(dtype).name)
    except TypeError:
        return checks.shown(dtype)


def _check_rows(
    name: str, rows: ArrayLike, pool: jax.Array, slots: int, *, kinds: int
) -> ArrayLike:
    """Checks a step's rows against a pool, whose heads are those of so many kinds of rows."""
    rows = checks.floats(name, rows, like=(f"pools' {name}", pool))
    shape, row = tuple(rows.shape), pool.shape[2:]
    heads = (kinds * shape[2], *shape[3:]) if len(shape) == 4 else ()
    fits = heads == row or (len(row) == 1 and math.prod(heads) == row[0])
    if len(shape) != 4 or shape[0] != slots or shape[1] == 0 or not fits:
        raise ValueError(
            f"{name} must have shape [{slots}, tokens, heads, size], with heads of a pool of "
            f"shape {pool.shape}, got {shape}"
        )
    partition.check_only_heads_split(name, rows)
    return rows


def _factors_in_turn(
    weight: Any, bias: Any, tables: PageTables, row: tuple[int, ...]
) -> tuple[tuple[jax.Array], tuple[jax.Array] | None]:
    """Weights and biases of an interleaved pool, as those of one of twice as many heads."""
    expected = {"weight": (tables.compress_block_size, row[0]), "bias": row}
    pairs = {"weight": weight, "bias": (None, None) if bias is None else bias}
    factors: dict[str, list[jax.Array]] = {}
    for name, pair in pairs.items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(
                f"{name} must be a pair, for keys and for values, got {checks.described(pair)}"
            )
        factors[name] = []
        for i, given in enumerate(pair):
            missing = name == "bias" and given is None
            array = jnp.zeros(row) if missing else checks.floats(f"{name}[{i}]", given)
            if tuple(array.shape) != expected[name]:
                raise ValueError(
                    f"{name}[{i}] must have shape {expected[name]}, got {tuple(array.shape)}"
                )
            factors[name].append(jnp.asarray(array, jnp.float32))
    biases = (pools.in_turn(*factors["bias"], axis=1),)
    return (pools.in_turn(*factors["weight"], axis=2),), None if bias is None else biases


def _checked_slots(slots: IntegersLike, count: int) -> jax.Array:
    """Slots as an index in which padding lies past the end, where JAX finds and writes nothing."""
    integers = checks.Integers("slots", slots, rank=1)
    if integers.host is not None:
        named = integers.host[integers.host >= 0]
        if (named >= count).any() or len(np.unique(named)) < len(named):
            raise ValueError(
                f"slots must be different numbers below {count}, got "
                f"{checks.shown(integers.host.tolist())}"
            )
    array = integers.array()
    return jnp.where(array < 0, jnp.int32(count), array)


@with_usual_promotion
def _rows_of(tables: PageTables, slots: jax.Array) -> PageTables:
    """The tables of these slots only; beyond the last slot lie empty ones."""

    def rows(array: jax.Array) -> jax.Array:
        return array.at[slots].get(mode="fill", fill_value=0)

    original, compressed = (
        dataclasses.replace(pages, block_table=rows(pages.block_table))
        for pages in (tables.original, tables.compressed)
    )
    return dataclasses.replace(
        tables, lengths=rows(tables.lengths), counts=rows(tables.counts),
        original=original, compressed=compressed,
    )  # fmt: skip


@with_usual_promotion
def _write(pool: jax.Array, rows: ArrayLike, tables: PageTables, **options: Any) -> jax.Array:
    """Writes each slot's newest tokens; the pool."""
    token = jnp.arange(rows.shape[1], dtype=jnp.int32)
    # A slot with more tokens than there are rows gets NaN as its newest: whatever reads it tells.
    first = tables.lengths - jnp.minimum(tables.counts, rows.shape[1])
    position = first[:, None] + token
    pages = pages_of(tables.original.block_table, position // tables.page_block_size)
    row = position % tables.page_block_size
    there = token < tables.counts[:, None]
    missing = (tables.counts > rows.shape[1])[:, None, None, None]
    new = jnp.where(missing, jnp.full((), jnp.nan, rows.dtype), jnp.asarray(rows))
    at = jnp.where(there & (pages >= 0), pages * tables.page_block_size + row, -1)

    def scatter(pool: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
        page = jnp.where(at < 0, len(pool), at // tables.page_block_size)  # past the end: dropped
        new = new.reshape(*new.shape[:2], *pool.shape[2:])
        return jnp.asarray(pool).at[page, at % tables.page_block_size].set(new, mode="drop")

    if pool.dtype == jnp.bfloat16 and not updates_bfloat16_in_place():
        return _write_as_compress_windows(pool, new, at, **options)
    return scatter(pool, new, at)


def _write_as_compress_windows(
    pool: jax.Array, rows: jax.Array, at: jax.Array, **options: Any
) -> jax.Array:
    """Writes rows by the operator that updates in place: as windows whose last row counts.

    Args:
        pool: `[pages, page, ...]`.
        rows: `[n, S, heads, size]`.
        at: int32 `[n, S]`, where, rows of pages numbered through; negative: nowhere.
        **options: implementation and on_fault.
    """
    size, count = BLOCK_GRANULE, at.size
    rows = partition.one_after_another(partition.split_as(pool, rows))
    windows = jnp.pad(rows, [(0, 0), (size - 1, 0), (0, 0), (0, 0)])
    # CANN takes weights of no other dtype than the pool's; 0 and 1 are exact in all.
    weight = np.zeros((size, rows.shape[2]), pool.dtype)
    weight[-1] = 1
    written = nsa_compress_infer(
        windows, weight, at.reshape(-1), size, size, size,
        block_table=jnp.arange(count, dtype=jnp.int32)[:, None],
        actual_seq_len=jnp.full(count, size, jnp.int32), cache=pool, **options,
    )  # fmt: skip
    return jnp.asarray(written)


@with_usual_promotion
def _compress(
    caches: tuple[jax.Array, ...],
    part: jax.Array | int,
    *,
    tables: PageTables,
    original: tuple[jax.Array, ...],
    options: dict[str, Any],
) -> tuple[jax.Array, ...]:
    """Compresses what ends with tokens `[part * d, (part + 1) * d)` of each slot's newest."""
    page, stride = tables.page_block_size, tables.compress_stride
    sizes: dict[str, Any] = {
        "compress_block_size": tables.compress_block_size, "compress_stride": stride,
    }  # fmt: skip
    done = jnp.minimum(part * stride, tables.counts)
    counts = jnp.minimum(tables.counts - done, stride)
    lengths = tables.lengths - tables.counts + done + counts
    window = completed_window(lengths, counts, **sizes)
    written = nsa_compress_infer(
        original,
        slot_mapping=window_slots(window, tables.compressed.block_table, page_block_size=page),
        page_block_size=page, block_table=tables.original.block_table, actual_seq_len=lengths,
        actual_seq_qlen=counts, cache=caches, **sizes, **options,
    )  # fmt: skip
    return tuple(written)
