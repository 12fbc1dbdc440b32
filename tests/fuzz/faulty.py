"""Illegal values of lengths, counts, page ids, block ids and slots.

Where faults fail the call, the message names argument and place, whether the host knows the value
or not. Elsewhere the sequence's results become NaN and -1, or its row is not written, and no other
sequence's change.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from contract import FORMS

from fuzz.draw import Random, pick

Arguments = dict[str, Any]
LENGTHS = ("actual_cmp_seq_kvlen", "actual_seq_kvlen", "actual_seq_len")
EXTREMES = (-(2**31), 2**31 - 1)


def check(tester: Any, geometry: Any, arguments: Arguments, random: Random) -> str:
    """Spoils one value that the call depends on; returns what it was, or that there is none."""
    faults = list(_faults(geometry, arguments, random))
    if not faults:
        return f"nothing that a fault would spoil, {geometry}"
    name, at, value, sequence = pick(random, *faults)
    faulty = {**arguments, name: arguments[name].copy()}
    faulty[name][at] = value
    told = f"{name}{list(at)} = {value}, {geometry}"
    try:
        if tester.implementation == "cpu" and random.random() < 0.8:
            _expect_failure(tester, faulty, name, at, pick(random, *FORMS))
        else:
            _expect_nan(tester, faulty, arguments, sequence)
    except Exception as error:
        error.add_note(told)
        raise
    return told


def _expect_failure(
    tester: Any, faulty: Arguments, name: str, at: tuple[int, ...], form: str
) -> None:
    try:
        tester.call(faulty, form)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        place = re.escape(f"{name}[{', '.join(map(str, at))}]")
        # Packed sequences after one with a bad count may be the first that do not fit.
        if name == "actual_seq_qlen":
            place = name
        if not re.search(rf"(?<!\w){place}(?!\w)", str(error)):
            raise AssertionError(f"the message does not name {place}: {error}") from error
        return
    raise AssertionError("was not refused")


def _expect_nan(tester: Any, faulty: Arguments, arguments: Arguments, sequence: int) -> None:
    if "cache" in arguments:
        results = tester.call(faulty, "jit, arrays", on_fault="nan")
        tester.assert_agrees(results, arguments, unwritten=(sequence,))
        return
    clean, spoilt = (tester.call(a, "jit, arrays", on_fault="nan") for a in (arguments, faulty))
    own = _rows(arguments) == sequence
    others = ~own
    if arguments.get("layout") == "TND" and "actual_seq_qlen" in arguments:
        # A count moves the rows of all packed sequences that follow.
        others &= _rows(arguments) < sequence
    assert np.any(np.isnan(np.asarray(spoilt[0], np.float32)[own])), "nothing became NaN"
    for before, after in zip(clean, spoilt, strict=True):
        before, after = (np.asarray(r)[others] for r in (before, after))
        assert before.tobytes() == after.tobytes(), "another sequence's results changed"


def _rows(arguments: Arguments) -> np.ndarray:
    """The sequence of each of query's rows."""
    sequences = np.arange(len(arguments["block_table"]))
    query = arguments["query"]
    if arguments["layout"] == "TND":
        return np.repeat(sequences, arguments.get("actual_seq_qlen", np.ones_like(sequences)))
    return np.broadcast_to(sequences[:, None], query.shape[:2])


def _faults(
    geometry: Any, arguments: Arguments, random: Random
) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """Places of values that some result depends on, each with an illegal one and its sequence."""
    lengths = next(n for n in LENGTHS if n in arguments)
    capacity = arguments["block_table"].shape[1] * geometry.page
    needed = _needed_columns(geometry, arguments)
    for b, count in enumerate(geometry.counts):
        if count:
            yield lengths, (b,), pick(random, -1, capacity + 1, *EXTREMES), b
        if "actual_seq_qlen" in arguments and count:
            yield "actual_seq_qlen", (b,), pick(random, -1, *EXTREMES), b
        for column in needed[b]:
            pool = arguments["key"] if "key" in arguments else arguments["input"]
            pages = len(pool[0] if isinstance(pool, tuple) else pool)
            yield "block_table", (b, column), pick(random, -1, pages, *EXTREMES), b
    if "topk_indices" in arguments:
        ids = arguments["topk_indices"]
        for row in np.ndindex(ids.shape[:-2]):
            b = int(_rows(arguments)[row])
            if geometry.layout != "TND" and row[1] >= geometry.counts[b]:
                continue
            blocks = -(-geometry.lengths[b] // geometry.block)
            at = *row, *(int(random.integers(n)) for n in ids.shape[-2:])
            yield "topk_indices", at, pick(random, -2, blocks, *EXTREMES), b
    if "slot_mapping" in arguments:
        cache = arguments["cache"]
        cache = cache[0] if isinstance(cache, tuple) else cache
        rows = cache.shape[0] * (cache.shape[1] if geometry.cache != "rows" else 1)
        for b, end in enumerate(geometry.ends):
            if end is not None:
                yield "slot_mapping", (b,), pick(random, rows, EXTREMES[1]), b


def _needed_columns(geometry: Any, arguments: Arguments) -> list[list[int]]:
    """Columns of the block table through which each sequence reads."""
    page, lengths = geometry.page, geometry.lengths
    if "cache" in arguments:
        size = geometry.window[0]
        spans: list[list[tuple[int, int]]] = [
            [] if end is None else [(end - size, end)] for end in geometry.ends
        ]
    elif "topk_indices" in arguments or "window_size" in arguments:
        spans = [[] for _ in lengths]
        for b, count in enumerate(geometry.counts):
            if count and geometry.window is not None and lengths[b]:
                spans[b].append((max(0, lengths[b] - geometry.window), lengths[b]))
    else:
        spans = [
            [(0, n)] if n and count else []
            for n, count in zip(lengths, geometry.counts, strict=True)
        ]
    return [sorted({p // page for begin, end in each for p in range(begin, end)}) for each in spans]
