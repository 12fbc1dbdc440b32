"""Legal calls of every operator, drawn from the whole domain, and held to the oracles.

Sizes at the ends of their ranges are drawn often, as that is where kernels go wrong.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import compress.problems as compress_problems
import compress_attention.problems as problems
import jax
import numpy as np
import select_attention.problems as select_problems
from compress.contract import CompressContract
from compress_attention.contract import CompressAttentionContract
from contract import FORMS
from domain import DTYPES, GROUPS
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from select_attention.contract import SelectAttentionContract

from jax_nsa import native
from jax_nsa.backends.cpu import ISA_VARIABLE

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
        importance=pick(random, "cann", "aligned"),
        init_blocks=pick(random, 1, range(5)), local_blocks=pick(random, 2, range(5)),
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
    window = pick(random, None, 512, range(1, 300))
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


@dataclasses.dataclass(frozen=True)
class Operator:
    """How an operator is fuzzed.

    Attributes:
        draw: a geometry.
        build: its arguments.
        contract: the class whose `check` holds a call to the oracle.
        rows: arguments whose first axis is sequences, where rows are not packed.
    """

    draw: Callable[[Random], Any]
    build: Callable[[Any], dict[str, Any]]
    contract: type
    rows: tuple[str, ...]


TABLE = ("block_table", "actual_seq_qlen")
OPERATORS = {
    "compress_attention": Operator(
        compress_attention, problems.build, CompressAttentionContract,
        ("query", *TABLE, "actual_cmp_seq_kvlen", "actual_sel_seq_kvlen"),
    ),
    "select_attention": Operator(
        select_attention, select_problems.build, SelectAttentionContract,
        ("query", "topk_indices", *TABLE, "actual_seq_kvlen"),
    ),
    "compress": Operator(compress, compress_problems.build, CompressContract, ()),
}  # fmt: skip


def check(operator: str, implementation: str, random: Random) -> str:
    """Draws a call, and its transformation if it is attention, and holds it to the oracle."""
    known = OPERATORS[operator]
    geometry = known.draw(random)
    form = pick(random, *FORMS)
    isas = native.module().cpu_kernels() if implementation == "cpu" else [""]
    os.environ[ISA_VARIABLE] = pick(random, "", *isas)
    tester = known.contract()
    tester.implementation = implementation
    told = f"{os.environ[ISA_VARIABLE] or 'default'}, {form}, {geometry}"
    try:
        tester.check(geometry, form)
        if operator != "compress" and random.random() < 0.4:
            transform = pick(random, _check_vmap, _check_mesh)
            transform(tester, known, geometry, random)
    except Exception as error:
        error.add_note(told)
        raise
    finally:
        os.environ.pop(ISA_VARIABLE, None)
    return told


def _check_vmap(tester: Any, known: Operator, geometry: Any, random: Random) -> None:
    """Two calls of one geometry under `jax.vmap`; all that tells them apart is mapped."""
    both = [known.build(dataclasses.replace(geometry, seed=geometry.seed + i)) for i in range(2)]
    names = _arrays(both[0])
    same = {n for n in names if np.array_equal(both[0][n], both[1][n])}
    mapped = {n for n in names if n not in same or random.random() < 0.5}
    if random.integers(2):  # or they share their caches, and with them whose pages are whose
        shared = {"key", "value", "block_table"}
        mapped -= shared
        both[1] |= {n: both[0][n] for n in shared}
    arrays = {n: np.stack([arguments[n] for arguments in both]) for n in mapped}
    results = jax.jit(jax.vmap(lambda mapped: tester.apply({**both[0], **mapped})))(arrays)
    for i, arguments in enumerate(both):
        tester.assert_agrees(tuple(r[i] for r in results), arguments)


def _check_mesh(tester: Any, known: Operator, geometry: Any, random: Random) -> None:
    """The same over a mesh, sequences or heads split where they divide."""
    arguments = known.build(geometry)
    devices = jax.devices()
    packed = geometry.layout == "TND" and geometry.token_counts is not None
    divides = len(geometry.lengths) % len(devices) == 0 and not packed
    by_rows = divides and random.integers(2)
    if len(devices) < 2 or (not by_rows and geometry.key_value_heads % len(devices)):
        return
    axis_type = pick(random, AxisType.Auto, AxisType.Explicit)
    mesh = jax.make_mesh((len(devices),), ("x",), axis_types=(axis_type,))
    heads = {"query": -1 if geometry.layout == "BSH" else -2, "topk_indices": -2}
    heads |= {"key": 2, "value": 2}

    def spec(name: str) -> PartitionSpec:
        if by_rows:
            return PartitionSpec("x") if name in known.rows else PartitionSpec()
        entries: list[str | None] = [None] * arguments[name].ndim
        if name in heads:
            entries[heads[name]] = "x"
        return PartitionSpec(*entries)

    placed = {
        n: jax.device_put(arguments[n], NamedSharding(mesh, spec(n))) for n in _arrays(arguments)
    }
    with jax.set_mesh(mesh):
        results = jax.jit(lambda arrays: tester.apply({**arguments, **arrays}))(placed)
    tester.assert_agrees(results, arguments)


def _arrays(arguments: dict[str, Any]) -> list[str]:
    return [n for n, a in arguments.items() if isinstance(a, np.ndarray) and n != "atten_mask"]
