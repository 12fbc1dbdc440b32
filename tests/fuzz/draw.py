"""Geometries of calls, drawn from the whole domain of every operator.

Sizes at the ends of their ranges are drawn often, as that is where kernels go wrong.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import compress.problems as compress_problems
import compress_attention.problems as problems
import numpy as np
import select_attention.problems as select_problems
from domain import DTYPES, GROUPS
from step.problems import Step

Random = np.random.Generator


def pick(random: Random, *choices: Any) -> Any:
    """One of these; a range stands for an integer of it, its ends as often as all between."""
    choice = choices[random.integers(len(choices))]
    if isinstance(choice, range):
        last = choice[-1]
        ends = choice[0], last, choice[random.integers(len(choice))]
        return int(ends[random.integers(3)])
    return choice


def _lengths(random: Random, most: int, sequences: int, *, least: int = 0) -> tuple[int, ...]:
    return tuple(pick(random, range(least, most + 1)) for _ in range(sequences))


def _tokens(random: Random, layouts: tuple[str, ...], sequences: int) -> dict[str, Any]:
    """Layout, tokens and counts of tokens."""
    layout, tokens = pick(random, *layouts), pick(random, 1, 1, range(1, 7))
    counts = None
    if random.random() < 0.5:
        counts = _lengths(random, tokens if layout != "TND" else 6, sequences)
        if layout == "TND" and not any(counts):
            counts = (1, *counts[1:])
    return {"layout": layout, "tokens": 1 if layout == "TND" else tokens, "token_counts": counts}


def _heads(random: Random, rows: int) -> dict[str, Any]:
    """Heads and sizes, fewer where there are many rows, so that the oracle's loops end."""
    groups = [g for g in GROUPS if g == 1 or g * rows <= 256]
    group = pick(random, *groups)
    head_size = pick(random, 64, 128, 192, range(1, 193))
    return {
        "group": group,
        "key_value_heads": pick(random, range(1, max(1, min(4, 256 // (group * rows))) + 1)),
        "head_size": head_size,
        "value_size": pick(random, min(128, head_size), range(1, min(128, head_size) + 1)),
        "dtype": pick(random, *DTYPES),
        "scale": pick(random, head_size**-0.5, 1.0, 0.0, float(random.uniform(-2, 2))),
        "seed": int(random.integers(2**31)),
    }


def _choice(random: Random) -> dict[str, Any]:
    """By which rule blocks are chosen, and which always are."""
    return {
        "importance": pick(random, "cann", "aligned"),
        "init_blocks": pick(random, 1, range(5), 2**31 - 1),
        "local_blocks": pick(random, 2, range(5), 2**31 - 1),
    }


def compress_attention(random: Random) -> problems.Geometry:
    """A call of the compressed branch."""
    sequences = pick(random, range(1, 6))
    window = problems.WINDOWS[random.integers(len(problems.WINDOWS))]
    several = _tokens(random, ("TND", "BSND"), sequences)
    geometry = problems.Geometry(
        **several, **_heads(random, sum(several["token_counts"] or (2,) * sequences) or 1),
        lengths=_lengths(random, pick(random, 40, 150, 500), sequences),
        masked=bool(random.integers(2)), page=16 * pick(random, range(1, 17)), window=window,
        slack=_lengths(random, min(window[1] - 1, window[0] - 1), sequences),
        **_choice(random),
        return_lse=bool(random.integers(2)), shared_pages=bool(random.integers(2)),
        spare_slots=pick(random, range(3)), spread=pick(random, 1.0, 1.0, 0.1, 4.0),
    )  # fmt: skip
    most = max(geometry.num_blocks) + 3
    return dataclasses.replace(geometry, k=pick(random, range(1, most + 1)))


def select_attention(random: Random) -> select_problems.Geometry:
    """A call of the selected branch, the window, or both."""
    sequences = pick(random, range(1, 5))
    several = _tokens(random, ("TND", "BSND", "BSH"), sequences)
    k = pick(random, None, 16, range(1, 20))
    window = pick(random, None, 512, range(1, 300), 2**31 - 1)
    return select_problems.Geometry(
        **several, **_heads(random, sum(several["token_counts"] or (2,) * sequences) or 1),
        lengths=_lengths(random, pick(random, 60, 200, 700), sequences),
        page=16 * pick(random, range(1, 17)), block=16 * pick(random, range(1, 9)),
        k=k, window=64 if k is None and window is None else window,
        return_lse=bool(random.integers(2)), pool_rank=pick(random, 3, 4),
        spare_slots=pick(random, range(3)), ids=pick(random, "any", "any", "any", "none"),
    )  # fmt: skip


def compress(random: Random) -> compress_problems.Geometry:
    """A call of the compression into the cache."""
    sequences = pick(random, range(1, 8))
    size, stride = compress_problems.WINDOWS[random.integers(len(compress_problems.WINDOWS))]
    lengths = [  # windows end at these, or nearly
        max(0, size + stride * int(random.integers(6)) + pick(random, 0, 0, range(-2, 3)))
        for _ in range(sequences)
    ]
    counts = None
    if random.random() < 0.5:
        counts = _lengths(random, stride, sequences)
    return compress_problems.Geometry(
        dtype=pick(random, *DTYPES), weight_dtype=pick(random, None, "float32"),
        lengths=tuple(lengths), token_counts=counts, heads=pick(random, range(1, 9)),
        head_sizes=tuple(pick(random, range(1, 257)) for _ in range(pick(random, 1, 2))),
        page=16 * pick(random, range(1, 17)), window=(size, stride),
        skipped=tuple(int(b) for b in range(sequences) if random.random() < 0.1),
        bias=bool(random.integers(2)), input_rank=pick(random, 3, 4),
        cache=pick(random, *compress_problems.CACHES), spare_slots=pick(random, range(3)),
        seed=int(random.integers(2**31)),
    )  # fmt: skip


def step(random: Random) -> Step:
    """A whole decode step."""
    sequences, tokens = pick(random, range(1, 4)), pick(random, 1, 1, range(1, 7))
    compress, stride, block = problems.WINDOWS[random.integers(len(problems.WINDOWS))]
    layout, counts = pick(random, "TND", "BSND"), None
    if random.random() < 0.5:
        counts = _lengths(random, tokens, sequences)
        if layout == "TND" and not any(counts):
            counts = (1, *counts[1:])
    heads = _heads(random, sequences * tokens)
    original = select_problems.Geometry(
        **heads, layout=layout, tokens=1 if layout == "TND" else tokens, token_counts=counts,
        lengths=_lengths(random, pick(random, 60, 300, 700), sequences, least=tokens),
        page=16 * pick(random, range(1, 17)), block=block, k=pick(random, range(1, 17)),
        window=pick(random, 512, range(1, 300), 2**31 - 1), pool_rank=pick(random, 3, 4),
        spare_slots=pick(random, range(3)),
    )  # fmt: skip
    return Step(
        original, compress=compress, stride=stride, compressed_page=16 * pick(random, range(1, 17)),
        window_page=pick(random, None, 16 * pick(random, range(1, 17))),
        gates=pick(random, heads["dtype"], "float32"), **_choice(random),
    )  # fmt: skip
