"""How the contract calls the operator, and holds what comes of it to the oracle."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from compress import oracle
from compress.problems import Geometry, build, geometries
from contract import OperatorContract, bits
from hypothesis import strategies as st

from jax_nsa import nsa_compress_infer

FLOATS = ("input", "weight", "cache", "bias")
INTEGERS = ("slot_mapping", "block_table", "actual_seq_len", "actual_seq_qlen")
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


def copies(compiled: Any, sizes: set[int]) -> list[str]:
    """The instructions of a compiled program that copy arrays of so many elements."""
    found = []
    for line in compiled.as_text().splitlines():
        copied = re.search(r"= \w+\[([\d,]*)\]\S* copy\(", line)
        if copied and math.prod(int(n) for n in copied[1].split(",") if n) in sizes:
            found.append(line)
    return found


class Calls(OperatorContract):
    """Calls of one implementation."""

    FLOATS = FLOATS
    INTEGERS = INTEGERS
    EXAMPLES = {"one": USUAL, "pair": PAIR, "counted": COUNTED}  # noqa: RUF012
    build = staticmethod(build)

    @classmethod
    def geometries(cls) -> st.SearchStrategy[Geometry]:
        return geometries()

    @staticmethod
    def operator(arguments: dict[str, Any]) -> Callable[..., Any]:
        return nsa_compress_infer

    def apply(self, arguments: dict[str, Any], **options: Any) -> Any:
        """One cache, or two."""
        return nsa_compress_infer(**arguments, implementation=self.implementation, **options)

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
