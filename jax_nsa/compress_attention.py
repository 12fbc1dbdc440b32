"""The front door: torch_npu's signature, its checks on host values, one bind of the primitive."""

from __future__ import annotations

import reprlib
from collections.abc import Hashable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jax_nsa import backends, distributed, partition, primitive
from jax_nsa import problem as problem_rules
from jax_nsa.problem import Problem, Window

ArrayLike: TypeAlias = jax.Array | np.ndarray
IntegersLike: TypeAlias = jax.Array | np.ndarray | Sequence[int]


def nsa_compress_attention_infer(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
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
) -> tuple[jax.Array, ...]:
    """Attends over a paged compressed cache and picks the blocks the next branch will attend to.

    The decode step of Native Sparse Attention's compression branch (arXiv 2502.11089, eq. 7-10),
    with the parameters of `torch_npu.npu_nsa_compress_attention_infer`. For each sequence `b` and
    key/value head it computes softmax attention over the `S_b` compressed positions, sums the
    probabilities of all `G = N / Nkv` query heads of the group into the importance of each block
    of `select_block_size` original tokens, and returns the `select_block_count` most important
    blocks. Block 0 and the last two are always among them.

    With `p` the probabilities of a query head, 0 outside `[0, S_b)`, its score of block `j` is (eq.
    9, blocks counted from 0)

        score[j] = sum(p[M * (j + 1) - m - n] for m in range(M) for n in range(L)),
        M = l' / d,  L = floor(l / d),

    the importance of a block is the sum of its scores over the heads of the group (eq. 10), and a
    sequence has `ceil(((S_b - 1) * d + l) / l')` blocks.

    It is pure: it works eagerly, under `jax.jit`, `jax.vmap` and in control flow. (Environment
    variables choose defaults when a program is traced; a compiled one keeps them.) Lists, tuples
    and NumPy arrays given for lengths or block table are checked before anything runs; values in
    JAX arrays are never waited for, and take effect by the run-time rules below.

    Args:
        query: bfloat16, float16 or float32 `[T, N, D]`, one row per new token, `D <= 192`. With
            layout "BSND", `[B, S, N, D]`.
        key: query's dtype `[num_blocks, page_block_size, Nkv * D]`, the pool of key pages.
        value: query's dtype `[num_blocks, page_block_size, Nkv * Dv]`, the pool of value pages,
            `Dv <= min(D, 128)`.
        scale_value: the factor on query-key products, often `D ** -0.5`. Finite.
        head_num: `N`, query heads; a multiple of `key_value_head_num` with a ratio that divides
            128.
        key_value_head_num: `Nkv`, key and value heads.
        select_block_size: `l'`, original tokens in a selectable block; a multiple of 16 up to 128
            and of `compress_stride`, at least `compress_block_size`.
        select_block_count: `k`, blocks to select, at least 1.
        page_block_size: rows in a page; a multiple of 16 up to 128.
        compress_block_size: `l`, original tokens behind one compressed position; a multiple of 16
            up to 128, at least `compress_stride`.
        compress_stride: `d`, original tokens between two compressed positions: 16, 32, 48 or 64.
        atten_mask: anything but None makes tokens causal (its content is not read): a token
            ignores the last compressed position if that position's window ends after the token.
            Needs `actual_sel_seq_kvlen`.
        block_table: integers `[B, P]`: position `i` of sequence `b` lives in page
            `block_table[b, i // page_block_size]`. Entries that no position needs are not read.
            Required.
        topk_mask: unsupported; only None.
        actual_seq_qlen: integers `[B]`, the query tokens of each sequence. With layout TND their
            rows are consecutive and sum to `T` (None: one each); with BSND the first ones of the
            `S` (None: all).
        actual_cmp_seq_kvlen: integers `[B]`, the compressed lengths `S_b`. Required.
        actual_sel_seq_kvlen: integers `[B]`, the original lengths, each satisfying
            `S_b == (length - l) // d + 1`. Only `atten_mask` makes them count.
        layout: "TND" or "BSND", the layout of `query` and of the results.
        return_lse: also return the log-sum-exp of the scaled scores.
        implementation: None takes the best available for the platform that the program is
            compiled for; a name or a sequence of names ("reference", "cpu", "cuda", "ascend")
            forces one or orders them.
        context_axis: inside `jax.shard_map`, the mesh axis over whose devices the positions of
            each sequence are split; see `jax_nsa.distributed`. `key`, `value` and `block_table`
            are then this device's, the lengths and `query` the whole sequences'.

    Returns:
        A tuple `(attention, topk_indices)`, or `(attention, topk_indices, lse)` with
        `return_lse`:

        * attention: query's dtype `[T, N, Dv]`.
        * topk_indices: int32 `[T, Nkv, k]`, block indices: 0 and the last two in ascending order,
          then the others by descending importance, the lower index first among equals, padded
          with -1 where the sequence has fewer blocks.
        * lse: float32 `[T, N]`, `log(sum(exp(scale * q.k)))`, natural logarithm; -inf where a row
          sees no position.

        With layout "BSND" the leading `[T]` of each is `[B, S]`.

        Run-time rules: a sequence of length 0 has attention 0 and indices -1, and so have rows
        that hold no token (past `actual_seq_qlen[b]` in BSND, past the last sequence in TND). For
        a length outside `[0, P * page_block_size]`, a needed page id outside `[0, num_blocks)` or
        token counts that do not fit, implementations that run on the host fail the call, and the
        others return NaN and -1 for that sequence.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument with an illegal value or shape; the message names it, its value
            and what is legal.
        NotImplementedError: `topk_mask`, or no implementation can serve the call; the message
            gives each one's reason.
    """
    if topk_mask is not None:
        raise NotImplementedError("topk_mask is not supported; pass None")
    if not isinstance(layout, str) or layout not in problem_rules.LAYOUTS:
        raise ValueError(f"layout must be one of {problem_rules.LAYOUTS}, got {layout!r}")
    if not isinstance(return_lse, (bool, np.bool_)):
        raise TypeError(f"return_lse must be a bool, got {return_lse!r}")
    head_num = problem_rules.check_count("head_num", head_num)
    page_block_size = problem_rules.check_integer("page_block_size", page_block_size)
    window = Window(
        problem_rules.check_integer("compress_block_size", compress_block_size),
        problem_rules.check_integer("compress_stride", compress_stride),
        problem_rules.check_integer("select_block_size", select_block_size),
    )
    problem = Problem(
        window=window,
        scale=problem_rules.check_scale(scale_value),
        key_value_heads=problem_rules.check_count("key_value_head_num", key_value_head_num),
        select_block_count=problem_rules.check_count("select_block_count", select_block_count),
        return_lse=bool(return_lse),
    )
    for name, array in (("query", query), ("key", key), ("value", value)):
        _check_array(name, array, like=("query", query))
    names = backends.parse(implementation)

    table = _Integers("block_table", block_table, rank=2)
    problem_rules.check_shapes(
        problem, query, key, value, table,
        layout=layout, head_num=head_num, page_block_size=page_block_size,
    )  # fmt: skip
    sequences = table.shape[0]
    devices = 1 if context_axis is None else _axis_size(context_axis)
    capacity = table.shape[1] * page_block_size * devices

    def per_sequence(name: str, values: Any) -> _Integers:
        integers = _Integers(name, values, rank=1)
        if integers.shape != (sequences,):
            raise ValueError(
                f"{name} must have an entry for each of the {sequences} rows of block_table, "
                f"got shape {integers.shape}"
            )
        return integers

    lengths = per_sequence("actual_cmp_seq_kvlen", actual_cmp_seq_kvlen)
    if lengths.host is not None:
        problem_rules.check_lengths(lengths.host.tolist(), capacity=capacity)

    counts = None
    tokens_axis = query.shape[0] if layout == "TND" else query.shape[1]
    if actual_seq_qlen is not None:
        counts = per_sequence("actual_seq_qlen", actual_seq_qlen)
        if counts.host is not None:
            problem_rules.check_token_counts(
                counts.host.tolist(), layout=layout, tokens=tokens_axis
            )
    elif layout == "TND" and tokens_axis != sequences:
        raise ValueError(
            "query must have one row for each row of block_table unless actual_seq_qlen is given, "
            f"got shapes {tuple(query.shape)} and {table.shape}"
        )
    if table.host is not None and lengths.host is not None and context_axis is None:
        needed = lengths.host
        if counts is not None:
            needed = needed * (counts.host > 0) if counts.host is not None else needed * 0
        problem_rules.check_page_ids(
            table.host, needed, page_block_size=page_block_size, num_pages=key.shape[0]
        )

    select_lengths = None
    if actual_sel_seq_kvlen is not None:
        select_lengths = per_sequence("actual_sel_seq_kvlen", actual_sel_seq_kvlen)
        if select_lengths.host is not None and lengths.host is not None:
            problem_rules.check_select_lengths(
                select_lengths.host.tolist(), lengths.host.tolist(), window=window
            )
    elif atten_mask is not None:
        raise ValueError("actual_sel_seq_kvlen is required with atten_mask, got None")

    query = jnp.asarray(query)
    one_token_each = layout == "TND" and counts is None
    if one_token_each:
        query, tokens_axis = query[:, None], 1
    tokens: tuple[jax.Array, ...] = ()
    if counts is not None or atten_mask is not None:
        tokens = _token_operands(
            query, tokens_axis, counts, lengths,
            select_lengths if atten_mask is not None else None, window, sequences=sequences,
        )  # fmt: skip

    operands = (
        query, jnp.asarray(key), jnp.asarray(value), table.array(), lengths.array(), *tokens,
    )  # fmt: skip
    # Under a trace, lengths given as host values are constants of the program, which a kernel may
    # use; eagerly, they would make each step's program a new one.
    traced = any(isinstance(operand, jax.core.Tracer) for operand in operands)
    host_lengths = tuple(lengths.host.tolist()) if traced and lengths.host is not None else None
    if context_axis is None:
        results = primitive.bind(
            *operands, problem=problem, implementation=names, host_lengths=host_lengths
        )
    else:
        results = distributed.merge_parts(
            *operands, problem=problem, implementation=names, axis_name=context_axis
        )
    return tuple(r[:, 0] for r in results) if one_token_each else tuple(results)


def _axis_size(context_axis: Hashable) -> int:
    """Devices along `context_axis`, which must be manual here."""
    try:
        hash(context_axis)  # as a primitive's parameters must be
        return jax.lax.axis_size(context_axis)
    except (NameError, TypeError, ValueError):
        raise ValueError(
            f"context_axis must be a mesh axis of the enclosing jax.shard_map, got {context_axis!r}"
        ) from None


def _check_array(name: str, array: Any, *, like: tuple[str, Any]) -> None:
    """Refuses what is not an array of a floating dtype that the operator has."""
    if not isinstance(array, (jax.Array, np.ndarray)) or isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a JAX or NumPy array, got {type(array).__name__}")
    if array.dtype.name not in problem_rules.DTYPES or not array.dtype.isnative:
        raise TypeError(
            f"{name} must have dtype {', '.join(problem_rules.DTYPES)}, got {array.dtype}"
        )
    if array.dtype != like[1].dtype:
        raise TypeError(
            f"{name} must have {like[0]}'s dtype {like[1].dtype.name}, got {array.dtype.name}"
        )


class _Integers:
    """An integer argument that is known now (`host`) or only when the program runs."""

    def __init__(self, name: str, values: Any, *, rank: int) -> None:
        if values is None:
            raise ValueError(f"{name} is required, got None")
        self.host: np.ndarray | None = None
        if isinstance(values, jax.Array):
            array: Any = values
        else:
            if isinstance(values, np.ma.MaskedArray):
                raise TypeError(f"{name} must not be a masked array")
            try:
                array = np.asarray(values)
            except jax.errors.JAXTypeError as error:
                raise TypeError(
                    f"{name} must be an array or nested lists of integers of rank {rank}; lists "
                    f"cannot hold traced values (stack them with jnp.stack): {error}"
                ) from None
            except ValueError:
                raise TypeError(
                    f"{name} must be an array or nested lists of integers of rank {rank}, all rows "
                    f"of one length, got {reprlib.repr(values)}"
                ) from None
            self.host = array
        empty = self.host is not None and array.size == 0  # an empty list's dtype is no choice
        integral = jnp.issubdtype(array.dtype, jnp.integer) and array.dtype.kind != "m"  # timedelta
        if not empty and not integral:
            raise TypeError(
                f"{name} must hold integers, got dtype {array.dtype.name}: {reprlib.repr(values)}"
            )
        if len(array.shape) != rank:
            raise ValueError(
                f"{name} must have rank {rank}, got shape {tuple(array.shape)}: "
                f"{reprlib.repr(values)}"
            )
        self.shape: tuple[Any, ...] = tuple(array.shape)
        self.dtype = array.dtype
        self._values = array

    def array(self) -> jax.Array:
        """The values as int32; those beyond it stay beyond every legal range."""
        values, own, limits = self._values, jnp.iinfo(self.dtype), jnp.iinfo(jnp.int32)
        if not jnp.can_cast(self.dtype, jnp.int32):
            least, most = max(own.min, limits.min), min(own.max, limits.max)
            values = (np if self.host is not None else jnp).clip(values, least, most)
        return jnp.asarray(values, dtype=jnp.int32)


def _token_operands(
    query: jax.Array,
    tokens_axis: int,
    counts: _Integers | None,
    lengths: _Integers,
    select_lengths: _Integers | None,
    window: Window,
    *,
    sequences: int,
) -> tuple[jax.Array, ...]:
    """The primitive's token_counts, early_counts and, if ragged, first_rows."""

    def array(name: str, integers: _Integers) -> jax.Array:
        return partition.cut_as_sequences(name, integers.array(), query)

    token_counts = (
        array("actual_seq_qlen", counts)
        if counts is not None
        else jnp.full(sequences, tokens_axis, jnp.int32)
    )
    first_rows = None
    if query.ndim == 3:
        # A count that does not fit anyway is cut, so that no sum overflows before one is past the
        # query's end; sequences after that own no rows.
        placed = jnp.clip(token_counts, 0, tokens_axis + 1)
        ends = jnp.cumsum(placed, dtype=jnp.int32)
        past = (ends > tokens_axis).astype(jnp.int32)
        is_past_before = jnp.cumsum(past, dtype=jnp.int32) > past
        first_rows = jnp.where(is_past_before, tokens_axis, ends - placed)
        # After a negative count no later row has a known owner.
        lost = jnp.cumsum(token_counts < 0, dtype=jnp.int32) > 0
        token_counts = jnp.where(lost & (token_counts >= 0), -1, token_counts)
    early_counts = jnp.zeros(sequences, jnp.int32)
    if select_lengths is not None:
        select = array("actual_sel_seq_kvlen", select_lengths)
        length = array("actual_cmp_seq_kvlen", lengths)
        # Original tokens past the last compressed window: so many trailing tokens see it all.
        slack = select - window.original_length(length)
        early_counts = jnp.clip(token_counts - 1 - slack, 0, jnp.maximum(token_counts, 0))
        consistent = jnp.where(
            length > 0,
            (slack >= 0) & (slack < window.compress_stride),
            (select >= 0) & (select < window.compress_block_size),
        )
        early_counts = jnp.where(length > 0, early_counts, 0)
        early_counts = jnp.where(consistent, early_counts, -1)
    tokens = (token_counts, early_counts)
    return tokens if first_rows is None else (*tokens, first_rows)
