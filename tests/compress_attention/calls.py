"""How the contract calls the operator, and holds what comes of it to the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from compress_attention import oracle
from compress_attention.agreement import assert_agrees
from compress_attention.problems import Domain, Geometry, build, geometries
from contract import OperatorContract
from domain import ATTENTION_TOLERANCE
from hypothesis import strategies as st

from jax_nsa import nsa_compress_attention_infer

FLOATS = ("query", "key", "value")
INTEGERS = ("block_table", "actual_cmp_seq_kvlen", "actual_seq_qlen", "actual_sel_seq_kvlen")

# Blocks enough that most are a matter of choice, pages and heads enough to be mixed up.
USUAL = Geometry(lengths=(150, 33, 97), head_size=24, value_size=12, page=16, k=8, group=4)
SEVERAL_TOKENS = replace(USUAL, token_counts=(3, 1, 4))


class Calls(OperatorContract):
    """Calls of one implementation; a test file states its domain if that is not all legal calls."""

    FLOATS = FLOATS
    INTEGERS = INTEGERS
    EXAMPLES = {  # noqa: RUF012
        "one token": USUAL,
        "several": SEVERAL_TOKENS,
        "masked": replace(
            USUAL, layout="BSND", tokens=4, token_counts=(4, 3, 2), masked=True, slack=(1, 1, 3)
        ),
        "aligned": replace(USUAL, slack=(5, 0, 15), importance="aligned", return_lse=True),
    }
    domain = Domain()
    attention_tolerance = ATTENTION_TOLERANCE
    build = staticmethod(build)

    @classmethod
    def geometries(cls) -> st.SearchStrategy[Geometry]:
        return geometries(cls.domain)

    @staticmethod
    def operator(arguments: dict[str, Any]):
        return nsa_compress_attention_infer

    def assert_agrees(self, results: tuple, arguments: dict[str, Any], **options: Any) -> None:
        assert results[0].dtype == arguments["query"].dtype
        assert_agrees(
            results,
            oracle.compress_attention(**arguments),
            attention_tolerance=self.attention_tolerance[results[0].dtype.name],
            **options,
        )

    def require(self, geometry: Geometry) -> None:
        if not self.domain.contains(geometry):
            pytest.skip(f"outside the domain of {self.implementation}")

    def usual(self, geometry: Geometry = USUAL, **changes: Any) -> Geometry:
        """A geometry in the implementation's last dtype: float32 where it has that."""
        return replace(geometry, **{"dtype": self.domain.dtypes[-1]} | changes)

    def assert_blank(self, results: tuple, rows: Any = ...) -> None:
        """Asserts that rows are NaN and -1."""
        for result in (np.asarray(r)[rows] for r in results):
            blank = np.full_like(result, -1 if result.dtype == np.int32 else np.nan)
            np.testing.assert_array_equal(result, blank)
