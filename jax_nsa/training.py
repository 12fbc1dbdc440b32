"""Training and prefill in jnp: what decoding computes for each token, for whole sequences at once.

Differentiable, on any platform. The rules by which blocks are scored and chosen are those of the
compressed branch; a model trained with them chooses the same blocks when it decodes.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_nsa import checks, softmax
from jax_nsa._compat import with_usual_promotion
from jax_nsa.blocks import Blocks, check_block_size, check_stride
from jax_nsa.checks import ArrayLike, IntegersLike
from jax_nsa.compress_attention import reference
from jax_nsa.compress_attention.problem import IMPORTANCES, Problem
from jax_nsa.gates import checked_gates, gated_sum

_EXACT = lax.Precision.HIGHEST


def nsa_compress(
    input: ArrayLike,
    weight: ArrayLike,
    compress_block_size: int,
    compress_stride: int,
    *,
    actual_seq_len: IntegersLike | None = None,
    bias: ArrayLike | None = None,
) -> jax.Array:
    """Compresses packed sequences, all windows of them, as `torch_npu.npu_nsa_compress` does.

    Compress window `i` of a sequence is its tokens `[i * d, i * d + l)`, and becomes (arXiv
    2502.11089, eq. 7, with a weighted sum for phi)

        sum(input[i * d + t] * weight[t] for t in range(l)) + bias.

    Args:
        input: bfloat16, float16 or float32 `[T, N, D]`, the tokens of all sequences, packed.
        weight: input's dtype or float32 `[l, N]`.
        compress_block_size: `l`, a multiple of 16 up to 128.
        compress_stride: `d`: 16, 32, 48 or 64, at most `l`.
        actual_seq_len: integers `[B]`, where each sequence ends, cumulative, known when the call is
            traced; the last is `T`. None: one sequence.
        bias: input's dtype or float32 `[N, D]`, or None.

    Returns:
        input's dtype `[positions, N, D]`: those of the first sequence, then those of the next.
        Summed in float32 and rounded once. Differentiable in `input`, `weight` and `bias`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument with an illegal value or shape.
    """
    size = check_block_size(
        "compress_block_size", checks.integer("compress_block_size", compress_block_size)
    )
    stride = checks.integer("compress_stride", compress_stride)
    check_stride(size, stride)
    input = jnp.asarray(checks.floats("input", input))
    if input.ndim != 3:
        raise ValueError(f"input must have shape [tokens, heads, head_size], got {input.shape}")
    tokens, heads, head_size = input.shape
    weight = _parameter("weight", weight, (size, heads), input)
    bias = None if bias is None else _parameter("bias", bias, (heads, head_size), input)
    starts = _starts_of_compress_windows(actual_seq_len, tokens, size, stride)
    return _compress(input, weight, bias, starts)


def _parameter(name: str, array: Any, shape: tuple[int, ...], input: jax.Array) -> jax.Array:
    array = jnp.asarray(checks.floats(name, array, like=("input", input), or_float32=True))
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    return array


def _starts_of_compress_windows(ends: Any, tokens: int, size: int, stride: int) -> np.ndarray:
    """The first token of each."""
    integers = checks.Integers("actual_seq_len", [tokens] if ends is None else ends, rank=1)
    if integers.host is None:
        raise TypeError(
            "actual_seq_len must be known when the call is traced, as it decides how many "
            "compress windows there are; pass a list or a NumPy array"
        )
    bounds = np.concatenate([[0], integers.host.astype(np.int64)])
    if bounds[-1] != tokens or (np.diff(bounds) < 0).any():
        raise ValueError(
            "actual_seq_len must be cumulative, not decreasing, and end with input's tokens "
            f"({tokens}), got {checks.shown(integers.host.tolist())}"
        )
    each = [
        begin + stride * np.arange(max(0, (end - begin - size) // stride + 1))
        for begin, end in itertools.pairwise(bounds)
    ]
    return np.concatenate([np.zeros(0, np.int64), *each]).astype(np.int32)


@with_usual_promotion
def _compress(
    input: jax.Array, weight: jax.Array, bias: jax.Array | None, starts: np.ndarray
) -> jax.Array:
    def add(total: jax.Array, offset: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        at, weights = offset
        taken = input[starts + at].astype(jnp.float32)
        return total + taken * weights.astype(jnp.float32)[:, None], None

    total = jnp.zeros((len(starts), *input.shape[1:]), jnp.float32)
    if len(starts):
        total, _ = lax.scan(add, total, (jnp.arange(len(weight)), weight))
    if bias is not None:
        total = total + bias.astype(jnp.float32)
    return total.astype(input.dtype)


def nsa_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    compressed_key: ArrayLike,
    compressed_value: ArrayLike,
    gates: ArrayLike,
    *,
    scale_value: float,
    compress_block_size: int,
    compress_stride: int,
    select_block_size: int,
    select_block_count: int,
    window_size: int,
    importance: str = "cann",
    init_blocks: int = 1,
    local_blocks: int = 2,
    chunk_size: int = 128,
    return_blocks: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal Native Sparse Attention of whole sequences: for training, and to prefill.

    The attention of arXiv 2502.11089, eq. 5 and 7-12, in every row at once. Row `t` is what
    `nsa_decode_step` gives for token `t` on the caches that the first `t + 1` tokens leave: it sees
    the compressed positions whose tokens end at or before it, chooses blocks by them, and attends
    to what it sees of these blocks and to the `window_size` newest tokens.

    Heads and sizes may be any, as no kernel limits them. `nsa_decode_step` serves models whose
    `N / Nkv` divides 128, with `D <= 192` and `Dv <= min(D, 128)`.

    Memory: rows are computed in chunks, and computed again for the gradient; at any time there are
    a few arrays of float32 `[B, chunk_size, N, S + C]`, and of bool `[B, chunk_size, Nkv, k, S]`.

    Args:
        query: bfloat16, float16 or float32 `[B, S, N, D]`.
        key: query's dtype `[B, S, Nkv, D]`.
        value: query's dtype `[B, S, Nkv, Dv]`.
        compressed_key: query's dtype `[B, C, Nkv, D]`, `C = (S - l) // d + 1` (0 for `S < l`).
        compressed_value: query's dtype `[B, C, Nkv, Dv]`.
        gates: query's dtype or float32 `[B, S, N, 3]`, weights of the compressed, the selected and
            the window branch, after their sigmoid.
        scale_value: the factor on query-key products, often `D ** -0.5`.
        compress_block_size: `l`, original tokens behind one compressed position.
        compress_stride: `d`, original tokens between two compressed positions.
        select_block_size: `l'`, tokens in a selectable block.
        select_block_count: `k`, blocks to select.
        window_size: how many of the newest tokens the window holds.
        importance: the rule by which blocks are scored and counted: "cann", torch_npu's, or
            "aligned", that of open training codes; see `nsa_compress_attention_infer`.
        init_blocks: how many of the first blocks are always chosen.
        local_blocks: how many of the last blocks are always chosen.
        chunk_size: rows that are computed at once.
        return_blocks: also return the chosen blocks.

    Returns:
        attention, query's dtype `[B, S, N, Dv]`, summed in float32 and rounded once; with
        `return_blocks` a tuple with the blocks, int32 `[B, S, Nkv, k]`. Differentiable in all
        arrays; the choice of blocks carries no derivative. What a row does not see may be anything,
        padding behind a prompt say; a row that sees a value that is not finite is NaN. Derivatives
        need all arrays finite.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument with an illegal value or shape.
    """
    arrays = {
        "query": query, "key": key, "value": value, "compressed_key": compressed_key,
        "compressed_value": compressed_value,
    }  # fmt: skip
    checked = {
        name: jnp.asarray(checks.floats(name, array, like=("query", query)))
        for name, array in arrays.items()
    }
    blocks = Blocks(
        checks.integer("compress_block_size", compress_block_size),
        checks.integer("compress_stride", compress_stride),
        checks.integer("select_block_size", select_block_size),
    )
    _check_shapes(checked, blocks)
    checked["gates"] = jnp.asarray(checked_gates(gates, checked["query"]))
    problem = Problem(
        blocks=blocks,
        scale=checks.scale(scale_value),
        key_value_heads=checked["key"].shape[2],
        select_block_count=checks.count("select_block_count", select_block_count),
        importance=checks.choice("importance", importance, IMPORTANCES),
        init_blocks=checks.count("init_blocks", init_blocks, least=0),
        local_blocks=checks.count("local_blocks", local_blocks, least=0),
    )
    attention, chosen = _attention(
        checked,
        problem=problem,
        window_size=checks.count("window_size", window_size),
        chunk_size=checks.count("chunk_size", chunk_size),
    )
    return (attention, chosen) if checks.flag("return_blocks", return_blocks) else attention


def _check_shapes(arrays: dict[str, jax.Array], blocks: Blocks) -> None:
    for name, array in arrays.items():
        if array.ndim != 4:
            raise ValueError(f"{name} must have rank 4, got shape {array.shape}")
    batch, tokens, heads, head_size = arrays["query"].shape
    if heads == 0 or head_size == 0:
        raise ValueError(f"query must have heads, got shape {arrays['query'].shape}")
    key_value_heads, value_size = arrays["key"].shape[2], arrays["value"].shape[3]
    if key_value_heads == 0 or heads % key_value_heads:
        raise ValueError(
            f"query's heads must be a multiple of key's ({key_value_heads}), got {heads}"
        )
    positions = blocks.compressed_length(tokens)
    for name, shape in (
        ("key", (batch, tokens, key_value_heads, head_size)),
        ("value", (batch, tokens, key_value_heads, value_size)),
        ("compressed_key", (batch, positions, key_value_heads, head_size)),
        ("compressed_value", (batch, positions, key_value_heads, value_size)),
    ):
        if arrays[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {arrays[name].shape}")


@with_usual_promotion
def _attention(
    arrays: dict[str, jax.Array], *, problem: Problem, window_size: int, chunk_size: int
) -> tuple[jax.Array, jax.Array]:
    query, gates = arrays["query"], arrays["gates"]
    tokens = query.shape[1]
    chunk = min(chunk_size, max(tokens, 1))
    chunks = -(-tokens // chunk)

    def split(array: jax.Array) -> jax.Array:
        """[B, S, ...] to [chunks, B, chunk, ...]."""
        padding = [(0, 0), (0, chunks * chunk - tokens)] + [(0, 0)] * (array.ndim - 2)
        padded = jnp.pad(array, padding)
        return jnp.moveaxis(padded.reshape(array.shape[0], chunks, chunk, *array.shape[2:]), 1, 0)

    def join(array: jax.Array) -> jax.Array:
        joined = jnp.moveaxis(array, 0, 1)
        return joined.reshape(joined.shape[0], chunks * chunk, *joined.shape[3:])[:, :tokens]

    rows = functools.partial(_rows, arrays, problem=problem, window_size=window_size)
    first = jnp.arange(chunks, dtype=jnp.int32) * chunk
    outcome = lax.map(jax.checkpoint(lambda part: rows(*part)), (split(query), split(gates), first))
    attention, chosen = map(join, outcome)
    return attention, chosen


def _rows(
    arrays: dict[str, jax.Array], query: jax.Array, gates: jax.Array, first: jax.Array, *,
    problem: Problem, window_size: int,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """A chunk of rows, `[B, chunk, ...]`, from token `first` on."""
    batch, chunk, heads, head_size = query.shape
    grouped = query.reshape(batch, chunk, problem.key_value_heads, -1, head_size)
    token = first + jnp.arange(chunk, dtype=jnp.int32)

    # The compressed positions whose tokens have come, and the blocks that they choose.
    length = problem.blocks.compressed_length(token + 1)
    position = jnp.arange(arrays["compressed_key"].shape[1], dtype=jnp.int32)
    seen = (position < length[:, None])[None, :, None, None, :]
    scores = _scores(grouped, arrays["compressed_key"], problem)
    probabilities, _ = softmax.over_seen(scores, seen)
    compressed = _weigh(probabilities, arrays["compressed_value"], seen)
    chosen = _choose(lax.stop_gradient(probabilities), token, length, problem)

    # The tokens of these blocks, and the newest, of all that came.
    position = jnp.arange(arrays["key"].shape[1], dtype=jnp.int32)
    block = position // problem.blocks.select_block_size
    in_blocks = jnp.any(chosen[..., None] == block, axis=-2)  # [B, chunk, kv heads, S]
    age = token[:, None] - position
    scores = _scores(grouped, arrays["key"], problem)
    in_blocks = (in_blocks & (age >= 0)[None, :, None])[:, :, :, None]
    newest = ((age >= 0) & (age < window_size))[None, :, None, None]
    selected, window = (
        _weigh(softmax.over_seen(scores, seen)[0], arrays["value"], seen)
        for seen in (in_blocks, newest)
    )
    branches = (b.reshape(batch, chunk, heads, -1) for b in (compressed, selected, window))
    attention = gated_sum(gates, *branches, dtype=query.dtype)
    return attention, chosen


def _scores(grouped: jax.Array, key: jax.Array, problem: Problem) -> jax.Array:
    """Scaled products in float32: [B, chunk, kv heads, group, positions]."""
    return problem.scale * jnp.einsum(
        "bthgd,bihd->bthgi",
        grouped.astype(jnp.float32),
        key.astype(jnp.float32),
        precision=_EXACT,
    )


def _weigh(probabilities: jax.Array, value: jax.Array, seen: jax.Array) -> jax.Array:
    """Values by their probabilities: [B, chunk, kv heads, group, Dv].

    Values that are not seen, later ones say, may be anything; to be weighed by 0 would not clear a
    NaN. A row that sees one that is not finite is NaN.
    """
    finite = jnp.all(jnp.isfinite(value), axis=-1)  # [B, positions, kv heads]
    weighed = jnp.einsum(
        "bthgi,bihd->bthgd", probabilities,
        jnp.where(finite[..., None], value, 0).astype(jnp.float32), precision=_EXACT,
    )  # fmt: skip
    spoiled = jnp.any(seen & ~jnp.moveaxis(finite, 1, 2)[:, None, :, None], axis=-1)
    return jnp.where(spoiled[..., None], jnp.nan, weighed)


def _choose(
    probabilities: jax.Array, token: jax.Array, length: jax.Array, problem: Problem
) -> jax.Array:
    """The blocks that each token and key/value head reads: int32[B, chunk, kv heads, k]."""
    blocks = problem.blocks
    count = blocks.universe(token + 1) if problem.aligned else blocks.num_blocks(length)
    if probabilities.shape[-1] == 0:  # no compress window ever ends
        columns = int(blocks.max_universe(0)) if problem.aligned else 0
        importance = jnp.zeros((*probabilities.shape[:3], columns), jnp.float32)
    else:
        importance = jnp.sum(reference.block_scores(probabilities, problem), axis=3)
    return reference.select(importance, count[None, :, None], problem)
