"""The whole decode step: all three branches, and their gated sum."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

import jax_nsa
from benchmarks import compress_attention, problems, select_attention
from benchmarks.problems import Benchmark, Operands
from jax_nsa.shapes import Shape


def floor_bytes(shape: Shape) -> int:
    """Bytes of the compressed cache, the chosen blocks and the window.

    The last two blocks, which are always chosen, lie in the window and count once: one whole block,
    and what the sequence has begun of the next.
    """
    size = shape.blocks.select_block_size
    begun = (int(shape.tokens[0]) - 1) % size + 1
    rows = (shape.select_count - 1) * size + begun + shape.window - min(shape.window, size + begun)
    return compress_attention.floor_bytes(shape) + shape.sequences * rows * shape.row_bytes


def operands(shape: Shape) -> list[Operands]:
    """Sets of query, gates and both caches' pools, tables and lengths."""
    tokens = int(shape.tokens[0])
    cache = problems.pools(shape, tokens, 0)
    sets = []
    for seed, compressed in enumerate(compress_attention.operands(shape)):
        query, *compressed_cache = compressed
        gates = jax.nn.sigmoid(problems.normal(seed, *query.shape[:-1], 3))
        table = problems.table(shape, tokens, seed)
        sets.append((query, gates, *compressed_cache, *cache, table, jnp.asarray(shape.tokens)))
    return jax.block_until_ready(sets)


def call(shape: Shape, implementation: str | None) -> Callable:
    """The step as a function of a set."""

    def run(query, gates, *caches):
        return jax_nsa.nsa_decode_step(
            query,
            gates,
            jax_nsa.PagedKV(*caches[:4]),
            jax_nsa.PagedKV(*caches[4:]),
            **problems.arguments(shape),
            compress_block_size=shape.blocks.compress_block_size,
            compress_stride=shape.blocks.compress_stride,
            window_size=shape.window,
            layout="BSND",
            implementation=implementation,
        )

    return run


BENCHMARK = Benchmark(
    name="decode_step",
    shapes=("tiny", "seed", "wide"),
    needs=(*compress_attention.BENCHMARK.needs, *select_attention.BENCHMARK.needs),
    operands=operands,
    call=call,
    floor_bytes=floor_bytes,
)
