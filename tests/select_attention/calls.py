"""How the contract calls the operators, and holds what comes of them to the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from contract import OperatorContract
from domain import ATTENTION_TOLERANCE
from hypothesis import strategies as st
from select_attention import oracle
from select_attention.problems import Geometry, build, geometries

from jax_nsa import nsa_select_attention_infer, nsa_window_attention_infer

USUAL = Geometry()


class Calls(OperatorContract):
    """Calls of one implementation: of selected attention, or of the window alone."""

    FLOATS = ("query", "key", "value")
    INTEGERS = ("topk_indices", "block_table", "actual_seq_kvlen", "actual_seq_qlen")
    EXAMPLES = {  # noqa: RUF012
        "selected and window": replace(USUAL, return_lse=True),
        "selected": replace(USUAL, window=None, token_counts=(2, 1)),
        "window": replace(USUAL, k=None, layout="BSND", tokens=2, token_counts=(2, 1)),
    }
    build = staticmethod(build)

    @classmethod
    def geometries(cls) -> st.SearchStrategy[Geometry]:
        return geometries()

    @staticmethod
    def operator(arguments: dict[str, Any]) -> Callable[..., Any]:
        chosen = "topk_indices" in arguments
        return nsa_select_attention_infer if chosen else nsa_window_attention_infer

    def assert_agrees(self, results: tuple, arguments: dict[str, Any]) -> None:
        known = {"topk_indices": None, "select_block_size": 16} | arguments
        return_lse = known.pop("return_lse", False)
        known.pop("select_block_count", None)
        known.pop("atten_mask", None)
        truth = oracle.select_attention(**known)
        query = arguments["query"]
        tolerance = ATTENTION_TOLERANCE[query.dtype.name]
        wanted = [
            (name, size)
            for name, size in zip(("attention", "window_attention"), truth.sizes, strict=True)
            if getattr(truth, name) is not None
        ]
        assert len(results) == len(wanted) * (1 + return_lse)
        for result, (name, size) in zip(results, wanted, strict=False):
            expected = getattr(truth, name)
            assert result.dtype == query.dtype
            assert result.shape == expected.shape
            shape = (*size.shape, -1)
            error = np.asarray(result, np.float64).reshape(shape) - expected.reshape(shape)
            slack = tolerance * (size + np.linalg.norm(expected.reshape(shape), axis=-1))
            slack = slack + 1e-5 * truth.score_size * size + 1e-30
            np.testing.assert_array_less(np.linalg.norm(error, axis=-1), slack + 1e-12)
        if not return_lse:
            return
        for result, (name, _) in zip(results[len(wanted) :], wanted, strict=True):
            expected = truth.lse if name == "attention" else truth.window_lse
            assert result.dtype == np.float32
            np.testing.assert_allclose(
                result, expected, rtol=1e-5, atol=1e-5 * (1 + truth.score_size.max())
            )
