"""What test_scaling.py starts: the benchmark's program on 2, 4 and 8 devices, beside one.

    python scaling_program.py IMPLEMENTATION

Prints, in JSON, for each split what its results have to do with those of one device, and which
collectives its compiled program has. Where pages are split, each operator is in a program of its
own, so that its collectives are.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

REPOSITORY = pathlib.Path(__file__).parents[1]
sys.path.append(str(REPOSITORY))
from benchmarks.scaling import problem  # noqa: E402
from benchmarks.scaling.collectives import collectives  # noqa: E402
from jax_nsa import nsa_compress_infer  # noqa: E402
from jax_nsa.compress.window import completed_window, window_slots  # noqa: E402
from jax_nsa.shapes import Shape  # noqa: E402

SHAPE = Shape(
    "sequences of all lengths, whose windows lie across devices", 8, 16, 8, 250,
    ragged=True, head_size=16, value_size=8, page=16, select_count=4, window=100,
)  # fmt: skip
STEPS, SETS = 2, 2
ALL = ("compress", "compressed", "selected", "step")
# Meshes of sequences, heads and context, with what runs on them: all in one program, but where
# pages are split. The reference takes long to compile, and its step is made of operators.
PROGRAMS: dict[str, list[tuple[tuple[int, int, int], tuple[str, ...]]]] = {
    "cpu": [
        *((mesh, ALL) for mesh in ((2, 1, 1), (1, 2, 1), (2, 2, 1), (8, 1, 1), (2, 4, 1))),
        *(((1, 1, 8), (name,)) for name in ALL[1:]),
        *((mesh, ("step",)) for mesh in ((1, 1, 2), (1, 1, 4), (2, 2, 2))),
    ],
    "reference": [
        *((mesh, ("compress", "step")) for mesh in ((2, 1, 1), (2, 2, 1), (2, 4, 1))),
        ((1, 1, 8), ("step",)),
    ],
}  # fmt: skip
WEIGHTS = P(None, None, "heads")


def parts(split: problem.Split, implementation: str) -> dict[str, problem.Part]:
    """The benchmark's parts, and the rows that a step compresses."""

    def compress(shared: problem.Arrays, own: problem.Arrays) -> Any:
        pools, written = shared["original"], shared["compressed"]
        lengths, sizes = pools["lengths"], ("key", "value")
        geometry = {"compress_block_size": 32, "compress_stride": 16}
        window = completed_window(lengths, **geometry)

        def rows_of(pool: jax.Array) -> jax.Array:
            heads = SHAPE.key_value_heads // split.heads
            return pool.reshape(-1, heads, pool.shape[-1] // heads)

        slots = window_slots(window, own["compressed"], page_block_size=SHAPE.page)
        caches = nsa_compress_infer(
            tuple(pools[n].reshape(-1, *pools[n].shape[3:]) for n in sizes),
            (own["weight"],) * 2, slots, page_block_size=SHAPE.page, **geometry,
            block_table=own["original"], actual_seq_len=lengths, implementation=implementation,
            cache=tuple(rows_of(written[n]) for n in sizes),
        )  # fmt: skip
        return [cache[slots] for cache in caches]

    return {"compress": compress, **problem.parts(SHAPE, split, implementation)}


def draw(split: problem.Split, ids: np.ndarray | None = None) -> tuple[Any, Any]:
    """The benchmark's arrays, weights of windows, and ids of blocks if there are any."""
    shared, own = problem.draw(SHAPE, split, sets=SETS, steps=STEPS, dtype="float32")
    more = {"weight": (np.random.default_rng(1).random((STEPS, 32, 8), np.float32), WEIGHTS)}
    if ids is not None:
        more["ids"] = (ids, problem.ROWS)
    for name, (array, spec) in more.items():
        own[name] = jax.device_put(array, NamedSharding(split.mesh, spec))
    return shared, own


def run(split: problem.Split, implementation: str, names: tuple[str, ...], operands: Any) -> Any:
    """Results of some parts in one program, by their names, and the program's text."""
    every = parts(split, implementation)

    def some(shared: problem.Arrays, own: problem.Arrays) -> Any:
        return {name: every[name](shared, own) for name in names}

    compiled = problem.program(some, split, operands)
    return jax.tree.map(np.asarray, compiled(*operands)), compiled.as_text()


def compare(results: list[np.ndarray], expected: list[np.ndarray]) -> dict[str, Any]:
    """How far results are from those of one device; those that are integers must be the same."""
    pairs = list(zip(results, expected, strict=True))
    floats = [pair for pair in pairs if pair[0].dtype == np.float32]
    return {
        "same_bits": all(np.array_equal(a, b) for a, b in pairs),
        "same_ids": all(np.array_equal(a, b) for a, b in pairs if a.dtype == np.int32),
        "error": max(float(np.max(np.abs(a - b))) for a, b in floats),
        "spread": min(float(np.std(b)) for _, b in floats),
    }


def main(implementation: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    one = problem.Split()
    programs = PROGRAMS[implementation]
    every = tuple(dict.fromkeys(name for _, names in programs for name in names))
    ids = None
    if "selected" in every:
        ids = run(one, implementation, ("compressed",), draw(one))[0]["compressed"][1]
    expected, _ = run(one, implementation, every, draw(one, ids))
    found = []
    for mesh, names in programs:
        split = problem.Split(*mesh)
        results, text = run(split, implementation, names, draw(split, ids))
        parts_of = {
            name: compare(*map(jax.tree.leaves, (results[name], expected[name]))) for name in names
        }
        exchanged = [dataclasses.astuple(c) for c in collectives(text)]
        found.append({"split": mesh, "parts": parts_of, "collectives": exchanged})
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
