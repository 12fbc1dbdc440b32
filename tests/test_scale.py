"""Scales at the ends of what is legal: as far as float32 carries, all is as the definition says."""

from __future__ import annotations

from dataclasses import replace

import compress_attention.problems as problems
import numpy as np
import pytest
import select_attention.problems as select_problems
from compress_attention.contract import CompressAttentionContract
from select_attention.contract import SelectAttentionContract

MOST, LEAST = 2.0**127, 2.0**-126
IMPLEMENTATIONS = ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def implement(contract, implementation):
    made = contract()
    made.implementation = implementation
    return made


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [LEAST, -LEAST])
class TestLeast:
    """Products are nearly as large as float32's greatest numbers; scores are small but not zero."""

    def test_compressed(self, implementation, scale):
        geometry = problems.Geometry(
            lengths=(150, 33), scale=scale, return_lse=True, hostile=False, k=8
        )
        self.check(CompressAttentionContract, problems, geometry, implementation)

    def test_selected(self, implementation, scale):
        geometry = select_problems.Geometry(scale=scale, return_lse=True, hostile=False)
        self.check(SelectAttentionContract, select_problems, geometry, implementation)

    def check(self, contract, module, geometry, implementation):
        arguments = module.build(geometry)
        for name in ("query", "key"):
            arguments[name] = arguments[name] * np.float32(2.0**60)
        made = implement(contract, implementation)
        made.assert_agrees(made.call(arguments), arguments)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [MOST, -MOST])
def test_one_position_takes_all(implementation, scale):
    """Differences that are no longer finite leave the greatest score, and no NaN."""
    geometry = replace(select_problems.Geometry(hostile=False, lengths=(40,)), scale=scale)
    arguments = select_problems.build(geometry)
    arguments["query"] = np.full_like(arguments["query"], 2.0**-5)  # scores of 2**126
    arguments["key"] = np.zeros_like(arguments["key"])
    table, page = arguments["block_table"][0], geometry.page
    arguments["key"][table[35 // page], 35 % page] = np.sign(scale)
    results = implement(SelectAttentionContract, implementation).call(arguments)
    for head in range(geometry.key_value_heads * geometry.group):
        h = head // geometry.group
        value = arguments["value"][table[35 // page], 35 % page]
        expected = value.reshape(geometry.key_value_heads, -1)[h]
        np.testing.assert_array_equal(results[1][0, head], expected)
