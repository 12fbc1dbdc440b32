"""A decode step to try implementations with, and NumPy's opinion of it in double precision.

Four sequences of 4096 tokens, a token each, at which a compress window ends: so the step begins
with a row of the compressed cache, and every operator has its turn.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_nsa.compress.door import nsa_compress_infer
from jax_nsa.compress_attention.door import nsa_compress_attention_infer
from jax_nsa.select_attention.door import nsa_select_attention_infer
from jax_nsa.shapes import SHAPES
from jax_nsa.step import PagedKV, nsa_decode_step

SHAPE = SHAPES["trial"]
SEQUENCES, LENGTH, TOKENS, PAGE = SHAPE.sequences, SHAPE.length, int(SHAPE.tokens[0]), SHAPE.page
HEADS, KEY_VALUE_HEADS = SHAPE.heads, SHAPE.key_value_heads
HEAD_SIZE, VALUE_SIZE = SHAPE.head_size, SHAPE.value_size
BLOCKS, SELECT_COUNT, WINDOW = SHAPE.blocks, SHAPE.select_count, SHAPE.window
SCALE = 0.25  # sharp enough that blocks differ, and not so sharp that one takes all
CHOOSABLE = BLOCKS.num_blocks(LENGTH)

# What rounding explains: half a unit in the last place of bfloat16 for each of probabilities and
# result, and sums in another order.
ATTENTION_TOLERANCE = 2 * 2**-8
ROW_TOLERANCE = 2**-8
IMPORTANCE_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far results are from the truth.

    Attributes:
        error: the largest distance of a row from the true one, relative to that one's norm.
        tolerance: what rounding explains of it.
        exact: block ids equal to the true ones.
        tied: ids that differ, but name a block of the same importance.
        total: ids compared.
    """

    error: float
    tolerance: float
    exact: int = 0
    tied: int = 0
    total: int = 0

    @property
    def holds(self) -> bool:
        """Whether all of it is within what rounding explains. NaN is not."""
        return self.error <= self.tolerance and self.exact + self.tied == self.total

    def __str__(self) -> str:
        said = f"within {self.error:.1e}"
        if self.total:
            said += f", {self.exact}/{self.total} blocks equal"
        if self.tied:
            said += f", {self.tied} swapped within a tie"
        if self.exact + self.tied != self.total:
            said += f", {self.total - self.exact - self.tied} WRONG"
        return said


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "query", "gates", "key", "value", "block_table", "compressed_key", "compressed_value",
        "compressed_table", "completed",
    ],
    meta_fields=[],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class Trial:
    """The step's arrays; a pytree.

    Attributes:
        query: `[sequences, heads, head_size]`.
        gates: float32 `[sequences, heads, 3]`.
        key: the pool of original keys `[pages, page, kv_heads * head_size]`; `value` likewise.
        block_table: int32 `[sequences, pages of each]`.
        compressed_key: the pool of compressed keys, which lacks the row that the step completes,
            and has NaN for it; `compressed_value` likewise.
        compressed_table: its block table.
        completed: int32 `[sequences]`, the row of the compressed pools that is completed.
    """

    query: jax.Array
    gates: jax.Array
    key: jax.Array
    value: jax.Array
    block_table: jax.Array
    compressed_key: jax.Array
    compressed_value: jax.Array
    compressed_table: jax.Array
    completed: jax.Array

    def compress(self, implementation: str) -> tuple[jax.Array, jax.Array]:
        """The compressed pools with the row that the step completes."""
        size = BLOCKS.compress_block_size  # a power of two: the mean's weights are exact
        weight = jnp.full((size, KEY_VALUE_HEADS), 1 / size, self.key.dtype)
        key, value = nsa_compress_infer(
            (self.key, self.value), (weight, weight), self.completed, BLOCKS.compress_block_size,
            BLOCKS.compress_stride, PAGE, block_table=self.block_table,
            actual_seq_len=[TOKENS] * SEQUENCES, implementation=implementation,
            cache=(self.compressed_key, self.compressed_value),
        )  # fmt: skip
        return key, value

    def attend(
        self, key: jax.Array, value: jax.Array, implementation: str, importance: str = "cann"
    ) -> Any:
        """Attention to the compressed pools, and the blocks that a rule chooses."""
        return nsa_compress_attention_infer(
            self.query, key, value, SCALE, HEADS, KEY_VALUE_HEADS, BLOCKS.select_block_size,
            SELECT_COUNT, PAGE, BLOCKS.compress_block_size, BLOCKS.compress_stride,
            block_table=self.compressed_table, actual_cmp_seq_kvlen=[LENGTH] * SEQUENCES,
            actual_sel_seq_kvlen=[TOKENS] * SEQUENCES, implementation=implementation,
            importance=importance,
        )  # fmt: skip

    def select(self, chosen: jax.Array, implementation: str) -> Any:
        """Attention to the chosen blocks, and to the window."""
        return nsa_select_attention_infer(
            self.query, self.key, self.value, chosen, SCALE, HEADS, KEY_VALUE_HEADS,
            BLOCKS.select_block_size, SELECT_COUNT, PAGE, "TND", block_table=self.block_table,
            actual_seq_kvlen=[TOKENS] * SEQUENCES, window_size=WINDOW,
            implementation=implementation,
        )  # fmt: skip

    def step(self, implementation: str) -> tuple[jax.Array, jax.Array]:
        """The whole step: the row it completes, then attention and the chosen blocks."""
        lengths = functools.partial(jnp.full, SEQUENCES, dtype=jnp.int32)
        key, value = self.compress(implementation)
        return nsa_decode_step(
            self.query, self.gates,
            PagedKV(key, value, self.compressed_table, lengths(LENGTH)),
            PagedKV(self.key, self.value, self.block_table, lengths(TOKENS)),
            scale_value=SCALE, head_num=HEADS, key_value_head_num=KEY_VALUE_HEADS,
            select_block_size=BLOCKS.select_block_size, select_block_count=SELECT_COUNT,
            compress_block_size=BLOCKS.compress_block_size,
            compress_stride=BLOCKS.compress_stride, window_size=WINDOW,
            implementation=implementation,
        )  # fmt: skip


def make() -> tuple[Trial, Truth]:
    """Draws the step, from a fixed seed, and computes what is true of it."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(jnp.bfloat16)

    def paged(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows `[sequences, n, width]` in pages in random order, with NaN where there are none."""
        columns = -(-rows.shape[1] // PAGE)
        table = rng.permutation(SEQUENCES * columns).reshape(SEQUENCES, columns)
        padded = np.full((SEQUENCES, columns * PAGE, rows.shape[2]), np.nan, rows.dtype)
        padded[:, : rows.shape[1]] = rows
        pool = np.empty((table.size, PAGE, rows.shape[2]), rows.dtype)
        pool[table] = padded.reshape(*table.shape, PAGE, -1)
        return pool, table.astype(np.int32)

    sizes = np.array([HEAD_SIZE, VALUE_SIZE]) * KEY_VALUE_HEADS
    rows = normal(SEQUENCES, TOKENS, sizes.sum())
    at = BLOCKS.compress_stride * np.arange(LENGTH)[:, None] + np.arange(BLOCKS.compress_block_size)
    compressed = rows.astype(np.float32)[:, at].mean(2).astype(rows.dtype)
    pool, table = paged(rows)
    compressed_pool, compressed_table = paged(compressed[:, :-1])
    query = normal(SEQUENCES, HEADS, HEAD_SIZE)
    gates = 1 / (1 + np.exp(-rng.standard_normal((SEQUENCES, HEADS, 3), np.float32)))
    arrays = (
        query, gates, *np.split(pool, sizes[:1], -1), table,
        *np.split(compressed_pool, sizes[:1], -1), compressed_table,
        compressed_table[:, (LENGTH - 1) // PAGE] * PAGE + (LENGTH - 1) % PAGE,
    )  # fmt: skip
    return Trial(*map(jnp.asarray, arrays)), Truth.of(query, gates, rows, compressed)


@dataclasses.dataclass(frozen=True)
class Truth:
    """What is true of the step, in double precision.

    Attributes:
        query, gates: the step's.
        keys, values: original rows `[sequences, kv_heads, tokens, size]`.
        newest: the completed row of the compressed pools, `[sequences, size of keys and values]`.
        attention: to the compressed rows, `[sequences, heads, value_size]`.
        importance: `[sequences, kv_heads, blocks]`, by CANN's rule; infinite where always chosen.
        aligned_importance: by the aligned rule.
    """

    query: np.ndarray
    gates: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    newest: np.ndarray
    attention: np.ndarray
    importance: np.ndarray
    aligned_importance: np.ndarray

    @classmethod
    def of(
        cls, query: np.ndarray, gates: np.ndarray, rows: np.ndarray, compressed: np.ndarray
    ) -> Truth:
        """Computes it from unpaged rows."""
        query = query.astype(np.float64)
        attention, weights = _attend(query, *_heads(compressed))
        by_group = weights.reshape(SEQUENCES, KEY_VALUE_HEADS, -1, LENGTH).sum(2)
        return cls(
            query, gates.astype(np.float64), *_heads(rows),
            compressed[:, -1].astype(np.float64), attention, _importance(by_group, late=1),
            _importance(by_group, late=0),
        )  # fmt: skip

    @property
    def chosen(self) -> np.ndarray:
        """The blocks, the always chosen ones first, then by importance: `[B, kv_heads, k]`."""
        return np.argsort(-self.importance, axis=-1, kind="stable")[..., :SELECT_COUNT]

    def branches(self, chosen: np.ndarray) -> list[np.ndarray]:
        """Attention to the compressed rows, to the chosen blocks, and to the window."""
        size = BLOCKS.select_block_size
        token = np.arange(TOKENS)
        selected = np.any(token // size == np.asarray(chosen)[..., None], axis=2)
        seen = (selected, token >= TOKENS - WINDOW)
        return [self.attention, *(_attend(self.query, self.keys, self.values, s)[0] for s in seen)]

    def judge_compress(self, trial: Trial, pools: tuple[jax.Array, ...]) -> Agreement:
        """Measures the completed rows; every other row must be as it was."""
        rows = KEY_VALUE_HEADS * (HEAD_SIZE + VALUE_SIZE)
        before = np.concatenate([trial.compressed_key, trial.compressed_value], -1)
        before, after = (
            x.reshape(-1, rows).astype(np.float64) for x in (before, np.concatenate(pools, -1))
        )
        error = _error(after[trial.completed], self.newest)
        after[trial.completed] = before[trial.completed]
        untouched = np.array_equal(after, before, equal_nan=True)
        return Agreement(error if untouched else np.inf, ROW_TOLERANCE)

    def judge_attend(self, attention: Any, chosen: Any) -> Agreement:
        """Measures attention to the compressed rows, and the choice."""
        error = _error(attention, self.attention)
        return Agreement(error, ATTENTION_TOLERANCE, *self._judge_choice(chosen))

    def judge_select(self, attentions: Any) -> Agreement:
        """Measures attention to the blocks that are truly the ones to choose, and the window."""
        expected = self.branches(self.chosen)[1:]
        errors = map(_error, attentions, expected)
        return Agreement(max(errors), ATTENTION_TOLERANCE)

    def judge_step(self, attention: Any, chosen: Any) -> Agreement:
        """Measures the step's attention to what it chose, and the choice."""
        branches = np.stack(self.branches(np.asarray(chosen)), -1)
        expected = (branches * self.gates[..., None, :]).sum(-1)
        error = _error(attention, expected)
        return Agreement(error, ATTENTION_TOLERANCE, *self._judge_choice(chosen))

    def _judge_choice(self, chosen: Any) -> tuple[int, int, int]:
        """Counts ids that are exact and those that are as good; how many there are.

        The true ids are sorted by importance; so another choice is as good if at every rank it has
        a block of the same importance, and no block twice.
        """
        chosen = np.asarray(chosen)
        legal = (chosen >= 0) & (chosen < CHOOSABLE)
        earlier = np.tril(np.ones((SELECT_COUNT, SELECT_COUNT), bool), -1)
        repeated = np.any((chosen[..., None] == chosen[..., None, :]) & earlier, axis=-1)

        def importance_of(ids: np.ndarray) -> np.ndarray:
            return np.take_along_axis(self.importance, np.clip(ids, 0, CHOOSABLE - 1), -1)

        best = importance_of(self.chosen)
        exact = (chosen == self.chosen) & ~repeated
        as_good = np.isclose(importance_of(chosen), best, rtol=IMPORTANCE_TOLERANCE)
        # Those that are always chosen have a fixed order.
        tied = ~exact & as_good & np.isfinite(best) & legal & ~repeated
        return int(exact.sum()), int(tied.sum()), chosen.size


def _importance(weights: np.ndarray, *, late: int) -> np.ndarray:
    """Importance of the blocks, from their positions' weights summed over the heads of a group.

    Args:
        weights: `[sequences, kv_heads, positions]`.
        late: how many positions late a block takes them: 1 by CANN's rule, 0 by the aligned one.
    """
    importance = np.zeros((SEQUENCES, KEY_VALUE_HEADS, CHOOSABLE))
    stride = BLOCKS.compress_stride
    # How often a compressed position counts for a block (arXiv 2502.11089, eq. 9).
    for block in range(CHOOSABLE):
        for m in range(BLOCKS.select_block_size // stride):
            for n in range(BLOCKS.compress_block_size // stride):
                position = BLOCKS.select_block_size // stride * block + m - n + late
                if 0 <= position < LENGTH:
                    importance[..., block] += weights[..., position]
    importance[..., [0, -2, -1]] = np.inf
    return importance


def _heads(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values `[sequences, kv_heads, n, size]` of rows of both."""
    keys, values = np.split(rows.astype(np.float64), [KEY_VALUE_HEADS * HEAD_SIZE], -1)
    by_head = (x.reshape(*rows.shape[:2], KEY_VALUE_HEADS, -1) for x in (keys, values))
    keys, values = (np.moveaxis(x, 2, 1) for x in by_head)
    return keys, values


def _attend(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, seen: Any = True
) -> tuple[np.ndarray, np.ndarray]:
    """Softmax attention over the rows that are seen: `[B, N, Dv]`, and its weights."""
    grouped = query.reshape(SEQUENCES, KEY_VALUE_HEADS, -1, HEAD_SIZE)
    scores = SCALE * grouped @ np.swapaxes(keys, -1, -2)
    seen = np.broadcast_to(seen, (SEQUENCES, KEY_VALUE_HEADS, keys.shape[2]))
    scores = np.where(seen[:, :, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ values).reshape(SEQUENCES, HEADS, -1), weights


def _error(actual: Any, expected: np.ndarray) -> float:
    """The largest distance of a row from the expected one, relative to that one's norm."""
    distance = np.linalg.norm(np.asarray(actual, np.float64) - expected, axis=-1)
    return float(np.max(distance / np.linalg.norm(expected, axis=-1)))


@dataclasses.dataclass(frozen=True)
class Check:
    """Something to try.

    Attributes:
        title: what.
        needs: the operators that it calls, by their targets.
        call: from an implementation's name and arrays to results.
        arrays: those arrays.
        judge: measures results.
    """

    title: str
    needs: frozenset[str]
    call: Callable[..., Any]
    arrays: tuple[Any, ...]
    judge: Callable[[Any], Agreement]


def checks() -> list[Check]:
    """What to try: each operator on what is true so far, and the step."""
    trial, truth = make()
    width = KEY_VALUE_HEADS * HEAD_SIZE
    pools = []
    for pool, rows in (
        (trial.compressed_key, truth.newest[:, :width]),
        (trial.compressed_value, truth.newest[:, width:]),
    ):
        flat = pool.reshape(-1, pool.shape[-1]).at[trial.completed].set(rows.astype(pool.dtype))
        pools.append(flat.reshape(pool.shape))
    chosen = jnp.asarray(truth.chosen, jnp.int32)
    aligned = dataclasses.replace(truth, importance=truth.aligned_importance)
    every = frozenset({"compress", "compress_attention", "select_attention"})
    return [
        Check(
            "compress", frozenset({"compress"}), lambda name, t: t.compress(name), (trial,),
            lambda results: truth.judge_compress(trial, results),
        ),
        Check(
            "compressed attention", frozenset({"compress_attention"}),
            lambda name, t, *pools: t.attend(*pools, name), (trial, *pools),
            lambda results: truth.judge_attend(*results),
        ),
        Check(
            "aligned blocks", frozenset({"compress_attention"}),
            lambda name, t, *pools: t.attend(*pools, name, importance="aligned"), (trial, *pools),
            lambda results: aligned.judge_attend(*results),
        ),
        Check(
            "selected, window", frozenset({"select_attention"}),
            lambda name, t, chosen: t.select(chosen, name), (trial, chosen), truth.judge_select,
        ),
        Check(
            "the whole step", every, lambda name, t: t.step(name), (trial,),
            lambda results: truth.judge_step(*results),
        ),
    ]  # fmt: skip
