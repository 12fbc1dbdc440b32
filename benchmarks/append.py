"""Times what a token costs beside its decode step: its rows, and the window that it may complete.

    python -m benchmarks.append                     64 sequences of 4096 tokens
    python -m benchmarks.append --sequences 8 --tokens 32768

Each program decodes as many tokens as lie between two windows, so that each sequence completes one
window in it. Figures are medians of programs that take turns, for one token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from jax_nsa import PagedKV, nsa_compress_infer, nsa_decode_step

HEADS, KEY_VALUE_HEADS, HEAD_SIZE, VALUE_SIZE, PAGE = 64, 4, 192, 128, 128
SIZE, STRIDE, BLOCK, CHOSEN, WINDOW = 32, 16, 64, 16, 512


class Caches(NamedTuple):
    """Pools of original keys and values and of compressed ones, and their block tables."""

    pools: tuple[jax.Array, jax.Array]
    compressed: tuple[jax.Array, jax.Array]
    table: jax.Array
    compressed_table: jax.Array


def make_caches(sequences: int, tokens: int) -> Caches:
    """Caches with room for `tokens` tokens of each sequence, their pages in a random order."""
    random = np.random.default_rng(0)

    def paged(rows: int, seed: int) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        columns = -(-rows // PAGE)
        pages = sequences * columns
        table = random.permutation(pages).reshape(sequences, columns)
        key, value = (
            jax.random.normal(
                jax.random.key(seed + i), (pages, PAGE, KEY_VALUE_HEADS * size), jnp.bfloat16
            )
            for i, size in enumerate((HEAD_SIZE, VALUE_SIZE))
        )
        return (key, value), jnp.asarray(table, jnp.int32)

    pools, table = paged(tokens, 0)
    compressed, compressed_table = paged(tokens // STRIDE, 2)
    return Caches(pools, compressed, table, compressed_table)


def rows_of(table: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The page of each sequence's position, and the row in it."""
    return jnp.take_along_axis(table, positions[:, None] // PAGE, axis=1)[:, 0], positions % PAGE


def write_rows(caches: Caches, lengths: jax.Array, rows: Any) -> Caches:
    """Writes a token's keys and values, which make sequences so long."""
    page, row = rows_of(caches.table, lengths - 1)
    pools = tuple(pool.at[page, row].set(new) for pool, new in zip(caches.pools, rows, strict=True))
    return caches._replace(pools=pools)


def write_windows(caches: Caches, lengths: jax.Array) -> Caches:
    """Writes the windows that the token completes."""
    page, row = rows_of(caches.compressed_table, (lengths - SIZE) // STRIDE)
    weight = jnp.full((SIZE, KEY_VALUE_HEADS), 1 / SIZE, jnp.bfloat16)
    compressed = nsa_compress_infer(
        caches.pools, (weight, weight), page * PAGE + row, SIZE, STRIDE, PAGE,
        block_table=caches.table, actual_seq_len=lengths, cache=caches.compressed,
    )  # fmt: skip
    return caches._replace(compressed=compressed)


def step(caches: Caches, lengths: jax.Array, query: jax.Array) -> jax.Array:
    """The token's attention."""
    gates = jnp.full((*query.shape[:2], 3), 0.5, query.dtype)
    return nsa_decode_step(
        query, gates,
        PagedKV(*caches.compressed, caches.compressed_table, (lengths - SIZE) // STRIDE + 1),
        PagedKV(*caches.pools, caches.table, lengths),
        scale_value=HEAD_SIZE**-0.5, head_num=HEADS, key_value_head_num=KEY_VALUE_HEADS,
        select_block_size=BLOCK, select_block_count=CHOSEN, compress_block_size=SIZE,
        compress_stride=STRIDE, window_size=WINDOW,
    )[0]  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4096, help="of each sequence")
    parser.add_argument(
        "--repeat",
        type=int,
        default=15,
        help="programs that a median is of, after one that compiles",
    )
    arguments = parser.parse_args()
    sequences, tokens = arguments.sequences, arguments.tokens

    # Lengths differ, so that each token completes the windows of a sixteenth of the sequences.
    lengths = tokens - 2 * STRIDE + jnp.arange(sequences, dtype=jnp.int32) % STRIDE
    keys = jax.random.split(jax.random.key(9), 3)
    new = tuple(
        jax.random.normal(key, (STRIDE, sequences, KEY_VALUE_HEADS * size), jnp.bfloat16)
        for key, size in zip(keys[:2], (HEAD_SIZE, VALUE_SIZE), strict=True)
    )
    queries = jax.random.normal(keys[2], (STRIDE, sequences, HEADS, HEAD_SIZE), jnp.bfloat16)

    def decode(write: Callable[..., Caches]) -> Callable[[Caches], Caches]:
        def one(carry: tuple[Caches, jax.Array], rows: Any) -> Any:
            caches, lengths = carry
            return (write(caches, lengths + 1, rows), lengths + 1), None

        return jax.jit(
            lambda caches: jax.lax.scan(one, (caches, lengths), new, unroll=True)[0][0],
            donate_argnums=0,
        )

    @jax.jit
    def stepping(caches: Caches) -> jax.Array:
        def one(_: None, query: jax.Array) -> Any:
            return None, step(caches, lengths, query)

        return jax.lax.scan(one, None, queries, unroll=True)[1]

    writes = {
        "rows": decode(write_rows),
        "windows": decode(lambda caches, lengths, rows: write_windows(caches, lengths)),
    }
    samples: dict[str, list[float]] = {"rows": [], "windows": [], "step": []}
    caches = make_caches(sequences, tokens)
    for _ in range(arguments.repeat + 1):
        for name, write in writes.items():
            start = time.perf_counter()
            caches = jax.block_until_ready(write(caches))
            samples[name].append(time.perf_counter() - start)
        samples["step"].append(measure.seconds(lambda caches=caches: stepping(caches)))
    medians = {name: statistics.median(times[1:]) / STRIDE for name, times in samples.items()}
    print(f"{jax.devices()[0].device_kind}: {sequences} sequences of {tokens} tokens, a token")
    for name, median in medians.items():
        share = median / medians["step"]
        print(f"{name:8} {median * 1e6:10.1f} us {share:7.2%} of the step")


if __name__ == "__main__":
    main()
