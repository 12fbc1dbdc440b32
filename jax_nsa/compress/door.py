"""The front door: torch_npu's signature, its checks on host values, one bind of the primitive."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_nsa import backends, checks, paged
from jax_nsa.checks import ArrayLike, IntegersLike
from jax_nsa.compress import reference
from jax_nsa.compress.problem import COMPRESSED_HEAD_SIZE_MAX, PAIRS_MAX, Problem, check_windows
from jax_nsa.operator import Array, Operator

# Rows of a cache are shared by all sequences, so only heads split over devices. Keys and values may
# have heads of different sizes, so the arrays of each have axes of their own.
OPERATOR = Operator(
    name="nsa_compress_infer",
    target="compress",
    operands=(
        *(
            array
            for i, size in zip(range(PAIRS_MAX), "de", strict=True)
            for array in (
                Array(f"input_{i}", f"p r (h {size})", argument="input"),
                Array(f"weight_{i}", "l h", argument="weight"),
                Array(f"cache_{i}", f"w h {size}", argument="cache"),
                Array(f"bias_{i}", f"h {size}", argument="bias"),
            )
        ),
        Array("block_table", "b c", points_into="p"),
        Array("lengths", "b", argument="actual_seq_len"),
        Array("slot_mapping", "b", points_into="w v"),
        Array("token_counts", "b", argument="actual_seq_qlen"),
    ),
    results=lambda problem: tuple(
        Array(f"cache_{i}", problem.cache.replace("d", size))
        for i, size in zip(range(problem.pairs), "de", strict=False)
    ),
    sizes=lambda problem, sizes: {},
    reference=reference.compress,
    splits="h",
    aliases=("cache",),
)


def nsa_compress_infer(
    input: ArrayLike | Sequence[ArrayLike],
    weight: ArrayLike | Sequence[ArrayLike],
    slot_mapping: IntegersLike,
    compress_block_size: int,
    compress_stride: int,
    page_block_size: int,
    *,
    block_table: IntegersLike | Sequence[Sequence[int]],
    actual_seq_len: IntegersLike,
    cache: ArrayLike | Sequence[ArrayLike],
    bias: ArrayLike | Sequence[ArrayLike | None] | None = None,
    actual_seq_qlen: IntegersLike | None = None,
    implementation: str | Sequence[str] | None = None,
    on_fault: str | None = None,
) -> jax.Array | tuple[jax.Array, ...]:
    """Writes the compress window that a step completes into the compressed cache.

    The decode step's part in Native Sparse Attention's compression (arXiv 2502.11089, eq. 7), with
    the parameters of `torch_npu.npu_nsa_compress_infer`. Windows of `l` tokens end at the tokens
    `e = l + i * d`, i = 0, 1, ... If one ends among the `q_b` tokens that this step brought to the
    `T_b` of sequence `b`, in `(T_b - q_b, T_b]`, then

        cache[slot_b] = sum(x[e - l + t] * weight[t, :, None] for t in range(l)) + bias

    with `x` the sequence's tokens, accumulated in float32 and rounded once. Nothing else changes.

    It is pure. The result may take over the memory of `cache`: where the program owns it, as under
    `jax.jit(..., donate_argnames=...)` or in the carry of `jax.lax.scan`, nothing is copied. (XLA
    copies a cache that is reshaped on its way to a kernel, and `jax.vmap` reshapes it, as do two
    caches of different shapes: give it as the program keeps it.)

    Keys and values are compressed in one call by giving pairs: `nsa_compress_infer((key, value),
    (key_weight, value_weight), ..., cache=(key_cache, value_cache))` returns both caches. Their
    heads may differ in size.

    Lists, tuples and NumPy arrays of integers are checked before anything runs, the pages and the
    rows of windows as far as the host knows which windows end; values in JAX arrays are never
    waited for, and take effect by the run-time rules below.

    Args:
        input: bfloat16, float16 or float32 `[num_pages, page_block_size, N * D]` or `[num_pages,
            page_block_size, N, D]`, the pool of pages of original keys or values; or a pair of
            these. `D <= 256`.
        weight: `[l, N]`, input's dtype or float32; or a pair of these.
        slot_mapping: integers `[B]`, the row of `cache` that the window becomes. Negative: it is
            not written. Of a sequence that completes no window it is not read.
        compress_block_size: `l`, a multiple of 16 up to 128, at least `compress_stride`.
        compress_stride: `d`: 16, 32, 48 or 64.
        page_block_size: rows in a page of `input`; a multiple of 16 up to 256.
        block_table: integers `[B, P]`: token `i` of sequence `b` lives in page
            `block_table[b, i // page_block_size]`. Entries that no window needs are not read.
        actual_seq_len: integers `[B]`, the original tokens `T_b`, this step's included.
        cache: input's dtype `[R, N, D]`, or pages `[num_pages, page, N * D]` or `[num_pages, page,
            N, D]` of any size, whose rows are numbered through; or a pair of these with equally
            many rows.
        bias: `[N, D]`, input's dtype or float32; None: no bias; or a pair of these.
        actual_seq_qlen: integers `[B]`, this step's tokens `q_b <= d` of each sequence; None: one
            each.
        implementation: None takes the best available for the platform that the program is
            compiled for; a name or a sequence of names ("reference", "cpu", "cuda", "ascend")
            forces one or orders them.
        on_fault: what an implementation on the host does about a bad value that only the running
            program knows: "fail" the call, or, with "nan", write nothing of that window; None fails
            the call in a program of one device and drops the window in one of several.

    Returns:
        The cache with the windows written, in its shape and dtype, `[R, N, D]` say; a tuple of two
        for pairs.

        Run-time rules: a length outside `[0, P * page_block_size]`, a count outside `[0, d]`, and
        of a sequence that completes a window a needed page outside `[0, num_pages)`, a slot from
        R on, or a row that another such sequence names, are faults. Implementations that run on
        the host fail the call; the others, and all with `on_fault="nan"`, do not write the windows
        concerned: of two that name one row neither.

        Devices may share a call by its heads. Sequences do not split, because they write the rows
        of one cache: XLA gathers what is split of them, and on a mesh with explicit axes it is an
        error. Inside `jax.shard_map` each device has a cache of its own.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument with an illegal value or shape; the message names it, its value
            and what is legal.
        NotImplementedError: no implementation can serve the call; the message gives each one's
            reason.
    """
    names = backends.parse(implementation)
    page = paged.page_size(page_block_size)
    size = checks.integer("compress_block_size", compress_block_size)
    stride = checks.integer("compress_stride", compress_stride)
    pairs, several = _pairs(input, weight, cache, bias)
    places = [f"[{i}]" for i in range(len(pairs))] if several else [""]
    heads = _heads(pairs[0], places[0])
    problem = Problem(size, stride, heads, pairs=len(pairs))
    pairs = [
        _check_pair(pair, problem, at, page=page) for pair, at in zip(pairs, places, strict=True)
    ]
    pages = [pair["input"].shape[0] for pair in pairs]
    shapes = [pair["cache"].shape for pair in pairs]
    rows = [
        math.prod(shape) // pair["input"].shape[2]
        for shape, pair in zip(shapes, pairs, strict=True)
    ]
    for name, axis, sizes in (("input", "pages", pages), ("cache", "rows", rows)):
        if sizes[0] != sizes[-1]:
            raise ValueError(
                f"{name}[0] and {name}[1] must have as many {axis}, got {sizes[0]} and {sizes[1]}"
            )
    problem = dataclasses.replace(problem, cache=_lay_out_alike(pairs, heads))

    table = checks.Integers("block_table", block_table, rank=2)
    sequences = paged.sequences(table, (), packed=True)
    lengths = paged.lengths("actual_seq_len", actual_seq_len, table, sequences=sequences, page=page)
    slots = paged.per_sequence("slot_mapping", slot_mapping, sequences)
    counts = None
    if actual_seq_qlen is not None:
        counts = paged.per_sequence("actual_seq_qlen", actual_seq_qlen, sequences)
        counts.check_range(stride, " (compress_stride, so that at most one compress window ends)")
    check_windows(
        table, lengths, counts, slots, problem,
        page=page, pages=pages[0], rows=rows[0],
    )  # fmt: skip

    operands = {
        f"{name}_{i}": jnp.asarray(array)
        for i, pair in enumerate(pairs)
        for name, array in pair.items()
    }
    operands |= {
        "block_table": table.array(), "lengths": lengths.array(), "slot_mapping": slots.array(),
    }  # fmt: skip
    if counts is not None:
        operands["token_counts"] = counts.array()
    results = OPERATOR.bind(operands, problem=problem, implementation=names, on_fault=on_fault)
    caches = tuple(
        array.reshape(shape) for array, shape in zip(results.values(), shapes, strict=True)
    )
    return caches if several else caches[0]


def _pairs(input: Any, weight: Any, cache: Any, bias: Any) -> tuple[list[dict[str, Any]], bool]:
    """The arrays of each input by name, and whether the caller gave pairs; checked as arrays."""
    several = isinstance(input, (tuple, list))
    given = {"input": input, "weight": weight, "cache": cache, "bias": bias}
    if not several:
        lists = {name: [value] for name, value in given.items()}
    else:
        if not 1 <= len(input) <= PAIRS_MAX:
            raise ValueError(
                f"input must be an array or up to {PAIRS_MAX} of them, got {len(input)}"
            )
        lists = {}
        for name, value in given.items():
            lists[name] = [None] * len(input) if name == "bias" and value is None else value
            if not isinstance(lists[name], (tuple, list)) or len(lists[name]) != len(input):
                raise TypeError(
                    f"{name} must be a sequence of {len(input)} arrays, as input is, "
                    f"got {checks.described(value)}"
                )
    pairs: list[dict[str, Any]] = []
    for i in range(len(lists["input"])):
        at = f"[{i}]" if several else ""
        first = ("input", pairs[0]["input"]) if pairs else None
        array = checks.floats(f"input{at}", lists["input"][i], like=first)
        pair = {"input": array}
        for name in ("weight", "cache", "bias"):
            if name != "bias" or lists[name][i] is not None:
                pair[name] = checks.floats(
                    f"{name}{at}",
                    lists[name][i],
                    like=("input", array),
                    or_float32=name != "cache",
                )
        pairs.append(pair)
    return pairs, several


def _heads(pair: dict[str, Any], at: str) -> Any:
    """N, which only the weights' shape tells."""
    shape = tuple(pair["weight"].shape)
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"weight{at} must have shape [compress_block_size, heads], got {shape}")
    return shape[1]


def _check_pair(pair: dict[str, Any], problem: Problem, at: str, *, page: int) -> dict[str, Any]:
    """An input and what goes with it, the input as the operator takes it: `[p, r, N * D]`."""
    heads, block = problem.key_value_heads, problem.compress_block_size
    array, weight, cache = pair["input"], pair["weight"], pair["cache"]
    if tuple(weight.shape) != (block, heads):
        raise ValueError(
            f"weight{at} must have shape [compress_block_size, heads] = {(block, heads)}, "
            f"got {tuple(weight.shape)}"
        )
    shape = tuple(array.shape)
    legal = len(shape) in (3, 4) and shape[1] == page and 0 not in shape
    if not legal or (shape[2] != heads if len(shape) == 4 else shape[2] % heads):
        raise ValueError(
            f"input{at} must have shape [pages, {page}, {heads} * head_size] or [pages, {page}, "
            f"{heads}, head_size] (page_block_size, and the heads of weight), got {shape}"
        )
    width = shape[2] if len(shape) == 3 else heads * shape[3]
    head_size = width // heads
    if head_size > COMPRESSED_HEAD_SIZE_MAX:
        raise ValueError(
            f"input{at}'s head size must be at most {COMPRESSED_HEAD_SIZE_MAX}, got {head_size}"
        )
    rows = tuple(cache.shape)
    if rows[1:] != (heads, head_size) and not (
        (len(rows) == 3 and rows[2] == width) or (len(rows) == 4 and rows[2:] == (heads, head_size))
    ):
        raise ValueError(
            f"cache{at} must have shape [rows, {heads}, {head_size}], [pages, page, {width}] or "
            f"[pages, page, {heads}, {head_size}], as input has {heads} heads of {head_size}, "
            f"got {rows}"
        )
    outcome = {
        "input": array.reshape(*shape[:2], width),
        "weight": weight,
        "cache": cache,
    }
    if "bias" in pair:
        if tuple(pair["bias"].shape) != (heads, head_size):
            raise ValueError(
                f"bias{at} must have shape {(heads, head_size)} (heads, head_size), "
                f"got {tuple(pair['bias'].shape)}"
            )
        outcome["bias"] = pair["bias"]
    return outcome


def _lay_out_alike(pairs: list[dict[str, Any]], heads: int) -> str:
    """The axes of the caches, after bringing those of two that differ in them into rows.

    One that is as it was given is not copied where the program owns it: XLA copies what goes
    through a reshape into a call that writes in place.
    """
    layouts = set()
    for pair in pairs:
        shape, width = pair["cache"].shape, pair["input"].shape[2]
        if len(shape) == 4:
            layouts.add(("w v h d", shape[1]))
        elif shape[1:] == (heads, width // heads):
            layouts.add(("w h d", 1))
        else:
            layouts.add(("w v (h d)", shape[1]))
    if len(layouts) == 1:
        return layouts.pop()[0]
    for pair in pairs:
        pair["cache"] = pair["cache"].reshape(-1, heads, pair["input"].shape[2] // heads)
    return "w h d"
