"""The pools of keys and values: which shapes are legal, and what lies where in a row.

Keys and values are in pools of their own, or *interleaved* in one, which is then passed for either:
of each key/value head its key, and after it its value.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_nsa import checks
from jax_nsa.checks import ArrayLike

KV_LAYOUTS = ("separate", "interleaved")
PAGE_GRANULE = 16
PAGE_MAX = 256
VALUE_SIZE_MAX = 128


def is_page_size(rows: int) -> bool:
    """Whether pages may have so many rows."""
    return rows % PAGE_GRANULE == 0 and 0 < rows <= PAGE_MAX


def is_value_size(value_size: int, head_size: int) -> bool:
    """Whether rows of values may be so large beside keys of `head_size`: `Dv <= min(128, D)`."""
    return value_size <= min(VALUE_SIZE_MAX, head_size)


def is_interleaved(kv_layout: Any, value: Any, name: str = "value") -> bool:
    """Whether one pool holds keys and values, and so stands for both.

    Args:
        kv_layout: "separate" or "interleaved", as the caller states it.
        value: the pool of values, or None where there is none.
        name: what the caller knows it as.
    """
    interleaved = checks.choice("kv_layout", kv_layout, KV_LAYOUTS) == "interleaved"
    if interleaved and value is not None:
        raise ValueError(
            f'{name} must be None with kv_layout="interleaved", where key is the pool of keys and '
            f"values, got {type(value).__name__}"
        )
    if not interleaved and value is None:
        raise TypeError(
            f'{name} must be a JAX or NumPy array with kv_layout="separate" (None where key is the '
            'pool of keys and values, kv_layout="interleaved"), got NoneType'
        )
    return interleaved


def value_size(y: Any, *, interleaved: bool) -> Any:
    """`Dv`, from what a row of the pool of values has for each head."""
    return y // 2 if interleaved else y


def keys_and_values(
    key_rows: jax.Array, value_rows: jax.Array, *, interleaved: bool
) -> tuple[jax.Array, jax.Array]:
    """Keys `[..., D]` and values `[..., Dv]`, from what rows of either pool have for each head."""
    if not interleaved:
        return key_rows, value_rows
    size = value_size(value_rows.shape[-1], interleaved=True)
    return key_rows[..., :-size], value_rows[..., -size:]


def in_turn(keys: ArrayLike, values: ArrayLike, *, axis: int) -> jax.Array:
    """Keys and values side by side for each head: `[..., 2 * Nkv, ...]`, the inverse of the above.

    Args:
        keys: an array whose axis before `axis` is `Nkv`.
        values: one of the same shape.
        axis: where they are put side by side.
    """
    both = jnp.stack([jnp.asarray(keys), jnp.asarray(values)], axis)
    shape = both.shape
    return both.reshape(*shape[: axis - 1], 2 * shape[axis - 1], *shape[axis + 1 :])


def of_each(
    key: ArrayLike, value: ArrayLike, *, key_value_heads: int, page: int, head_size: int
) -> tuple[ArrayLike, ArrayLike]:
    """Returns the pools of key and value as `[pages, page, Nkv * size]`, checked."""
    key = pool("key", key, heads=key_value_heads, page=page, size=head_size)
    value = pool("value", value, heads=key_value_heads, page=page, size=None)
    value_size = value.shape[2] // key_value_heads
    if not is_value_size(value_size, head_size):
        raise ValueError(
            f"value's head size must be at most {VALUE_SIZE_MAX} and at most query's "
            f"({head_size}), got {value_size}"
        )
    if key.shape[0] != value.shape[0]:
        raise ValueError(
            f"key and value must have as many pages, got {key.shape[0]} and {value.shape[0]}"
        )
    return key, value


def of_both(key: ArrayLike, *, key_value_heads: int, page: int, head_size: int) -> ArrayLike:
    """Returns a pool of keys and values as `[pages, page, heads * 2 * size]`, without a copy.

    Args:
        key: `[pages, page, 2 * heads, size]`, keys in even rows and values in odd ones, `[pages,
            page, heads, 2, size]` or `[pages, page, heads * 2 * size]`: one order in memory.
        key_value_heads: `Nkv`.
        page: `page_block_size` as the caller states it.
        head_size: `D`, of query.
    """
    heads, size = key_value_heads, head_size
    if size > VALUE_SIZE_MAX:
        raise ValueError(
            f'query\'s head size must be at most {VALUE_SIZE_MAX} with kv_layout="interleaved", '
            f"where a value is as large as a key, got {size}"
        )
    shape = tuple(key.shape)
    legal = ((2 * heads, size), (heads, 2, size), (2 * heads * size,))
    if shape[1:2] != (page,) or shape[2:] not in legal or 0 in shape:
        told = " or ".join(f"[pages, {page}, {', '.join(map(str, row))}]" for row in legal)
        raise ValueError(
            f'key must have shape {told} with kv_layout="interleaved" (page_block_size, and of '
            f"each of {heads} heads, key_value_head_num, two rows as large as query's heads), "
            f"got {shape}"
        )
    return key.reshape(*shape[:2], 2 * heads * size)


def pool(name: str, array: ArrayLike, *, heads: int, page: int, size: int | None) -> ArrayLike:
    """Returns a pool of pages as `[pages, page, heads * size]`, without a copy.

    Args:
        name: the argument's name.
        array: `[pages, page, heads * size]` or `[pages, page, heads, size]`.
        heads: key/value heads.
        page: `page_block_size` as the caller states it.
        size: the size of a head; None: whatever the pool has.
    """
    shape, stated = tuple(array.shape), "head_size" if size is None else str(size)
    if len(shape) not in (3, 4):
        raise ValueError(
            f"{name} must have shape [pages, page_block_size, {heads} * {stated}] or [pages, "
            f"page_block_size, {heads}, {stated}], got {shape}{remedy(shape, heads)}"
        )
    if any(isinstance(n, int) and n == 0 for n in shape):
        raise ValueError(f"{name} must not be empty, got shape {shape}")
    if shape[1] != page:
        raise ValueError(
            f"{name}'s second axis must be page_block_size ({page}), got shape "
            f"{shape}{remedy(shape, heads)}"
        )
    if len(shape) == 4:
        if shape[2] != heads:
            raise ValueError(
                f"{name}'s third axis must be its {heads} heads (key_value_head_num), "
                f"got shape {shape}"
            )
        array = _merge_heads(array)
    if size is None and array.shape[2] % heads:
        raise ValueError(
            f"{name}'s last axis must be a multiple of key_value_head_num ({heads}), "
            f"got {array.shape[2]} in shape {shape}"
        )
    if size is not None and array.shape[2] != heads * size:
        raise ValueError(
            f"{name}'s last axis must be key_value_head_num * head_size = {heads} * {size} = "
            f"{heads * size}, got {array.shape[2]} in shape {shape}"
        )
    return array


def remedy(shape: tuple[Any, ...], heads: int) -> str:
    """How an array that lies in another way becomes a pool; the end of a message, or nothing.

    Args:
        shape: of the array.
        heads: key/value heads, by which an axis of heads is known.
    """
    if len(shape) == 5:
        return "; [sequences, pages, page, heads, size] become pages by reshape(-1, *shape[2:])"
    if len(shape) == 4 and shape[1] == heads != shape[2] and is_page_size(shape[2]):
        return "; where heads come before rows, jnp.swapaxes(..., 1, 2) turns them round"
    if len(shape) == 4 and shape[1] > PAGE_MAX:
        return (
            "; a dense [sequences, tokens, heads, size] becomes pages by reshape(-1, page, heads, "
            "size)"
        )
    if len(shape) == 3 and shape[1] > PAGE_MAX:
        dense = (
            "a dense [sequences, tokens, heads * size] becomes pages by reshape(-1, page, heads * "
            "size)"
        )
        if shape[0] != heads:
            return f"; {dense}"
        # As many sequences as heads look like this, too.
        return (
            "; [heads, tokens, size] become pages by jnp.swapaxes(..., 0, 1).reshape(-1, page, "
            f"heads, size), {dense}"
        )
    return ""


def _merge_heads(array: ArrayLike) -> ArrayLike:
    return array.reshape(*array.shape[:2], array.shape[2] * array.shape[3])
