"""What this machine can run, and whether it agrees with the reference on a real problem.

The problem is the example in the documentation of `torch_npu.npu_nsa_compress_attention_infer`,
with the legal block table that it lacks. Its scale of 1.0 makes the softmax nearly one-hot, so
most blocks have an importance near nothing: a hard case for agreement on their order.
"""

from __future__ import annotations

import dataclasses
import functools
import platform as python_platform
import textwrap
import time
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

import jax_nsa
from jax_nsa import backends
from jax_nsa.blocks import Blocks
from jax_nsa.compress_attention import reference
from jax_nsa.compress_attention.door import OPERATOR
from jax_nsa.compress_attention.problem import Problem

SEQUENCES, HEADS, KEY_VALUE_HEADS, HEAD_SIZE, VALUE_SIZE = 20, 8, 2, 192, 128
PAGES, PAGE, LENGTH = 160, 128, 1024
PROBLEM = Problem(
    Blocks(compress_block_size=32, compress_stride=16, select_block_size=64),
    scale=1.0,
    key_value_heads=KEY_VALUE_HEADS,
    select_block_count=16,
)

# What a correct implementation may differ by: rounding probabilities and output to bfloat16, half
# a unit in the last place each, and summing in another order.
ATTENTION_TOLERANCE = 2 * 2**-8
IMPORTANCE_TOLERANCE = 1e-4
IMPORTANCE_NOTHING = 1e-30  # below it, denormals may have become zeros

Operands = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Truth:
    """What the reference makes of the problem.

    Attributes:
        attention: float32[sequences, heads, value_size], not rounded to the inputs' dtype.
        indices: int32[sequences, kv_heads, k].
        importance: float32[sequences, kv_heads, blocks]; infinite where always chosen.
    """

    attention: np.ndarray
    indices: np.ndarray
    importance: np.ndarray


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far an implementation's results are from the reference's.

    Attributes:
        attention_error: the largest distance of an attention row, relative to the row's norm.
        exact: indices equal to the reference's.
        tied: indices that differ, but name a block of the same importance.
        total: indices compared.
    """

    attention_error: float
    exact: int
    tied: int
    total: int

    @property
    def holds(self) -> bool:
        """Whether all of it is within what rounding explains. NaN is not."""
        return self.attention_error <= ATTENTION_TOLERANCE and self.exact + self.tied == self.total

    def __str__(self) -> str:
        blocks = f"{self.exact}/{self.total} indices equal"
        if self.tied:
            blocks += f", {self.tied} swapped within a tie"
        if self.exact + self.tied != self.total:
            blocks += f", {self.total - self.exact - self.tied} WRONG"
        return f"attention within {self.attention_error:.1e}, {blocks}"


def seed_operands() -> Operands:
    """Returns query, key, value, block_table and lengths of the problem."""
    keys = jax.random.split(jax.random.key(0), 4)

    def normal(key: jax.Array, *shape: int) -> jax.Array:
        return jax.random.normal(key, shape, jnp.bfloat16)

    block_table = jax.random.permutation(keys[3], PAGES).reshape(SEQUENCES, -1)
    return (
        normal(keys[0], SEQUENCES, HEADS, HEAD_SIZE),
        normal(keys[1], PAGES, PAGE, KEY_VALUE_HEADS * HEAD_SIZE),
        normal(keys[2], PAGES, PAGE, KEY_VALUE_HEADS * VALUE_SIZE),
        block_table.astype(jnp.int32),
        jnp.full(SEQUENCES, LENGTH, jnp.int32),
    )


def seed_call(operands: Operands, implementation: str) -> list[jax.Array]:
    """Runs the operator, compiled for one implementation; returns attention and indices."""
    query, key, value, block_table, lengths = operands
    blocks = PROBLEM.blocks
    results = jax_nsa.nsa_compress_attention_infer(
        query,
        key,
        value,
        scale_value=PROBLEM.scale,
        head_num=HEADS,
        key_value_head_num=KEY_VALUE_HEADS,
        select_block_size=blocks.select_block_size,
        select_block_count=PROBLEM.select_block_count,
        page_block_size=PAGE,
        compress_block_size=blocks.compress_block_size,
        compress_stride=blocks.compress_stride,
        block_table=block_table,
        actual_cmp_seq_kvlen=lengths,
        implementation=implementation,
    )
    return jax.block_until_ready(list(results))


def find_truth(seed: Operands) -> Truth:
    """Computes the reference, past the primitive and in float32 to the end."""
    query, key, value, block_table, lengths = seed
    problem = dataclasses.replace(PROBLEM, return_lse=True, return_block_scores=True)
    compute = jax.jit(functools.partial(reference.compress_attention, problem=problem))
    exact = {"query": query[:, None], "key": key, "value": value}
    operands = {name: array.astype(jnp.float32) for name, array in exact.items()}
    results = compute({**operands, "block_table": block_table, "lengths": lengths})
    names = ("attention", "topk_indices", "block_scores")
    attention, indices, scores = (np.asarray(results[name]) for name in names)
    importance = scores.reshape(SEQUENCES, KEY_VALUE_HEADS, HEADS // KEY_VALUE_HEADS, -1).sum(2)
    importance[..., [0, -2, -1]] = np.inf  # every sequence here fills its block table
    return Truth(attention[:, 0], indices[:, 0], importance)


def compare(truth: Truth, attention: Any, indices: Any) -> Agreement:
    """Measures results against the truth. Swaps of blocks are fine where importances are equal.

    The reference's indices are sorted by importance; so another choice is as good if at every
    rank it has a block of the same importance, and no block twice.
    """
    attention, indices = np.asarray(attention, np.float32), np.asarray(indices)
    distance = np.linalg.norm(attention - truth.attention, axis=-1)
    error = np.max(distance / np.linalg.norm(truth.attention, axis=-1))

    blocks = truth.importance.shape[-1]
    legal = (indices >= 0) & (indices < blocks)
    ranks = np.argsort(indices, axis=-1, kind="stable")
    in_order = np.take_along_axis(indices, ranks, -1)
    repeated = np.zeros_like(legal)
    again = np.diff(in_order, axis=-1, prepend=in_order[..., :1] - 1) == 0
    np.put_along_axis(repeated, ranks, again, -1)

    def importance_of(chosen: np.ndarray) -> np.ndarray:
        return np.take_along_axis(truth.importance, np.clip(chosen, 0, blocks - 1), -1)

    equal = indices == truth.indices
    as_good = np.isclose(
        importance_of(indices),
        importance_of(truth.indices),
        rtol=IMPORTANCE_TOLERANCE,
        atol=IMPORTANCE_NOTHING,
    )
    forced = np.isinf(importance_of(truth.indices))  # these have a fixed order
    tied = ~equal & as_good & ~forced & legal & ~repeated
    return Agreement(float(error), int((equal & ~repeated).sum()), int(tied.sum()), indices.size)


def main() -> int:
    """Prints the report; returns the exit status, 0 only if everything available agrees."""
    device = jax.devices()[0]
    platform = platform_of(device)
    print(
        f"jax_nsa {jax_nsa.__version__}, JAX {jax.__version__}, jaxlib "
        f"{jaxlib.version.__version__}, Python {python_platform.python_version()}"
    )
    kind = device.device_kind if device.device_kind != platform else "host processor"
    print(f"platform {platform}, {len(jax.devices())} x {kind}")

    reasons = {name: backends.why_not(b, OPERATOR, platform) for name, b in backends.ALL.items()}
    names = [name for name, reason in reasons.items() if reason is None]
    chosen = backends.parse(None) or backends.defaults(platform)
    best = next((name for name in chosen if name in names), None)
    print("\nImplementations, best first")
    for name, reason in reasons.items():
        state = "the default here" if name == best else "available"
        print(_entry(name, state if reason is None else f"not here: {reason}"))

    print(
        f"\nThe seed: {SEQUENCES} sequences of {LENGTH} positions in pages of {PAGE}, "
        f"{HEADS}/{KEY_VALUE_HEADS} heads of {HEAD_SIZE}/{VALUE_SIZE}, bfloat16"
    )
    operands = seed_operands()
    truth = find_truth(operands)
    picture = None
    failures = []
    for name in names:
        try:
            attention, indices = seed_call(operands, name)
            agreement = compare(truth, attention, indices)
            seconds = _time(lambda name=name: seed_call(operands, name))
        except Exception as error:  # whatever a backend throws, the others are still worth a look
            print(_entry(name, f"FAILED: {_first_line(error)}"))
            failures.append(name)
            continue
        verdict = "agrees" if agreement.holds else "DISAGREES"
        print(_entry(name, f"{verdict}: {agreement}; {seconds * 1e3:.2f} ms a call"))
        if not agreement.holds:
            failures.append(name)
        elif name == best:
            picture = np.asarray(indices)[0, 0]
    if picture is not None:
        print(f"\nSequence 0, key/value head 0, by {best}")
        print(_draw(picture, truth.importance.shape[-1]))

    if best is None:
        print(f"\nNone of {', '.join(chosen)} can run here.")
    elif failures:
        print(f"\nNot well: {', '.join(failures)}.")
    else:
        print("\nAll is well.")
    return int(bool(failures) or best is None)


def platform_of(device: Any) -> str:
    """The platform that programs for `device` are compiled for, as lowering rules name it."""
    if device.platform != "gpu":
        return str(device.platform)
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def _time(call: Any, repeats: int = 5) -> float:
    """Seconds of the fastest of a few calls."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _entry(name: str, text: str) -> str:
    """A row about one implementation, its text wrapped beside the name."""
    return textwrap.fill(
        text,
        width=100,
        initial_indent=f"  {name:10}  ",
        subsequent_indent=" " * 14,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _draw(indices: np.ndarray, blocks: int, columns: int = 64) -> str:
    """Lists the chosen blocks and marks them on a map of the sequence."""
    row = "".join("#" if block in indices else "." for block in range(blocks))
    size = PROBLEM.blocks.select_block_size
    return "\n".join(
        [
            f"  chose blocks {' '.join(map(str, indices))}",
            f"  of {blocks} blocks of {size} tokens:",
            *(f"  {at:5}  {row[at : at + columns]}" for at in range(0, blocks, columns)),
        ]
    )
