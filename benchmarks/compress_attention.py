"""Attention over compressed positions, and the choice of blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

import jax_nsa
from benchmarks import problems
from benchmarks.problems import Benchmark, Operands
from jax_nsa.compress_attention.door import OPERATOR
from jax_nsa.shapes import Shape


def floor_bytes(shape: Shape) -> int:
    """Bytes of the compressed keys and values of all sequences."""
    return int(shape.lengths.sum()) * shape.row_bytes


def operands(shape: Shape) -> list[Operands]:
    """Sets of query, key, value, block table and lengths."""
    return [
        jax.block_until_ready(
            (
                problems.query(shape, seed),
                *problems.pools(shape, shape.length, seed),
                problems.table(shape, shape.length, seed),
                jnp.asarray(shape.lengths),
            )
        )
        for seed in range(problems.num_sets(shape.sequences * shape.length * shape.row_bytes))
    ]


def call(shape: Shape, implementation: str | None) -> Callable:
    """The operator as a function of a set."""
    attend = functools.partial(
        jax_nsa.nsa_compress_attention_infer,
        **problems.arguments(shape),
        page_block_size=shape.page,
        compress_block_size=shape.blocks.compress_block_size,
        compress_stride=shape.blocks.compress_stride,
        layout="BSND",
        implementation=implementation,
    )

    def run(query, key, value, table, lengths):
        return attend(query, key, value, block_table=table, actual_cmp_seq_kvlen=lengths)

    return run


def peers(shape: Shape) -> dict[str, Callable]:
    """PyTorch's attention over gathered pages, without a choice of blocks, where it is here."""
    try:
        import torch
    except ImportError:
        return {}
    if shape.ragged:
        return {}

    def run(query, key, value, table, lengths):
        del lengths
        query, key, value, table = map(torch.from_dlpack, (query, key, value, table))
        pages = table.long()
        heads = shape.key_value_heads
        k = key[pages].view(shape.sequences, -1, heads, shape.head_size).transpose(1, 2)
        v = value[pages].view(shape.sequences, -1, heads, shape.value_size).transpose(1, 2)
        q = query.transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return {"torch attention": run}


BENCHMARK = Benchmark(
    name="compress_attention",
    shapes=("tiny", "seed", "b1", "b8", "g1", "cann", "cann4", "b64", "b64r", "b128"),
    needs=(OPERATOR,),
    operands=operands,
    call=call,
    floor_bytes=floor_bytes,
    peers=peers,
)
