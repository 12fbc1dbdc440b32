"""Attention to chosen blocks of original tokens and to a window of the newest, in one call."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jax_nsa
from benchmarks import problems
from benchmarks.problems import Benchmark, Operands
from jax_nsa.select_attention.door import OPERATOR
from jax_nsa.shapes import Shape


def floor_bytes(shape: Shape) -> int:
    """Bytes of the chosen blocks and the window, which share no token here."""
    rows = shape.select_count * shape.blocks.select_block_size + shape.window
    return shape.sequences * rows * shape.row_bytes


def chosen_blocks(shape: Shape, seed: int) -> jax.Array:
    """Ids `[sequences, query_tokens, kv heads, k]` of different blocks before the window."""
    most = (int(shape.tokens[0]) - shape.window) // shape.blocks.select_block_size
    rows = (shape.sequences, shape.query_tokens, shape.key_value_heads)
    random = np.random.default_rng(seed).random((*rows, most))
    return jnp.asarray(np.argsort(random)[..., : shape.select_count], jnp.int32)


def operands(shape: Shape) -> list[Operands]:
    """Sets of query, key, value, ids, block table and lengths, with the same pools for all."""
    tokens = int(shape.tokens[0])
    key, value = problems.pools(shape, tokens, 0)
    return [
        jax.block_until_ready(
            (
                problems.query(shape, seed),
                key,
                value,
                chosen_blocks(shape, seed),
                problems.table(shape, tokens, seed),
                jnp.asarray(shape.tokens),
            )
        )
        for seed in range(problems.num_sets(floor_bytes(shape)))
    ]


def call(shape: Shape, implementation: str | None) -> Callable:
    """The operator as a function of a set."""
    attend = functools.partial(
        jax_nsa.nsa_select_attention_infer,
        **problems.arguments(shape),
        page_block_size=shape.page,
        window_size=shape.window,
        implementation=implementation,
    )

    def run(query, key, value, ids, table, lengths):
        return attend(query, key, value, ids, block_table=table, actual_seq_kvlen=lengths)

    return run


BENCHMARK = Benchmark(
    name="select_attention",
    shapes=("tiny", "seed", "wide"),
    needs=(OPERATOR,),
    operands=operands,
    call=call,
    floor_bytes=floor_bytes,
)
