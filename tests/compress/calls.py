"""How the contract calls the operator, and holds what comes of it to the oracle."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from compress import oracle
from compress.problems import Geometry, build

from jax_nsa import nsa_compress_infer

FLOATS = ("input", "weight", "cache", "bias")
INTEGERS = ("slot_mapping", "block_table", "actual_seq_len", "actual_seq_qlen")
FORMS = ("eager, host values", "eager, arrays", "jit, host values", "jit, arrays")
# Half the distance between neighbours, relative: what one rounding does.
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
SUBNORMAL = {"bfloat16": 2.0**-134, "float16": 2.0**-25, "float32": 2.0**-150}
USUAL = Geometry()
PAIR = Geometry(head_sizes=(7, 4))
# Sequences 0, 2 and 3 complete a window; 1 does not.
COUNTED = replace(USUAL, lengths=(49, 47, 95, 32), token_counts=(3, 2, 16, 1))


def listed(value: Any) -> list[Any]:
    """The arrays of an argument that is one or a pair."""
    return list(value) if isinstance(value, tuple) else [value]


def bits(array: Any) -> np.ndarray:
    """An array's bits, so that NaN equals NaN."""
    array = np.asarray(array)
    return array.view(f"u{array.itemsize}")


def copies(compiled: Any, sizes: set[int]) -> list[str]:
    """The instructions of a compiled program that copy arrays of so many elements."""
    found = []
    for line in compiled.as_text().splitlines():
        copied = re.search(r"= \w+\[([\d,]*)\]\S* copy\(", line)
        if copied and math.prod(int(n) for n in copied[1].split(",") if n) in sizes:
            found.append(line)
    return found


class Calls:
    """Calls of one implementation."""

    implementation: str
    # Whether faulty run-time values fail the call unless told otherwise.
    fails_on_faults = False

    def call(self, arguments: dict[str, Any], form: str = "eager, arrays", **options: Any) -> Any:
        """Calls the operator with integers that are known beforehand or not."""
        traced = [n for n in FLOATS if n in arguments]
        if form.endswith("arrays"):
            traced += [n for n in INTEGERS if n in arguments]
        static = {n: v for n, v in arguments.items() if n not in traced}

        def run(arrays: dict[str, Any]) -> Any:
            return nsa_compress_infer(
                **static, **arrays, implementation=self.implementation, **options
            )

        run = jax.jit(run) if form.startswith("jit") else run
        arrays = {n: jax.tree.map(jnp.asarray, arguments[n]) for n in traced}
        return jax.block_until_ready(run(arrays))

    def check(self, geometry: Geometry, form: str = "eager, arrays", **changes: Any) -> Any:
        """Asserts that a legal call agrees with the oracle; returns its results."""
        arguments = build(geometry) | changes
        results = self.call(arguments, form)
        self.assert_agrees(results, arguments)
        return results

    def assert_agrees(
        self, results: Any, arguments: dict[str, Any], *, unwritten: tuple[int, ...] = ()
    ) -> int:
        """Asserts that each cache is as the oracle says, but for windows of some sequences.

        Returns:
            How many rows are written.
        """
        results = listed(results)
        slots = np.array(arguments["slot_mapping"], np.int64)
        slots[list(unwritten)] = -1
        arguments = {**arguments, "slot_mapping": slots}
        assert len(results) == len(listed(arguments["cache"]))
        for i, result in enumerate(results):
            own = {n: listed(v)[i] if n in FLOATS else v for n, v in arguments.items()}
            expected = oracle.compress(**own)
            before = own["cache"]
            assert result.dtype == before.dtype
            assert result.shape == before.shape
            shape = self._shape(own)
            rows = np.asarray(result).reshape(shape)
            untouched = [r for r in range(len(rows)) if r not in expected.rows]
            np.testing.assert_array_equal(
                bits(rows[untouched]), bits(before.reshape(shape)[untouched]), "other rows"
            )
            for row, truth in expected.rows.items():
                error = abs(rows[row].astype(np.float64) - truth)
                name = result.dtype.name
                # Float32 accumulates a sum to about this, and rounds it to the cache's dtype.
                legal = ROUNDING[name] * abs(truth) + 2.0**-21 * expected.sizes[row]
                np.testing.assert_array_less(error, legal + 2 * SUBNORMAL[name], f"row {row}")
        return len(expected.rows)

    @staticmethod
    def _shape(own: dict[str, Any]) -> tuple[int, int, int]:
        """Rows, heads and head size of a cache."""
        heads = own["weight"].shape[1]
        head_size = int(np.prod(own["input"].shape[2:])) // heads
        return own["cache"].size // (heads * head_size), heads, head_size
