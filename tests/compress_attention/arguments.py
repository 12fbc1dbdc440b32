"""One small call, argument by argument, for tests that change one of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from compress_attention.problems import Geometry, build

from jax_nsa import nsa_compress_attention_infer

GEOMETRY = Geometry(lengths=(40, 7), hostile=False)  # 2 tokens, 4/2 heads, 5 pages of 16 rows
ARGUMENTS = build(GEOMETRY)
QUERY, KEY, VALUE = (ARGUMENTS[name] for name in ("query", "key", "value"))
TABLE = ARGUMENTS["block_table"]
TOKENS = build(dataclasses.replace(GEOMETRY, token_counts=(1, 2)))
BATCH = build(dataclasses.replace(GEOMETRY, layout="BSND", tokens=3, token_counts=(3, 1)))
ORIGINAL = [656, 128]  # the least original lengths that compress to 40 and 7
MASK = np.ones((1, 1), bool)


def call(**arguments: Any) -> tuple:
    return nsa_compress_attention_infer(**{"implementation": "reference"} | arguments)


def table_with(b: int, p: int, value: int) -> np.ndarray:
    table = TABLE.astype(np.int64)
    table[b, p] = value
    return table
