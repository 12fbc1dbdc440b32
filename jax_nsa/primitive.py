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

    attention     dtype[..., heads, value_size]
    topk_indices  int32[..., kv_heads, k]
    lse           float32[..., heads], where the problem asks for it
    block_scores  float32[..., heads, blocks], where the problem asks for it too: each head's own
                  score of each block that a full block table has, none forced, 0 past the sequence
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, mlir, xla

from jax_nsa import backends
from jax_nsa.problem import Problem

compress_attention_p = core.Primitive("nsa_compress_attention")
compress_attention_p.multiple_results = True
compress_attention_p.def_impl(functools.partial(xla.apply_primitive, compress_attention_p))


@compress_attention_p.def_abstract_eval
def _abstract_eval(
    query: Any, key: Any, value: Any, block_table: Any, lengths: Any, *tokens: Any,
    problem: Problem, implementation: Any, host_lengths: Any,
) -> list[Any]:  # fmt: skip
    del lengths, tokens, implementation, host_lengths
    *leading, heads, _ = query.shape
    value_size = value.shape[2] // problem.key_value_heads
    indices = (*leading, problem.key_value_heads, problem.select_block_count)
    # `update` keeps the sharding and the varying axes that a fresh ShapedArray would lose.
    results = [
        query.update(shape=(*leading, heads, value_size), weak_type=False),
        query.update(shape=indices, dtype=jnp.dtype("int32"), weak_type=False),
    ]
    if problem.return_lse:
        results.append(
            query.update(shape=(*leading, heads), dtype=jnp.dtype("float32"), weak_type=False)
        )
    if problem.return_block_scores:
        blocks = problem.window.num_blocks(block_table.shape[1] * key.shape[1])
        results.append(
            query.update(
                shape=(*leading, heads, blocks), dtype=jnp.dtype("float32"), weak_type=False
            )
        )
    return results


def _lower_for(platform: str | None) -> mlir.LoweringRule:
    """The lowering rule of one platform; None stands for all that have no rule of their own."""

    def rule(
        ctx: mlir.LoweringRuleContext, *operands: Any,
        problem: Problem, implementation: Sequence[str] | None, host_lengths: Any,
    ) -> Sequence[Any]:  # fmt: skip
        target = platform or _single_platform(ctx)
        call = backends.Call(problem, tuple(ctx.avals_in), host_lengths)
        return backends.choose(target, implementation, call).lower(ctx, *operands, call=call)

    return rule


def _single_platform(ctx: mlir.LoweringRuleContext) -> str:
    platforms = ctx.platforms or ctx.module_context.platforms
    return platforms[0] if len(platforms) == 1 else "several"


# JAX takes rules only for platforms it has heard of; an Ascend plugin's is not, so that one goes
# through the rule without a platform.
mlir.register_lowering(compress_attention_p, _lower_for(None))
for _platform in ("cpu", "cuda"):
    mlir.register_lowering(compress_attention_p, _lower_for(_platform), platform=_platform)


def _refuse_differentiation(*_: Any, **__: Any) -> Any:
    raise NotImplementedError(
        "nsa_compress_attention_infer is an inference operator: its kernels have no derivative. "
        'Call it with implementation="reference" to differentiate its attention output.'
    )


ad.primitive_jvps[compress_attention_p] = _refuse_differentiation
