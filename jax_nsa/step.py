"""The whole decode step of Native Sparse Attention as one call, made of the operators."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_nsa import chain, checks, pools
from jax_nsa.checks import ArrayLike, IntegersLike
from jax_nsa.compress_attention.door import nsa_compress_attention_infer
from jax_nsa.compress_attention.problem import LAYOUTS
from jax_nsa.gates import checked_gates, gated_sum
from jax_nsa.operator import arguments_known_as
from jax_nsa.select_attention.door import nsa_select_attention_infer, nsa_window_attention_infer

_CAUSAL = np.ones((1, 1), bool)  # that there is a mask is all that counts


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "value", "block_table", "lengths"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class PagedKV:
    """A paged cache of keys and values; a pytree.

    Attributes:
        key: `[num_pages, page, Nkv * D]` or `[num_pages, page, Nkv, D]`, the pool of key pages;
            or the pool of keys and values, as `kv_layout="interleaved"` has it.
        value: the same with `Dv`, the pool of value pages; None where `key` holds values too.
        block_table: int32 `[B, P]`: row `i` of sequence `b` lives in page `block_table[b, i //
            page]`, row `i % page` of it.
        lengths: int32 `[B]`, rows of each sequence.
    """

    key: Any
    value: Any
    block_table: Any
    lengths: Any


def nsa_decode_step(
    query: ArrayLike,
    gates: ArrayLike,
    compressed: PagedKV,
    selected: PagedKV,
    window: PagedKV | None = None,
    *,
    scale_value: float,
    head_num: int,
    key_value_head_num: int,
    select_block_size: int,
    select_block_count: int,
    compress_block_size: int,
    compress_stride: int,
    window_size: int,
    importance: str = "cann",
    init_blocks: int = 1,
    local_blocks: int = 2,
    actual_seq_qlen: IntegersLike | None = None,
    layout: str = "TND",
    implementation: str | Sequence[str] | None = None,
    context_axis: Hashable | None = None,
    on_fault: str | None = None,
    kv_layout: str = "separate",
) -> tuple[jax.Array, jax.Array]:
    """Decodes with Native Sparse Attention: three branches, gated and summed.

    Attends to the compressed positions and chooses blocks by it (arXiv 2502.11089, eq. 7-10),
    attends to the chosen blocks and to the newest tokens, and returns (eq. 5)

        attention = gates[0] * compressed + gates[1] * selected + gates[2] * window,

    summed in float32 and rounded once. It equals `nsa_compress_attention_infer` and
    `nsa_select_attention_infer` one after the other; tokens of one step see each other causally, of
    which there may be `compress_stride` for each sequence. Whole prompts are for `nsa_attention`.

    Args:
        query: bfloat16, float16 or float32 `[T, N, D]`, one row per new token; with layout "BSND"
            `[B, S, N, D]`.
        gates: query's dtype or float32, query's leading axes, `N` and 3: the weights of the three
            branches, after their sigmoid.
        compressed: the cache of compressed keys and values; its `lengths` are the compressed
            lengths `S_b`.
        selected: the cache of original tokens; its `lengths` are the original lengths `T_b`, this
            step's tokens included.
        window: the cache that the sliding window reads; None: the arrays of `selected`.
        scale_value: the factor on query-key products, often `D ** -0.5`.
        head_num: `N`, query heads.
        key_value_head_num: `Nkv`, key and value heads.
        select_block_size: `l'`, tokens in a selectable block.
        select_block_count: `k`, blocks to select.
        compress_block_size: `l`, original tokens behind one compressed position.
        compress_stride: `d`, original tokens between two compressed positions.
        window_size: how many of the newest tokens the window holds.
        importance: the rule by which blocks are scored and counted: "cann", torch_npu's, or
            "aligned", that of open training codes; see `nsa_compress_attention_infer`.
        init_blocks: how many of the first blocks are always chosen.
        local_blocks: how many of the last blocks are always chosen.
        actual_seq_qlen: integers `[B]`, the query tokens of each sequence, at most
            `compress_stride`, which is not checked where only the running program knows them;
            None: one each (TND) or all `S`.
        layout: "TND" or "BSND".
        implementation: as `nsa_compress_attention_infer` takes it.
        context_axis: as `nsa_compress_attention_infer` takes it, for all caches alike.
        on_fault: as `nsa_compress_attention_infer` takes it.
        kv_layout: as `nsa_compress_attention_infer` takes it, of all caches alike.

    Returns:
        `(attention, topk_indices)`: query's dtype `[T, N, Dv]` and int32 `[T, Nkv, k]`, with "BSND"
        `[B, S, ...]`. Rows that hold no token have attention 0 and indices -1. Faults as in the
        operators.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument with an illegal value or shape; the message names it, its value and
            what is legal.
        NotImplementedError: no implementation can serve the call.
    """
    checks.choice("layout", layout, LAYOUTS)
    query = checks.floats("query", query)
    _check_caches(query, kv_layout, compressed=compressed, selected=selected, window=window)
    gates = checked_gates(gates, query)
    _check_tokens(actual_seq_qlen, query, layout, compress_stride)
    window_size = checks.count("window_size", window_size)
    shared: dict[str, Any] = {
        "scale_value": scale_value, "head_num": head_num,
        "key_value_head_num": key_value_head_num, "layout": layout,
        "actual_seq_qlen": actual_seq_qlen, "implementation": implementation,
        "context_axis": context_axis, "on_fault": on_fault, "kv_layout": kv_layout,
    }  # fmt: skip
    # With one token there is nothing that it must not see but by its sequence's lengths.
    several = actual_seq_qlen is not None or (layout == "BSND" and query.shape[1] > 1)
    of_blocks: dict[str, Any] = {
        "select_block_size": select_block_size,
        "select_block_count": select_block_count,
    }

    def original(name: str, cache: PagedKV) -> dict[str, Any]:
        return {
            "page_block_size": _page_size(name, cache, key_value_head_num),
            "block_table": cache.block_table, "actual_seq_kvlen": cache.lengths,
        }  # fmt: skip

    def step() -> tuple[jax.Array, jax.Array]:
        attention, indices = _told_of("compressed")(nsa_compress_attention_infer)(
            query, compressed.key, compressed.value, **shared, **of_blocks,
            page_block_size=_page_size("compressed", compressed, key_value_head_num),
            compress_block_size=compress_block_size, compress_stride=compress_stride,
            atten_mask=_CAUSAL if several else None, block_table=compressed.block_table,
            actual_cmp_seq_kvlen=compressed.lengths, actual_sel_seq_kvlen=selected.lengths,
            importance=importance, init_blocks=init_blocks, local_blocks=local_blocks,
        )  # fmt: skip
        # A scan that keeps the indices would otherwise have XLA write them where they are kept by
        # a second call of the compressed branch, beside the one whose indices are used here.
        indices = jax.lax.optimization_barrier(indices)
        chosen = functools.partial(
            _told_of("selected")(nsa_select_attention_infer), query, selected.key, selected.value,
            indices, **shared, **of_blocks, **original("selected", selected),
        )  # fmt: skip
        if window is None:
            branches = (attention, *chosen(window_size=window_size))
        else:
            branches = (
                attention,
                chosen(),
                _told_of("window")(nsa_window_attention_infer)(
                    query, window.key, window.value, window_size=window_size, **shared,
                    **original("window", window),
                ),
            )  # fmt: skip
        return gated_sum(gates, *branches, dtype=query.dtype), indices

    # Parts of sequences that lie on several devices are merged between the calls.
    return step() if context_axis is not None else chain.bind(step, implementation)


def _check_caches(query: ArrayLike, kv_layout: str, **caches: PagedKV | None) -> None:
    for name, cache in caches.items():
        if cache is None and name == "window":
            continue
        if not isinstance(cache, PagedKV):
            raise TypeError(f"{name} must be a PagedKV, got {type(cache).__name__}")
        checks.floats(f"{name}.key", cache.key, like=("query", query))
        pools.is_interleaved(kv_layout, cache.value, f"{name}.value")


@contextlib.contextmanager
def _told_of(cache: str) -> Iterator[None]:
    """Has an operator's messages name its arguments as the step's caches do."""
    integers = {
        "actual_cmp_seq_kvlen": "compressed.lengths", "actual_sel_seq_kvlen": "selected.lengths",
        "actual_seq_kvlen": f"{cache}.lengths", "block_table": f"{cache}.block_table",
    }  # fmt: skip
    means = {
        **integers, "key": f"{cache}.key", "value": f"{cache}.value",
        "page_block_size": f"the second size of {cache}.key",
    }  # fmt: skip
    try:
        with arguments_known_as(integers):
            yield
    except (TypeError, ValueError) as error:
        if type(error) in (TypeError, ValueError):
            told, got, value = str(error).partition(", got ")
            renamed = _NAMES.sub(lambda name: means[name[0]], told)
            if renamed != told:
                error.args = (renamed + got + value,)
        raise


# As operators' messages name them. Kernels tell `selected.lengths` themselves; keys and values, not
# the arguments, are words of their own, as in "key/value heads".
_NAMES = re.compile(
    r"(?<![\w./])(?:actual_(?:cmp_|sel_)?seq_kvlen\b|block_table\b|page_block_size\b"
    r"|(?:key|value)(?=(?: and value)? must|'s))"
)


def _check_tokens(
    counts: IntegersLike | None, query: ArrayLike, layout: str, compress_stride: int
) -> None:
    """Refuses more tokens than the compressed branch keeps causal, where the host knows them."""
    stride = checks.integer("compress_stride", compress_stride)
    if counts is not None:
        known = checks.Integers("actual_seq_qlen", counts, rank=1).host
        if known is None or not (known > stride).any():
            return
        b = int(np.argmax(known > stride))
        name, most = f"actual_seq_qlen[{b}]", int(known[b])
    elif layout == "BSND" and isinstance(query.shape[1], int) and query.shape[1] > stride:
        name, most = "query's second axis", query.shape[1]
    else:
        return
    raise ValueError(
        f"{name} must be at most compress_stride = {stride} tokens of each sequence in one step, "
        "as a token ignores one compressed position that ends after it, and not two (compute a "
        f"prompt with nsa_attention); got {most}"
    )


def _page_size(name: str, cache: PagedKV, heads: int) -> int:
    """Rows of the cache's pages, which only its pool of keys tells."""
    shape = jnp.shape(cache.key)
    if len(shape) not in (3, 4, 5) or not pools.is_page_size(shape[1]):
        raise ValueError(
            f"{name}.key must have shape [pages, page, heads * size] or [pages, page, heads, "
            f"size], where a page has a multiple of {pools.PAGE_GRANULE} rows up to "
            f"{pools.PAGE_MAX}, got {shape}{pools.remedy(shape, heads)}"
        )
    return int(shape[1])
