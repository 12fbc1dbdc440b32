"""The front door: torch_npu's signature, its checks on host values, one bind of the primitive."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_nsa import backends, checks, paged, partition, pools, tokens
from jax_nsa.blocks import Blocks
from jax_nsa.checks import ArrayLike, IntegersLike
from jax_nsa.compress_attention import context, reference
from jax_nsa.compress_attention.problem import (
    IMPORTANCES,
    LAYOUTS,
    Problem,
    check_select_lengths,
)
from jax_nsa.operator import Array, Operator


def _results(problem: Problem) -> tuple[Array, ...]:
    attention = jnp.float32 if problem.return_block_scores else None
    results = (
        Array("attention", "* (h g) e", dtype=attention),
        Array("topk_indices", "* h k", dtype=jnp.int32, absent=-1),
        Array("lse", "* (h g)", dtype=jnp.float32, absent=-math.inf),
        Array("block_scores", "* (h g) j", dtype=jnp.float32),
    )
    return results[: 2 + problem.return_lse + problem.return_block_scores]


def _sizes(problem: Problem, sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "e": pools.value_size(sizes["y"], interleaved=problem.interleaved),
        "k": problem.select_block_count,
        "j": problem.max_blocks(sizes["c"] * sizes["r"]),
    }


# `early_counts` says how many leading tokens of a sequence ignore its last position; negative: the
# sequence's lengths disagree. `block_scores` are each head's own of every block that a full block
# table has, none forced, 0 past the sequence.
OPERATOR = Operator(
    name="nsa_compress_attention_infer",
    target="compress_attention",
    operands=(
        *paged.OPERANDS,
        Array("lengths", "b", argument="actual_cmp_seq_kvlen"),
        Array("token_counts", "b", argument="actual_seq_qlen"),
        Array("early_counts", "b", argument="actual_sel_seq_kvlen"),
        Array("select_lengths", "b", argument="actual_sel_seq_kvlen"),
        Array("first_rows", "b", argument="actual_seq_qlen", points_into="n"),
    ),
    results=_results,
    sizes=_sizes,
    reference=reference.compress_attention,
)


def nsa_compress_attention_infer(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike | None,
    scale_value: float,
    head_num: int,
    key_value_head_num: int,
    select_block_size: int,
    select_block_count: int,
    page_block_size: int,
    compress_block_size: int,
    compress_stride: int,
    atten_mask: ArrayLike | None = None,
    block_table: IntegersLike | Sequence[Sequence[int]] | None = None,
    topk_mask: None = None,
    actual_seq_qlen: IntegersLike | None = None,
    actual_cmp_seq_kvlen: IntegersLike | None = None,
    actual_sel_seq_kvlen: IntegersLike | None = None,
    *,
    layout: str = "TND",
    return_lse: bool = False,
    implementation: str | Sequence[str] | None = None,
    context_axis: Hashable | None = None,
    importance: str = "cann",
    init_blocks: int = 1,
    local_blocks: int = 2,
    on_fault: str | None = None,
    kv_layout: str = "separate",
) -> tuple[jax.Array, ...]:
    """Attends over a paged compressed cache and picks the blocks the next branch will attend to.

    The decode step of Native Sparse Attention's compression branch (arXiv 2502.11089, eq. 7-10),
    with the parameters of `torch_npu.npu_nsa_compress_attention_infer`. For each sequence `b` and
    key/value head it computes softmax attention over the `S_b` compressed positions, sums the
    probabilities of all `G = N / Nkv` query heads of the group into the importance of each block
    of `select_block_size` original tokens, and returns the `select_block_count` most important
    blocks of those that it counts (below). Of these block 0 and the last two are always chosen
    (`init_blocks`, `local_blocks`).

    With `p` the probabilities of a query head, 0 outside `[0, S_b)`, its score of block `j` is (eq.
    9, blocks counted from 0)

        score[j] = sum(p[M * (j + 1) - m - n] for m in range(M) for n in range(L)),
        M = l' / d,  L = floor(l / d),

    the importance of a block is the sum of its scores over the heads of the group (eq. 10), and a
    sequence has `ceil(((S_b - 1) * d + l) / l')` blocks. This is the rule of CANN, Ascend's
    toolkit, which torch_npu calls: `importance="cann"`. It sits one position late: open training
    codes score a block by

        score[j] = sum(p[M * j + m - n] for m in range(M) for n in range(L))

    and count `ceil(T_b / l')` blocks, with `T_b` the original tokens, so that tokens that no
    compress window has reached yet are in a block too. `importance="aligned"` takes that rule.

    It is pure: it works eagerly, under `jax.jit`, `jax.vmap` and in control flow. (Environment
    variables choose defaults when a program is traced; a compiled one keeps them.) Lists, tuples
    and NumPy arrays given for lengths or block table are checked before anything runs; values in
    JAX arrays are never waited for, and take effect by the run-time rules below.

    Args:
        query: bfloat16, float16 or float32 `[T, N, D]`, one row per new token, `D <= 192`. With
            layout "BSND", `[B, S, N, D]`.
        key: query's dtype `[num_pages, page_block_size, Nkv * D]`, the pool of key pages; or
            `[num_pages, page_block_size, Nkv, D]`.
        value: query's dtype `[num_pages, page_block_size, Nkv * Dv]`, the pool of value pages,
            `Dv <= min(D, 128)`; or `[num_pages, page_block_size, Nkv, Dv]`.
        scale_value: the factor on query-key products, often `D ** -0.5`; at most `2**127` in size.
        head_num: `N`, query heads; a multiple of `key_value_head_num` with a ratio that divides
            128.
        key_value_head_num: `Nkv`, key and value heads.
        select_block_size: `l'`, original tokens in a selectable block; a multiple of 16 up to 128
            and of `compress_stride`, at least `compress_block_size`.
        select_block_count: `k`, blocks to select, at least 1.
        page_block_size: rows in a page; a multiple of 16 up to 256.
        compress_block_size: `l`, original tokens behind one compressed position; a multiple of 16
            up to 128, at least `compress_stride`.
        compress_stride: `d`, original tokens between two compressed positions: 16, 32, 48 or 64.
        atten_mask: anything but None makes tokens causal (its content is not read): a token
            ignores the last compressed position if its compress window ends after the token,
            which is all that it must not see if a sequence has at most `d` tokens. Needs
            `actual_sel_seq_kvlen`.
        block_table: integers `[B, P]`: position `i` of sequence `b` lives in page
            `block_table[b, i // page_block_size]`. Entries that no position needs are not read.
            Required.
        topk_mask: unsupported; only None.
        actual_seq_qlen: integers `[B]`, the query tokens of each sequence. With layout TND their
            rows are consecutive and sum to `T` (None: one each); with BSND the first ones of the
            `S` (None: all).
        actual_cmp_seq_kvlen: integers `[B]`, the compressed lengths `S_b`. Required.
        actual_sel_seq_kvlen: integers `[B]`, the original lengths, each satisfying
            `S_b == (length - l) // d + 1`. Only `atten_mask` and `importance="aligned"`, which need
            them, make them count.
        layout: "TND" or "BSND", the layout of `query` and of the results.
        return_lse: also return the log-sum-exp of the scaled scores.
        implementation: None takes the best available for the platform that the program is
            compiled for; a name or a sequence of names ("reference", "cpu", "cuda", "ascend")
            forces one or orders them.
        context_axis: inside `jax.shard_map`, the mesh axis over whose devices the positions of
            each sequence are split; see
            `jax_nsa.compress_attention.context`. `key`, `value` and `block_table`
            are then this device's, the lengths and `query` the whole sequences'.
        importance: the rule by which blocks are scored and counted: "cann", torch_npu's, or
            "aligned", that of open training codes. With "aligned" and `atten_mask`, token `t` of
            `q_b` counts `T_b - (q_b - 1 - t)` tokens.
        init_blocks: how many of the first blocks are always chosen; more than there are: all.
        local_blocks: how many of the last blocks are always chosen, likewise.
        on_fault: what an implementation on the host does about a bad value that only the running
            program knows: "fail" the call, or give "nan"; None fails it in a program of one device
            and gives NaN in one of several, where the other devices would wait for the failed one.
        kv_layout: "separate", or "interleaved" where `key` is the pool of keys and values,
            `[num_pages, page_block_size, 2 * Nkv, D]` with keys in even rows and values in odd
            ones, `[num_pages, page_block_size, Nkv, 2, D]` or `[num_pages, page_block_size, Nkv *
            2 * D]`, `D <= 128`, and `value` is None.

    Returns:
        A tuple `(attention, topk_indices)`, or `(attention, topk_indices, lse)` with
        `return_lse`:

        * attention: query's dtype `[T, N, Dv]`.
        * topk_indices: int32 `[T, Nkv, k]`, block indices: those always chosen in ascending order,
          then the others by descending importance, the lower index first among equals, padded
          with -1 where the sequence has fewer blocks.
        * lse: float32 `[T, N]`, `log(sum(exp(scale * q.k)))`, natural logarithm; -inf where a row
          sees no position.

        With layout "BSND" the leading `[T]` of each is `[B, S]`.

        Run-time rules: a sequence of length 0 has attention 0 and indices -1, and so have rows
        that hold no token (past `actual_seq_qlen[b]` in BSND, past the last sequence in TND). For
        a length outside `[0, P * page_block_size]`, a needed page id outside `[0, num_pages)` or
        token counts that do not fit, implementations that run on the host fail the call, and the
        others, and all with `on_fault="nan"`, return NaN and -1 for that sequence.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument with an illegal value or shape; the message names it, its value
            and what is legal.
        NotImplementedError: `topk_mask`, or no implementation can serve the call; the message
            gives each one's reason.
    """
    if topk_mask is not None:
        raise NotImplementedError("topk_mask is not supported; pass None")
    packed = checks.choice("layout", layout, LAYOUTS) == "TND"
    names = backends.parse(implementation)
    page = paged.page_size(page_block_size)
    problem = Problem(
        blocks=Blocks(
            checks.integer("compress_block_size", compress_block_size),
            checks.integer("compress_stride", compress_stride),
            checks.integer("select_block_size", select_block_size),
        ),
        scale=checks.scale(scale_value),
        key_value_heads=checks.count("key_value_head_num", key_value_head_num),
        select_block_count=checks.count("select_block_count", select_block_count),
        importance=checks.choice("importance", importance, IMPORTANCES),
        init_blocks=checks.count("init_blocks", init_blocks, least=0),
        local_blocks=checks.count("local_blocks", local_blocks, least=0),
        causal=atten_mask is not None,
        return_lse=checks.flag("return_lse", return_lse),
        interleaved=pools.is_interleaved(kv_layout, value),
    )
    query, key, value = paged.attention(
        *paged.floats(query, key, value, interleaved=problem.interleaved), packed=packed,
        head_num=head_num, key_value_heads=problem.key_value_heads, page=page,
        interleaved=problem.interleaved,
    )  # fmt: skip
    table = checks.Integers("block_table", block_table, rank=2)
    devices = 1 if context_axis is None else checks.axis_size(context_axis)
    integers = _check_integers(
        table, actual_seq_qlen, actual_cmp_seq_kvlen, actual_sel_seq_kvlen, problem,
        query_shape=query.shape, packed=packed, page=page, devices=devices,
    )  # fmt: skip
    if context_axis is None:
        _check_pages(table, integers, page=page, pages=key.shape[0])
    operands, one_token_each = _operands(query, key, value, table, integers, problem, packed)

    results = paged.apply(
        OPERATOR, operands, integers["actual_cmp_seq_kvlen"], context.merge_parts, problem=problem,
        implementation=names, on_fault=on_fault, context_axis=context_axis,
    )  # fmt: skip
    if one_token_each:
        return tuple(jax.lax.squeeze(r, (1,)) for r in results.values())
    return tuple(results.values())


def _check_integers(
    table: checks.Integers, counts: Any, lengths: Any, select_lengths: Any, problem: Problem, *,
    query_shape: tuple[Any, ...], packed: bool, page: int, devices: int,
) -> dict[str, checks.Integers]:  # fmt: skip
    """The integers of each sequence that are given, by name, checked against each other."""
    sequences = paged.sequences(table, query_shape, packed=packed)
    given = {
        "actual_cmp_seq_kvlen": paged.lengths(
            "actual_cmp_seq_kvlen", lengths, table, sequences=sequences, page=page, devices=devices
        )
    }
    given |= paged.counts_of_tokens(counts, query_shape, table, packed=packed)
    if select_lengths is not None:
        given["actual_sel_seq_kvlen"] = paged.per_sequence(
            "actual_sel_seq_kvlen", select_lengths, sequences
        )
        check_select_lengths(
            given["actual_sel_seq_kvlen"], given["actual_cmp_seq_kvlen"], blocks=problem.blocks
        )
    elif problem.causal:
        raise ValueError("actual_sel_seq_kvlen is required with atten_mask, got None")
    elif problem.aligned:
        raise ValueError('actual_sel_seq_kvlen is required with importance="aligned", got None')
    return given


def _check_pages(
    table: checks.Integers, integers: Mapping[str, checks.Integers], *, page: int, pages: Any
) -> None:
    """Refuses needed page ids that the pools do not have, as far as the host knows them."""
    needed = integers["actual_cmp_seq_kvlen"].host
    counts = integers.get("actual_seq_qlen")
    if needed is not None and counts is not None:
        needed = None if counts.host is None else needed * (counts.host > 0)
    if needed is not None:
        rows = functools.partial(paged.pages_between, 0, needed, table.shape[1], page=page)
        paged.page_ids(table, rows, pages=pages)


def _operands(
    query: jax.Array, key: jax.Array, value: jax.Array, table: checks.Integers,
    integers: Mapping[str, checks.Integers], problem: Problem, packed: bool,
) -> tuple[dict[str, jax.Array], bool]:  # fmt: skip
    """The operator's operands, and whether query's rows got an axis of one token each."""
    counts = integers.get("actual_seq_qlen")
    one_token_each = packed and counts is None
    if one_token_each:
        query, packed = jax.lax.expand_dims(query, (1,)), False
    lengths = integers["actual_cmp_seq_kvlen"].array()
    operands = {
        "query": query, "key": key, "value": value,
        "block_table": table.array(), "lengths": lengths,
    }  # fmt: skip
    if counts is None and not problem.causal:
        tell = {}
    else:
        tell = tokens.operands(
            query, counts, sequences=table.shape[0], packed=packed,
            tokens=query.shape[0 if packed else 1],
        )  # fmt: skip
    first_rows = tell.pop("first_rows", None)
    operands |= tell
    if problem.causal or problem.aligned:
        select, length = (
            partition.cut_as_sequences(name, integers[name].array(), query, packed)
            for name in ("actual_sel_seq_kvlen", "actual_cmp_seq_kvlen")
        )
        if problem.causal:
            operands["early_counts"] = _early_counts(
                tell["token_counts"], length, select, blocks=problem.blocks
            )
        operands["select_lengths"] = select
    if first_rows is not None:
        operands["first_rows"] = first_rows
    return operands, one_token_each


@functools.partial(jax.jit, static_argnames="blocks")
def _early_counts(
    token_counts: jax.Array, lengths: jax.Array, select_lengths: jax.Array, *, blocks: Blocks
) -> jax.Array:
    """How many leading tokens ignore a sequence's last position; -1 where lengths disagree."""
    # Original tokens past the last compress window: so many trailing tokens see it all.
    slack = select_lengths - blocks.original_length(lengths)
    early_counts = jnp.clip(token_counts - 1 - slack, 0, jnp.maximum(token_counts, 0))
    consistent = jnp.where(
        lengths > 0,
        (slack >= 0) & (slack < blocks.compress_stride),
        (select_lengths >= 0) & (select_lengths < blocks.compress_block_size),
    )
    early_counts = jnp.where(lengths > 0, early_counts, 0)
    return jnp.where(consistent, early_counts, -1)
