"""Context parallelism: sequences whose compressed cache is split over devices along its pages.

Runs inside `jax.shard_map`. Along the mesh axis, device r holds columns `r*P .. (r+1)*P - 1` of the
whole block table and the pages that they name: the positions from `r*P*page` on. Each device
attends to its own positions, and the parts merge by their log-sum-exp:

    attention = sum_r exp(lse_r - lse) * attention_r,    lse = log(sum_r exp(lse_r))

Block scores are linear in the probabilities, so they merge by the same factor, and a group's heads
are summed before anything is sent. A block at the edge of two devices' positions takes some from
both: by CANN's rule the last block of a device takes the next device's first position, by the
aligned rule the first block of a device takes some of the last positions of the device before.
Devices exchange `O(N*Dv + Nkv*blocks)` numbers for each query row; keys, values and probabilities
stay where they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_nsa import _compat, parts, tokens
from jax_nsa.compress_attention import reference
from jax_nsa.compress_attention.problem import Problem

# What a device can know of a row, in ascending order of consequence.
_ABSENT, _PRESENT, _NAN, _FAULTY = range(4)


@_compat.with_usual_promotion
def merge_parts(
    bind: Callable[..., dict[str, jax.Array]],
    operands: Mapping[str, jax.Array],
    *,
    problem: Problem,
    axis_name: Hashable,
) -> dict[str, jax.Array]:
    """Applies the operator to sequences split over a mesh axis.

    Args:
        bind: applies the operator to what a device holds: `bind(operands, problem=...)`.
        operands: the operands on this device: its pages and its columns of the block table; query,
            lengths and what tells tokens of the whole sequences.
        problem: the static problem of the whole sequences.
        axis_name: the mesh axis that splits the positions.

    Returns:
        The results for the whole sequences, the same on each device of the axis.

    Raises:
        ValueError: a device's positions do not end where a select block ends.
    """
    part = _Part.of(bind, operands, problem, axis_name)
    here = part.attend(operands["block_table"].shape[1], part.lengths, return_block_scores=True)
    group = operands["query"].shape[-2] // problem.key_value_heads
    # Any row that holds a token has block 0.
    chosen = jnp.repeat(here["topk_indices"][..., 0] == 0, group, axis=-1)
    whole = _Whole.of(here["lse"], chosen, axis_name)
    factor = jnp.where(whole.is_bad, jnp.nan, jnp.exp(here["lse"] - whole.known))
    attention, importance = lax.psum(
        (here["attention"] * factor[..., None], _importance(part, here, factor, whole.known)),
        axis_name,
    )

    state = whole.state[..., ::group]
    present = (state == _PRESENT) | (state == _NAN)
    num_blocks = jnp.where(present, _blocks_of_rows(operands, problem)[..., None], 0)
    results = {
        "attention": attention.astype(operands["query"].dtype),
        "topk_indices": reference.select(importance, num_blocks, problem),
    }
    return {**results, "lse": whole.lse} if problem.return_lse else results


@dataclasses.dataclass(frozen=True)
class _Part:
    """What a device has of a call.

    Attributes:
        bind: applies the operator.
        operands: those of `merge_parts`.
        problem: of the whole sequences.
        start: where its positions start in the whole sequences: a number of its own.
        size: how many positions a device holds of each sequence.
        devices: how many devices there are.
        lengths: int32[B], of these positions, how many each sequence has.
    """

    bind: Callable[..., dict[str, jax.Array]]
    operands: Mapping[str, jax.Array]
    problem: Problem
    start: jax.Array
    size: int
    devices: int
    lengths: jax.Array

    @classmethod
    def of(
        cls, bind: Callable[..., dict[str, jax.Array]], operands: Mapping[str, jax.Array],
        problem: Problem, axis_name: Hashable,
    ) -> _Part:  # fmt: skip
        size = parts.positions_of_device(
            operands, problem.blocks.strides_per_select_block,
            "select_block_size / compress_stride",
        )  # fmt: skip
        start, devices = lax.axis_index(axis_name) * size, lax.axis_size(axis_name)
        lengths = operands["lengths"]
        # A length that the devices together cannot hold stays a fault on each of them.
        legal = (lengths >= 0) & (lengths <= devices * size)
        here = jnp.where(legal, jnp.clip(lengths - start, 0, size), lengths)
        return cls(bind, operands, problem, start, size, devices, here)

    def attend(self, columns: int, lengths: jax.Array, **changes: Any) -> dict[str, jax.Array]:
        """The operator on the first positions here; early tokens ignore the last of all."""
        changed: dict[str, jax.Array] = {
            "block_table": self.operands["block_table"][:, :columns],
            "lengths": lengths,
        }
        if "early_counts" in self.operands:
            early = self.operands["early_counts"]
            holds_last = self.start + lengths == self.operands["lengths"]
            changed["early_counts"] = jnp.where(holds_last | (early < 0), early, 0)
        if "select_lengths" in self.operands:
            changed["select_lengths"] = self._select_lengths(lengths)
        changes = {"init_blocks": 1, "local_blocks": 0, "causal": False, **changes}
        return self.bind(
            {**self.operands, **changed},
            problem=dataclasses.replace(
                self.problem, return_lse=True, select_block_count=1, **changes
            ),
        )

    def _select_lengths(self, here: jax.Array) -> jax.Array:
        """Original lengths that fit this device's positions; -1 where they are not as they should.

        Whoever holds the last position has what comes after it too. A sequence without positions is
        on the first device.
        """
        blocks, lengths = self.problem.blocks, self.operands["lengths"]
        select_lengths = self.operands["select_lengths"]
        consistent = (select_lengths >= 0) & (blocks.compressed_length(select_lengths) == lengths)
        rest = select_lengths - self.start * blocks.compress_stride
        inner = jnp.where(here > 0, blocks.original_length(here), 0)
        is_last = (self.start + here == lengths) & ((here > 0) | (self.start == 0))
        return jnp.where(consistent, jnp.where(is_last, rest, inner), -1)


@dataclasses.dataclass(frozen=True)
class _Whole:
    """What is known of each head's row from all devices, the worst on any of them deciding.

    Attributes:
        state: int32, one of the states above.
        known: float32, the log-sum-exp; any finite number where the row sees nothing.
        lse: float32, the log-sum-exp: -inf where the row sees nothing, NaN where something is bad.
    """

    state: jax.Array
    known: jax.Array
    lse: jax.Array

    @property
    def is_bad(self) -> jax.Array:
        """Where results are NaN."""
        return self.state >= _NAN

    @classmethod
    def of(cls, lse: jax.Array, chosen: jax.Array, axis_name: Hashable) -> _Whole:
        """Agrees on it from each device's log-sum-exp, and whether it chose a block for the row."""
        state = jnp.where(chosen, _PRESENT, _ABSENT)
        state = jnp.where(jnp.isnan(lse), jnp.where(chosen, _NAN, _FAULTY), state)
        state, peak = parts.worst_and_peak(state, lse, axis_name)
        total = lax.psum(jnp.exp(lse - peak), axis_name)
        empty = total == 0.0
        known = peak + jnp.log(jnp.where(empty, 1.0, total))  # rows that see nothing keep zeros
        whole = jnp.where(empty, -jnp.inf, known)
        return cls(state, known, jnp.where(state >= _NAN, jnp.nan, whole))


def _importance(
    part: _Part, here: Mapping[str, jax.Array], factor: jax.Array, known: jax.Array
) -> jax.Array:
    """This device's share of the importance of all blocks: float32[..., kv heads, blocks].

    Args:
        part: what the device has.
        here: the results of attention to it.
        factor: of each head's row, that makes its probabilities here those of the whole.
        known: the log-sum-exp of the whole.
    """
    problem = part.problem
    before = jnp.zeros_like(known)
    if not problem.aligned:
        # The one position that adds to a block of the device before: this device's first, to the
        # block that ends just before it. Alone in its sequence, its log-sum-exp is its score.
        first = part.attend(1, jnp.minimum(part.lengths, 1))
        before = jnp.exp(first["lse"] - known)
    scores = jnp.concatenate([before[..., None], here["block_scores"] * factor[..., None]], axis=-1)
    heads = problem.key_value_heads
    grouped = scores.reshape(*scores.shape[:-2], heads, scores.shape[-2] // heads, -1)
    importance = jnp.sum(grouped, axis=-2)
    blocks = problem.max_blocks(part.devices * part.size)
    whole, importance = _compat.vary_alike(
        jnp.zeros((*importance.shape[:-1], 1 + blocks), importance.dtype), importance
    )
    first_block = part.start // problem.blocks.strides_per_select_block
    return lax.dynamic_update_slice_in_dim(whole, importance, first_block, axis=-1)[..., 1:]


def _blocks_of_rows(operands: Mapping[str, jax.Array], problem: Problem) -> jax.Array:
    """How many blocks the token in each of query's rows chooses from, as if it held one."""
    lengths = operands["lengths"]
    select_lengths = operands.get("select_lengths", jnp.zeros_like(lengths))
    return reference.blocks_of_tokens(
        tokens.numbers(operands), tokens.counts(operands), tokens.of_rows(operands, lengths),
        tokens.of_rows(operands, select_lengths), problem,
    )  # fmt: skip
