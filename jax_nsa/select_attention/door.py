"""The front doors: torch_npu's signature, its checks on host values, one bind of the primitive."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_nsa import backends, blocks, checks, paged, pools, tokens
from jax_nsa.checks import ArrayLike, IntegersLike
from jax_nsa.operator import Array, Operator
from jax_nsa.select_attention import arguments, context, reference
from jax_nsa.select_attention.problem import LAYOUTS, Problem, check_indices


def _results(problem: Problem) -> tuple[Array, ...]:
    attention = jnp.float32 if problem.partial else None  # parts are merged in float32
    present = (problem.select_block_size > 0, problem.window_size > 0)
    attentions = ("attention", "window_attention")
    lses = ("lse", "window_lse") if problem.return_lse else ()
    return (
        *(
            Array(name, "* (h g) e", dtype=attention)
            for name, there in zip(attentions, present, strict=True)
            if there
        ),
        *(
            Array(name, "* (h g)", dtype=jnp.float32, absent=-np.inf)
            for name, there in zip(lses, present, strict=False)
            if there
        ),
    )


OPERATOR = Operator(
    name="nsa_select_attention_infer",
    target="select_attention",
    operands=(
        *paged.OPERANDS,
        Array("lengths", "b", argument="actual_seq_kvlen"),
        Array("topk_indices", "* h k"),
        Array("token_counts", "b", argument="actual_seq_qlen"),
        Array("first_rows", "b", argument="actual_seq_qlen", points_into="n"),
    ),
    results=_results,
    sizes=lambda problem, sizes: {
        "e": pools.value_size(sizes["y"], interleaved=problem.interleaved)
    },
    reference=reference.select_attention,
)


def nsa_select_attention_infer(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike | None,
    topk_indices: IntegersLike,
    scale_value: float,
    head_num: int,
    key_value_head_num: int,
    select_block_size: int,
    select_block_count: int,
    page_block_size: int,
    layout: str = "BSND",
    atten_mask: ArrayLike | None = None,
    block_table: IntegersLike | Sequence[Sequence[int]] | None = None,
    actual_seq_qlen: IntegersLike | None = None,
    actual_seq_kvlen: IntegersLike | None = None,
    *,
    window_size: int | None = None,
    return_lse: bool = False,
    implementation: str | Sequence[str] | None = None,
    context_axis: Hashable | None = None,
    on_fault: str | None = None,
    kv_layout: str = "separate",
) -> jax.Array | tuple[jax.Array, ...]:
    """Attends to chosen blocks of a paged cache, and with `window_size` to its newest tokens too.

    The decode step of Native Sparse Attention's selection branch (arXiv 2502.11089, eq. 11-12),
    with the parameters of `torch_npu.npu_nsa_select_attention_infer`. Token `t` of the `q_b` tokens
    of sequence `b` sees the positions below `limit = T_b - (q_b - 1 - t)`. For each key/value head,
    its query heads attend to

        the positions [id * l', min((id + 1) * l', limit)) of each id in topk_indices,

    every head to blocks of its own; -1 stands for no block, an id listed twice counts twice. The
    window is the positions `[max(0, limit - window_size), limit)`, the current token included.

    It is pure: it works eagerly, under `jax.jit`, `jax.vmap` and in control flow. Lists, tuples and
    NumPy arrays of integers are checked before anything runs, the block table as far as the host
    knows which pages are read; values in JAX arrays are never waited for, and take effect by the
    run-time rules below.

    Args:
        query: bfloat16, float16 or float32 `[B, S, N, D]` with layout "BSND", `[B, S, N * D]` with
            "BSH", `[T, N, D]` with "TND"; `D <= 192`.
        key: query's dtype `[num_pages, page_block_size, Nkv * D]` or `[num_pages,
            page_block_size, Nkv, D]`: the pool of key pages, one row for each original token.
        value: the same with `Dv <= min(D, 128)`, the pool of value pages.
        topk_indices: integers `[B, S, Nkv, k]`, with `S = 1` also `[B, Nkv, k]`; `[T, Nkv, k]` with
            "TND". Blocks, or -1, in any order.
        scale_value: the factor on query-key products, often `D ** -0.5`; at most `2**127` in size.
        head_num: `N`, query heads; a multiple of `key_value_head_num` with a ratio that divides
            128.
        key_value_head_num: `Nkv`, key and value heads.
        select_block_size: `l'`, tokens in a block; a multiple of 16 up to 128.
        select_block_count: `k`, the last axis of `topk_indices`.
        page_block_size: rows in a page; a multiple of 16 up to 256.
        layout: "BSND", "BSH" or "TND", the layout of `query` and of the results.
        atten_mask: not read: tokens are always causal here.
        block_table: integers `[B, P]`: position `i` of sequence `b` lives in page
            `block_table[b, i // page_block_size]`. Entries that no position needs are not read.
            Required.
        actual_seq_qlen: integers `[B]`, the query tokens `q_b` of each sequence. With "TND" their
            rows are consecutive and sum to `T` (None: one each); otherwise the first ones of the
            `S` (None: all).
        actual_seq_kvlen: integers `[B]`, the original tokens `T_b` of each sequence, this step's
            included. Required.
        window_size: how many of the newest tokens to attend to besides; None: no window.
        return_lse: also return the log-sum-exps of the scaled scores.
        implementation: None takes the best available for the platform that the program is
            compiled for; a name or a sequence of names ("reference", "cpu", "cuda", "ascend")
            forces one or orders them.
        context_axis: inside `jax.shard_map`, the mesh axis over whose devices the positions of each
            sequence are split; see `jax_nsa.select_attention.context`. `key`, `value` and
            `block_table` are then this device's, all else the whole sequences'.
        on_fault: what an implementation on the host does about a bad value that only the running
            program knows: "fail" the call, or give "nan"; None fails it in a program of one device
            and gives NaN in one of several, where the other devices would wait for the failed one.
        kv_layout: "separate", or "interleaved" where `key` is the pool of keys and values,
            `[num_pages, page_block_size, 2 * Nkv, D]` with keys in even rows and values in odd
            ones, `[num_pages, page_block_size, Nkv, 2, D]` or `[num_pages, page_block_size, Nkv *
            2 * D]`, `D <= 128`, and `value` is None.

    Returns:
        attention, in query's dtype and layout with `Dv` for `D` ("BSH": `[B, S, N * Dv]`). With
        `window_size` a tuple `(attention, window_attention)`; with `return_lse` followed by `lse`
        and `window_lse`, float32 `[B, S, N]` (`[T, N]` with "TND"), natural logarithm.

        A row that sees no position has attention 0 and lse -inf, and so have rows that hold no
        token. Run-time rules: a block at or past `T_b` or below -1 is a fault of its row and
        key/value head; a length outside `[0, P * page_block_size]`, a needed page id outside `[0,
        num_pages)` or token counts that do not fit are faults too. Implementations that run on the
        host fail the call; the others, and all with `on_fault="nan"`, return NaN there.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument with an illegal value or shape; the message names it, its value
            and what is legal.
        NotImplementedError: no implementation can serve the call; the message gives each one's
            reason.
    """
    del atten_mask
    size = checks.integer("select_block_size", select_block_size)
    problem = Problem(
        scale=checks.scale(scale_value),
        key_value_heads=checks.count("key_value_head_num", key_value_head_num),
        select_block_size=blocks.check_block_size("select_block_size", size),
        window_size=0 if window_size is None else checks.count("window_size", window_size),
        return_lse=checks.flag("return_lse", return_lse),
        interleaved=pools.is_interleaved(kv_layout, value),
    )
    chosen = (topk_indices, checks.count("select_block_count", select_block_count))
    results = _attend(
        query, key, value, chosen, problem, head_num=head_num, page_block_size=page_block_size,
        layout=layout, block_table=block_table, counts=actual_seq_qlen, lengths=actual_seq_kvlen,
        implementation=implementation, context_axis=context_axis, on_fault=on_fault,
    )  # fmt: skip
    return results[0] if len(results) == 1 else results


def nsa_window_attention_infer(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike | None,
    scale_value: float,
    head_num: int,
    key_value_head_num: int,
    window_size: int,
    page_block_size: int,
    layout: str = "BSND",
    block_table: IntegersLike | Sequence[Sequence[int]] | None = None,
    actual_seq_qlen: IntegersLike | None = None,
    actual_seq_kvlen: IntegersLike | None = None,
    *,
    return_lse: bool = False,
    implementation: str | Sequence[str] | None = None,
    context_axis: Hashable | None = None,
    on_fault: str | None = None,
    kv_layout: str = "separate",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attends to the newest tokens of a paged cache, the sliding window branch.

    Token `t` of the `q_b` tokens of sequence `b` attends to the positions `[max(0, limit -
    window_size), limit)` with `limit = T_b - (q_b - 1 - t)`: the `window_size` newest tokens, the
    current one included (arXiv 2502.11089, section 3.3.3; some open implementations count one
    more). For models whose branches have keys and values of their own; where the window reads the
    pools of the selected branch, `nsa_select_attention_infer` does both in one call.

    Args:
        query: bfloat16, float16 or float32 `[B, S, N, D]`; with layout "BSH" `[B, S, N * D]`, with
            "TND" `[T, N, D]`, one row per new token. `D <= 192`.
        key: query's dtype `[num_pages, page_block_size, Nkv * D]`, the pool of key pages; or
            `[num_pages, page_block_size, Nkv, D]`.
        value: query's dtype `[num_pages, page_block_size, Nkv * Dv]`, the pool of value pages,
            `Dv <= min(D, 128)`; or `[num_pages, page_block_size, Nkv, Dv]`.
        scale_value: the factor on query-key products, often `D ** -0.5`; at most `2**127` in size.
        head_num: `N`, query heads; a multiple of `key_value_head_num` with a ratio that divides
            128.
        key_value_head_num: `Nkv`, key and value heads.
        window_size: how many of the newest tokens to attend to, at least 1.
        page_block_size: rows in a page; a multiple of 16 up to 256.
        layout: "BSND", "BSH" or "TND".
        block_table: integers `[B, P]`: token `i` of sequence `b` lives in page `block_table[b, i //
            page_block_size]`. Entries that no window needs are not read. Required.
        actual_seq_qlen: integers `[B]`, this step's tokens `q_b` of each sequence; None: one each
            ("TND") or all `S`.
        actual_seq_kvlen: integers `[B]`, the original tokens `T_b`, this step's included. Required.
        return_lse: also return the log-sum-exp of the scaled scores.
        implementation: None takes the best available for the platform that the program is
            compiled for; a name or a sequence of names ("reference", "cpu", "cuda", "ascend")
            forces one or orders them.
        context_axis: inside `jax.shard_map`, the mesh axis over whose devices the positions of
            each sequence are split, as in `nsa_select_attention_infer`.
        on_fault: "fail", "nan" or None, as in `nsa_select_attention_infer`.
        kv_layout: "separate" or "interleaved", as in `nsa_select_attention_infer`.

    Returns:
        attention, in query's dtype and layout with `Dv` for `D`; with `return_lse` a tuple
        `(attention, lse)`, lse float32 `[B, S, N]` (`[T, N]` with "TND"). Rows without a position
        and faults as in `nsa_select_attention_infer`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument with an illegal value or shape.
        NotImplementedError: no implementation can serve the call.
    """
    problem = Problem(
        scale=checks.scale(scale_value),
        key_value_heads=checks.count("key_value_head_num", key_value_head_num),
        window_size=checks.count("window_size", window_size),
        return_lse=checks.flag("return_lse", return_lse),
        interleaved=pools.is_interleaved(kv_layout, value),
    )
    results = _attend(
        query, key, value, None, problem, head_num=head_num, page_block_size=page_block_size,
        layout=layout, block_table=block_table, counts=actual_seq_qlen, lengths=actual_seq_kvlen,
        implementation=implementation, context_axis=context_axis, on_fault=on_fault,
    )  # fmt: skip
    return (results[0], results[1]) if return_lse else results[0]


def _attend(
    query: Any, key: Any, value: Any, chosen: tuple[Any, int] | None, problem: Problem, *,
    head_num: Any, page_block_size: Any, layout: Any, block_table: Any, counts: Any, lengths: Any,
    implementation: Any, context_axis: Hashable | None, on_fault: str | None,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Checks the arguments of either door, and applies the operator."""
    layout = checks.choice("layout", layout, LAYOUTS)
    names = backends.parse(implementation)
    page = paged.page_size(page_block_size)
    query, key, value = arguments.check_arrays(
        query, key, value, problem, layout=layout, head_num=checks.count("head_num", head_num),
        page=page,
    )  # fmt: skip
    packed = layout == "TND"
    table = checks.Integers("block_table", block_table, rank=2)
    devices = 1 if context_axis is None else checks.axis_size(context_axis)
    sequences = paged.sequences(table, query.shape, packed=packed)
    kv_lengths = paged.lengths(
        "actual_seq_kvlen", lengths, table, sequences=sequences, page=page, devices=devices
    )
    token_counts = paged.counts_of_tokens(counts, query.shape, table, packed=packed)
    counted = token_counts.get("actual_seq_qlen")
    rows = arguments.known_rows(counted, query.shape[:-2], packed=packed)
    indices = None
    if chosen is not None:
        indices = arguments.check_chosen(chosen, query, problem, layout)
        problem = dataclasses.replace(problem, tokens_apart=len(indices.shape) == 4)
        sequence = None if rows is None else rows.sequence.reshape(indices.shape[:-2])
        check_indices(indices, kv_lengths, sequence, block=problem.select_block_size)
    if context_axis is None:  # of a sequence on several devices, nobody knows which part is here
        arguments.check_pages(
            table, kv_lengths, indices, rows, problem, page=page, pages=key.shape[0]
        )

    one_token_each = packed and counted is None
    if one_token_each:
        query, packed = jax.lax.expand_dims(query, (1,)), False
    operands = {
        "query": query, "key": key, "value": value,
        "block_table": table.array(), "lengths": kv_lengths.array(),
    }  # fmt: skip
    if indices is not None:
        shape = (*query.shape[:-2], problem.key_value_heads, indices.shape[-1])
        array = indices.array()
        operands["topk_indices"] = array if array.shape == shape else array.reshape(shape)
    if counted is not None:
        operands |= tokens.operands(
            query, counted, sequences=sequences, packed=packed,
            tokens=query.shape[0 if packed else 1],
        )  # fmt: skip
    results = paged.apply(
        OPERATOR, operands, kv_lengths, context.merge_parts, problem=problem, implementation=names,
        on_fault=on_fault, context_axis=context_axis,
    )  # fmt: skip
    return _in_layout(results, layout, one_token_each)


def _in_layout(
    results: Mapping[str, jax.Array], layout: str, one_token_each: bool
) -> tuple[jax.Array, ...]:
    """The results with query's leading axes."""
    outcome = []
    for name, array in results.items():
        if one_token_each:
            array = jax.lax.squeeze(array, (1,))
        elif layout == "BSH" and name.endswith("attention"):
            array = array.reshape(*array.shape[:2], array.shape[2] * array.shape[3])
        outcome.append(array)
    return tuple(outcome)
