"""A whole NSA decode step, jitted and scanned, over a paged compressed cache that grows.

Native Sparse Attention (arXiv 2502.11089) answers each new token from three branches:

    compression   all of the past, at one position per 16 tokens      jax_nsa's operator
    selection     the blocks that the operator found most important   plain jnp, below
    window        the newest tokens as they are                       plain jnp, below

and adds them up by gates that the model learns (constants here). Between steps the caches grow:
when a token completes a compression window, its summary (here the mean; a model learns an MLP)
becomes a compressed position, in a new page when the sequence's last one is full.

    python examples/decode_loop.py
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_nsa

# The model.
HEADS, KEY_VALUE_HEADS, HEAD_SIZE, VALUE_SIZE = 8, 2, 64, 64
GROUP = HEADS // KEY_VALUE_HEADS
SCALE = HEAD_SIZE**-0.5
COMPRESS_BLOCK, STRIDE, SELECT_BLOCK, SELECT_COUNT = 32, 16, 64, 4
NEWEST = 64  # tokens in the window branch
GATES = {"compression": 0.4, "selection": 0.4, "window": 0.2}

# The cache.
PAGE = 16  # compressed positions in a page
MAX_TOKENS = 1024
PAGES_PER_SEQUENCE = MAX_TOKENS // STRIDE // PAGE


class Cache(NamedTuple):
    """Everything that one layer remembers of its sequences.

    Attributes:
        keys: dtype[sequences, max_tokens, kv_heads, head_size], of the original tokens.
        values: dtype[sequences, max_tokens, kv_heads, value_size].
        tokens: int32[sequences], how many tokens each sequence has.
        key_pages: dtype[pages, page, kv_heads * head_size], compressed positions.
        value_pages: dtype[pages, page, kv_heads * value_size].
        block_table: int32[sequences, pages_per_sequence]; -1 where no page is allocated yet.
        lengths: int32[sequences], how many compressed positions each sequence has.
        pages_taken: int32, pages of the pool that are in use.
    """

    keys: jax.Array
    values: jax.Array
    tokens: jax.Array
    key_pages: jax.Array
    value_pages: jax.Array
    block_table: jax.Array
    lengths: jax.Array
    pages_taken: jax.Array


def empty_cache(sequences: int, dtype: jnp.dtype = jnp.bfloat16) -> Cache:
    pages = sequences * PAGES_PER_SEQUENCE
    return Cache(
        keys=jnp.zeros([sequences, MAX_TOKENS, KEY_VALUE_HEADS, HEAD_SIZE], dtype),
        values=jnp.zeros([sequences, MAX_TOKENS, KEY_VALUE_HEADS, VALUE_SIZE], dtype),
        tokens=jnp.zeros(sequences, jnp.int32),
        key_pages=jnp.zeros([pages, PAGE, KEY_VALUE_HEADS * HEAD_SIZE], dtype),
        value_pages=jnp.zeros([pages, PAGE, KEY_VALUE_HEADS * VALUE_SIZE], dtype),
        block_table=jnp.full([sequences, PAGES_PER_SEQUENCE], -1, jnp.int32),
        lengths=jnp.zeros(sequences, jnp.int32),
        pages_taken=jnp.int32(0),
    )


def append(cache: Cache, key: jax.Array, value: jax.Array, active: jax.Array) -> Cache:
    """Adds a token to each active sequence, and a compressed position where it fills a window.

    Args:
        cache: what the sequences have been so far.
        key: dtype[sequences, kv_heads, head_size].
        value: dtype[sequences, kv_heads, value_size].
        active: bool[sequences].
    """
    sequence = jnp.arange(len(key))
    keys = cache.keys.at[sequence, cache.tokens].set(key)
    values = cache.values.at[sequence, cache.tokens].set(value)
    tokens = cache.tokens + active

    # Position i summarises the tokens [i*STRIDE, i*STRIDE + COMPRESS_BLOCK).
    completes = active & (tokens == cache.lengths * STRIDE + COMPRESS_BLOCK)
    summarised = tokens[:, None] - COMPRESS_BLOCK + jnp.arange(COMPRESS_BLOCK)

    # Every sequence whose last page is full takes the next free page of the pool.
    row = cache.lengths % PAGE
    needs_page = completes & (row == 0)
    free = cache.pages_taken + jnp.cumsum(needs_page, dtype=jnp.int32) - 1
    column = cache.lengths // PAGE
    page = jnp.where(needs_page, free, cache.block_table[sequence, column])

    # Writes of the sequences that complete no window go past the end, where JAX drops them.
    def put(pool: jax.Array, tokens_of_it: jax.Array) -> jax.Array:
        summary = jnp.mean(tokens_of_it[sequence[:, None], summarised], axis=1, dtype=jnp.float32)
        rows = summary.reshape(len(sequence), -1).astype(pool.dtype)
        return pool.at[jnp.where(completes, page, len(pool)), row].set(rows, mode="drop")

    return Cache(
        keys=keys,
        values=values,
        tokens=tokens,
        key_pages=put(cache.key_pages, keys),
        value_pages=put(cache.value_pages, values),
        block_table=cache.block_table.at[sequence, column].set(page),
        lengths=cache.lengths + completes,
        pages_taken=cache.pages_taken + jnp.sum(needs_page, dtype=jnp.int32),
    )


def attend(query: jax.Array, cache: Cache, seen: jax.Array, positions: jax.Array) -> jax.Array:
    """Softmax attention of one token to some original tokens of its sequence.

    Args:
        query: dtype[sequences, heads, head_size].
        cache: the original tokens.
        seen: bool[sequences, kv_heads, n], which of `positions` count.
        positions: int32[sequences, kv_heads, n], token positions.

    Returns:
        float32[sequences, heads, value_size], 0 where nothing is seen.
    """
    sequence, head = jnp.arange(len(query))[:, None, None], jnp.arange(KEY_VALUE_HEADS)[:, None]
    keys = cache.keys[sequence, positions, head].astype(jnp.float32)
    values = cache.values[sequence, positions, head].astype(jnp.float32)
    grouped = query.reshape(-1, KEY_VALUE_HEADS, GROUP, HEAD_SIZE).astype(jnp.float32)
    scores = SCALE * jnp.einsum("bhgd,bhnd->bhgn", grouped, keys, precision="highest")
    seen = seen[:, :, None]
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, -1e30)), 0.0)
    attention = jnp.einsum("bhgn,bhnd->bhgd", weights, values, precision="highest")
    return attention.reshape(len(query), HEADS, VALUE_SIZE)


def decode_step(
    cache: Cache,
    token: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    implementation: str | None = None,
) -> tuple[Cache, tuple[jax.Array, jax.Array]]:
    """Takes a token of every active sequence; returns the cache, the output and the blocks."""
    query, key, value, active = token
    cache = append(cache, key, value, active)

    compressed, blocks = jax_nsa.nsa_compress_attention_infer(
        query,
        cache.key_pages,
        cache.value_pages,
        scale_value=SCALE,
        head_num=HEADS,
        key_value_head_num=KEY_VALUE_HEADS,
        select_block_size=SELECT_BLOCK,
        select_block_count=SELECT_COUNT,
        page_block_size=PAGE,
        compress_block_size=COMPRESS_BLOCK,
        compress_stride=STRIDE,
        block_table=cache.block_table,
        actual_cmp_seq_kvlen=cache.lengths,
        implementation=implementation,
    )

    # The tokens of the chosen blocks; -1 stands for no block.
    last = cache.tokens[:, None, None]
    chosen = blocks[..., None] * SELECT_BLOCK + jnp.arange(SELECT_BLOCK)
    exists = jnp.broadcast_to(blocks[..., None] >= 0, chosen.shape)
    chosen, exists = (x.reshape(*x.shape[:2], -1) for x in (chosen, exists))
    selected = attend(query, cache, exists & (chosen < last), chosen)

    # The newest tokens, which the last compression window may not have reached.
    newest = last - 1 - jnp.arange(NEWEST)
    newest = jnp.broadcast_to(newest, (len(query), KEY_VALUE_HEADS, NEWEST))
    window = attend(query, cache, newest >= 0, newest)

    output = (
        GATES["compression"] * compressed.astype(jnp.float32)
        + GATES["selection"] * selected
        + GATES["window"] * window
    )
    return cache, (output, blocks)


@functools.partial(jax.jit, static_argnames="implementation")
def decode(cache: Cache, tokens: tuple[jax.Array, ...], implementation: str | None = None):
    """Scans `decode_step` over the leading axis of `tokens`: one program for all the steps."""
    step = functools.partial(decode_step, implementation=implementation)
    return jax.lax.scan(step, cache, tokens)


# All below checks the above: the last step once more, in NumPy, from the original tokens alone.


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def check_last_step(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    output: np.ndarray,
    blocks: np.ndarray,
) -> float:
    """Recomputes one sequence's output densely in float64; returns the largest difference.

    Args:
        query: `[heads, head_size]` of the last token.
        keys: `[tokens, kv_heads, head_size]`, the whole sequence.
        values: `[tokens, kv_heads, value_size]`.
        output: `[heads, value_size]`, what the loop made of it.
        blocks: `[kv_heads, k]`, the blocks that the loop chose.
    """
    tokens = len(keys)
    starts = range(0, tokens - COMPRESS_BLOCK + 1, STRIDE)
    num_blocks = -(-(starts[-1] + COMPRESS_BLOCK) // SELECT_BLOCK)
    difference = 0.0
    for h in range(KEY_VALUE_HEADS):
        q = query[h * GROUP : (h + 1) * GROUP]
        # The loop holds its summaries in the cache's bfloat16, so these are rounded alike.
        k, v = (
            np.stack([x[i : i + COMPRESS_BLOCK, h].mean(0) for i in starts])
            .astype(jnp.bfloat16)
            .astype(np.float64)
            for x in (keys, values)
        )
        weights = softmax(SCALE * q @ k.T)
        compressed = weights @ v

        # A block's importance: the weights of the positions around it, once for each stride of a
        # window that falls in reach (the paper's eq. 9), over the group's heads.
        strides, reach = SELECT_BLOCK // STRIDE, COMPRESS_BLOCK // STRIDE
        importance = np.zeros(num_blocks)
        for j in range(num_blocks):
            for m in range(strides):
                for n in range(reach):
                    position = strides * (j + 1) - m - n
                    if 0 <= position < len(starts):
                        importance[j] += weights[:, position].sum()
        importance[[0, -2, -1]] = np.inf  # the first and the two last are always in
        best = np.sort(importance)[::-1][:SELECT_COUNT]
        np.testing.assert_allclose(importance[blocks[h]], best, rtol=1e-3)

        position = np.arange(tokens)
        selected = np.isin(position // SELECT_BLOCK, blocks[h])
        newest = position >= tokens - NEWEST
        scores = SCALE * q @ keys[:, h].T
        expected = GATES["compression"] * compressed
        for name, seen in (("selection", selected), ("window", newest)):
            expected += GATES[name] * softmax(np.where(seen, scores, -np.inf)) @ values[:, h]
        ours = output[h * GROUP : (h + 1) * GROUP]
        difference = max(difference, float(np.abs(ours - expected).max()))
    return difference


def main(sequences: int = 3, steps: int = 700, implementation: str | None = None) -> float:
    """Decodes random tokens and checks the last step; returns the largest difference."""
    normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
    seeds = jax.random.split(jax.random.key(0), 3)
    q = normal(seeds[0], [steps, sequences, HEADS, HEAD_SIZE])
    k = normal(seeds[1], [steps, sequences, KEY_VALUE_HEADS, HEAD_SIZE])
    v = normal(seeds[2], [steps, sequences, KEY_VALUE_HEADS, VALUE_SIZE])
    # Sequences join one after another, so that each fills its windows and pages in its own time.
    joins = 150 * np.arange(sequences)
    active = np.arange(steps)[:, None] >= joins

    cache = empty_cache(sequences)
    cache, (outputs, blocks) = decode(cache, (q, k, v, active), implementation)

    worst = 0.0
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for b in range(sequences):
        mine = slice(joins[b], steps)
        difference = check_last_step(
            q[-1, b], k[mine, b], v[mine, b], np.asarray(outputs[-1, b]), np.asarray(blocks[-1, b])
        )
        pages = [int(page) for page in cache.block_table[b] if page >= 0]
        print(
            f"sequence {b}: {cache.tokens[b]} tokens, {cache.lengths[b]} compressed positions "
            f"in pages {pages}; differs from dense by {difference:.1e}"
        )
        worst = max(worst, difference)
    assert worst < 5e-3, "the decode loop disagrees with the dense computation"
    return worst


if __name__ == "__main__":
    main()
