"""The JAX primitive: what it takes and gives, and which implementation a platform gets.

Operands, all dense and row-major:

    query        dtype[sequences, tokens, heads, head_size]; ragged: dtype[rows, heads, head_size]
    key          dtype[pages, page, kv_heads * head_size]
    value        dtype[pages, page, kv_heads * value_size]
    block_table  int32[sequences, pages_per_sequence]
    lengths      int32[sequences], compressed positions of each sequence

and, unless every sequence has exactly `tokens` tokens that see all of it,

    token_counts  int32[sequences], the tokens of each sequence
    early_counts  int32[sequences], how many leading tokens of it ignore its last position;
                  negative: the sequence is ill-formed
    first_rows    int32[sequences], only when ragged: where each sequence's rows start in `query`.
                  A sequence owns the rows up to the next one's first, the last one those to the
                  end; owned rows past its count hold no token.

Results, with query's leading axes:

    attention     dtype[..., heads, value_size]; float32 beside block_scores
    topk_indices  int32[..., kv_heads, k]
    lse           float32[..., heads], where the problem asks for it
    block_scores  float32[..., heads, blocks], where the problem asks for it too: each head's own
                  score of each block that a full block table has, none forced, 0 past the sequence
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import ad, batching, mlir, xla

from jax_nsa import _compat, backends, partition, reference
from jax_nsa.problem import Problem

compress_attention_p = core.Primitive("nsa_compress_attention")
compress_attention_p.multiple_results = True
compress_attention_p.def_impl(functools.partial(xla.apply_primitive, compress_attention_p))
_compat.tell_devices(compress_attention_p)


def bind(
    *operands: jax.Array,
    problem: Problem,
    implementation: Sequence[str] | None = None,
    host_lengths: tuple[int, ...] | None = None,
) -> list[jax.Array]:
    """Applies the primitive.

    Args:
        *operands: as the module's head describes them.
        problem: the static problem.
        implementation: names to choose from, the preferred first; None for the platform's default.
        host_lengths: the values of `lengths` where they are constants of the program.
    """
    return compress_attention_p.bind(
        *_compat.vary_alike(*operands),
        problem=problem,
        implementation=implementation,
        host_lengths=host_lengths,
    )


@compress_attention_p.def_abstract_eval
def _abstract_eval(
    query: Any, key: Any, value: Any, block_table: Any, lengths: Any, *tokens: Any,
    problem: Problem, implementation: Any, host_lengths: Any,
) -> list[Any]:  # fmt: skip
    del implementation, host_lengths
    *leading, heads, _ = query.shape
    kv_heads, value_size = problem.key_value_heads, value.shape[2] // problem.key_value_heads
    results: list[tuple[tuple[Any, ...], Any]] = [
        ((heads, value_size), jnp.float32 if problem.return_block_scores else query.dtype),
        ((kv_heads, problem.select_block_count), jnp.int32),
    ]
    if problem.return_lse:
        results.append(((heads,), jnp.float32))
    if problem.return_block_scores:
        blocks = problem.window.num_blocks(block_table.shape[1] * key.shape[1])
        results.append(((heads, blocks), jnp.float32))
    operands = (query, key, value, block_table, lengths, *tokens)
    shardings = partition.result_shardings(operands, len(results))
    # `update` keeps the varying axes of shard_map, which a fresh ShapedArray would lose.
    return [
        query.update(
            shape=(*leading, *shape), dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding
        )
        for (shape, dtype), sharding in zip(results, shardings, strict=True)
    ]


def _lower_for(platform: str | None) -> mlir.LoweringRule:
    """The lowering rule of one platform; None stands for all that have no rule of their own."""

    def rule(
        ctx: mlir.LoweringRuleContext, *operands: Any,
        problem: Problem, implementation: Sequence[str] | None, host_lengths: Any,
    ) -> Sequence[Any]:  # fmt: skip
        target = platform or _single_platform(ctx)
        call = backends.Call(problem, tuple(ctx.avals_in), host_lengths)
        backend = backends.choose(target, implementation, call)
        if _compat.is_automatically_partitioned(ctx):
            each = functools.partial(bind, implementation=implementation)
            split = partition.partitioned(each, ctx.avals_in, problem)
            return mlir.lower_fun(split, multiple_results=True)(ctx, *operands)
        return backend.lower(ctx, *operands, call=call)

    return rule


def _single_platform(ctx: mlir.LoweringRuleContext) -> str:
    platforms = ctx.platforms or ctx.module_context.platforms
    return platforms[0] if len(platforms) == 1 else "several"


# JAX takes rules only for platforms it has heard of; an Ascend plugin's is not, so that one goes
# through the rule without a platform.
mlir.register_lowering(compress_attention_p, _lower_for(None))
for _platform in ("cpu", "cuda"):
    mlir.register_lowering(compress_attention_p, _lower_for(_platform), platform=_platform)


def _jvp(primals: Any, tangents: Any, *, problem: Problem, implementation: Any, **_: Any) -> Any:
    """Differentiates the reference; the kernels have no derivative."""
    if implementation != (backends.reference.NAME,):
        raise NotImplementedError(
            "nsa_compress_attention_infer is an inference operator: its kernels have no "
            'derivative. Call it with implementation="reference" to differentiate its attention '
            "output."
        )
    *floats, table, lengths = primals[:5]
    fixed = (table, lengths, *primals[5:])

    def compute(*arrays: jax.Array) -> list[jax.Array]:
        return reference.compress_attention(*arrays, *fixed, problem=problem)

    instantiated = [ad.instantiate_zeros(t) for t in tangents[:3]]
    results, result_tangents = jax.jvp(compute, floats, instantiated)
    # The selected blocks carry no derivative.
    result_tangents[1] = ad.Zero(jax.typeof(results[1]).to_tangent_aval())
    return results, result_tangents


ad.primitive_jvps[compress_attention_p] = _jvp


def _batch(operands: Any, dims: Any, *, problem: Problem, **params: Any) -> Any:
    """vmap: mapped operands fold into the sequences, mapped pages into one pool; one call."""
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    if size == 0:
        raise ValueError("nsa_compress_attention_infer takes no empty arrays: vmap over size 0")
    pages_are_mapped = dims[1] is not None or dims[2] is not None
    query, key, value, table, lengths, *tokens = (
        x if i in (1, 2) and not pages_are_mapped else batching.bdim_at_front(x, d, size)
        for i, (x, d) in enumerate(zip(operands, dims, strict=True))
    )
    ragged = query.ndim == 4
    step = jnp.arange(size, dtype=jnp.int32)
    if pages_are_mapped:
        num_pages = key.shape[1]
        key, value = (pool.reshape(-1, *pool.shape[2:]) for pool in (key, value))
        # An id outside its own pool must not become one of a neighbour's.
        legal = (table >= 0) & (table < num_pages)
        table = jnp.where(legal, table + num_pages * step[:, None, None], jnp.minimum(table, -1))
    if ragged:
        # Nor may a first row past its own query's end become a row of a neighbour's.
        rows = query.shape[1]
        tokens[2] = jnp.minimum(tokens[2], rows) + rows * step[:, None]
    # Sequences, which may be sharded, must stay outermost; ragged rows keep their query's order.
    axis = 0 if ragged else 1

    def fold(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array, 0, axis).reshape(-1, *array.shape[2:])

    host_lengths = params.pop("host_lengths")
    if host_lengths is not None:
        repeated = np.broadcast_to(host_lengths, (size, len(host_lengths)))
        host_lengths = tuple(np.moveaxis(repeated, 0, axis).ravel().tolist())
    results = bind(
        fold(query), key, value, fold(table), fold(lengths), *map(fold, tokens),
        problem=problem, host_lengths=host_lengths, **params,
    )  # fmt: skip
    split = (size, -1) if ragged else (-1, size)
    return [r.reshape(*split, *r.shape[1:]) for r in results], [axis] * len(results)


batching.primitive_batchers[compress_attention_p] = _batch
