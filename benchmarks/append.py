"""Times what a token costs beside its decode step: its rows, and the window that it may complete.

    python -m benchmarks.append                     64 sequences of 4096 tokens
    python -m benchmarks.append --sequences 8 --tokens 32768

What is timed is the library's own cache: `PageTables.allocate`, `PagePools.append`. Each program
decodes as many tokens as lie between two windows, so that each sequence completes one window in it.
Figures are medians of programs that take turns, for one token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure
from jax_nsa import PagePools, PageTables, nsa_decode_step

HEADS, KEY_VALUE_HEADS, HEAD_SIZE, VALUE_SIZE, PAGE = 64, 4, 192, 128, 128
SIZE, STRIDE, BLOCK, CHOSEN, WINDOW = 32, 16, 64, 16, 512


def make_cache(sequences: int, tokens: int) -> tuple[PageTables, PagePools]:
    """A cache of sequences of about so many tokens, and room for a program's tokens more.

    Lengths differ, so that each token completes the windows of a sixteenth of the sequences.
    """
    columns = -(-tokens // PAGE)
    tables = PageTables.empty(
        slots=sequences, pages=sequences * columns, pages_per_slot=columns, page_block_size=PAGE,
        compress_block_size=SIZE, compress_stride=STRIDE,
    )  # fmt: skip
    tables, fits = tables.allocate([tokens - 2 * STRIDE + b % STRIDE for b in range(sequences)])
    assert fits.all()
    pools = PagePools.empty(tables, KEY_VALUE_HEADS, HEAD_SIZE, VALUE_SIZE)
    keys = iter(jax.random.split(jax.random.key(0), 4))
    return tables, jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape, p.dtype), pools)


def step(tables: PageTables, pools: PagePools, query: jax.Array) -> jax.Array:
    """A token's attention."""
    return nsa_decode_step(
        query, jnp.full((*query.shape[:2], 3), 0.5, query.dtype), *pools.views(tables),
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
    sequences = arguments.sequences
    tables, pools = make_cache(sequences, arguments.tokens)
    keys = jax.random.split(jax.random.key(9), 3)
    key, value, queries = (
        jax.random.normal(k, (STRIDE, sequences, heads, size), jnp.bfloat16)
        for k, heads, size in zip(
            keys, (KEY_VALUE_HEADS, KEY_VALUE_HEADS, HEADS), (HEAD_SIZE, VALUE_SIZE, HEAD_SIZE),
            strict=True,
        )
    )  # fmt: skip
    mean = jnp.full((SIZE, KEY_VALUE_HEADS), 1 / SIZE)

    one_each = jnp.ones(sequences, jnp.int32)

    @jax.jit
    def allocate(tables: PageTables) -> PageTables:
        def one(tables: PageTables, _: None) -> Any:
            return tables.allocate(one_each)[0], None

        return jax.lax.scan(one, tables, None, STRIDE)[0]

    def append(pools: PagePools, tables: PageTables) -> PagePools:
        def one(cache: tuple[PageTables, PagePools], rows: Any) -> Any:
            tables, _ = cache[0].allocate(one_each)
            return (tables, cache[1].append(tables, *rows, (mean, mean))), None

        rows = key[:, :, None], value[:, :, None]
        return jax.lax.scan(one, (tables, pools), rows)[0][1]

    @jax.jit
    def attend(pools: PagePools, tables: PageTables) -> Any:
        def one(_: None, query: jax.Array) -> Any:
            return None, step(tables, pools, query)

        return jax.lax.scan(one, None, queries)[1]

    appending = jax.jit(append, donate_argnums=0)
    samples: dict[str, list[float]] = {"pages alone": [], "append": [], "step": []}
    for _ in range(arguments.repeat + 1):
        samples["pages alone"].append(measure.seconds(lambda: allocate(tables)))
        start = time.perf_counter()
        pools = jax.block_until_ready(appending(pools, tables))
        samples["append"].append(time.perf_counter() - start)
        samples["step"].append(measure.seconds(lambda pools=pools: attend(pools, tables)))
    medians = {name: statistics.median(times[1:]) / STRIDE for name, times in samples.items()}
    print(f"{jax.devices()[0].device_kind}: {sequences} sequences of {arguments.tokens} tokens")
    for name, median in medians.items():
        share = median / medians["step"]
        print(f"{name:12} {median * 1e6:10.1f} us a token {share:7.2%} of the step")


if __name__ == "__main__":
    main()
