"""What the cache that grows refuses, and that it is unchanged then."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from caches import HEAD_SIZE, KEY_VALUE_HEADS, SIZES, VALUE_SIZE, empty, weights

from jax_nsa import PagePools, PageTables


def rows(slots=3, tokens=1, heads=KEY_VALUE_HEADS, size=HEAD_SIZE, dtype=np.float32):
    return np.zeros((slots, tokens, heads, size), dtype)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"key": rows(2)}, ValueError, r"key must have shape \[3, tokens, heads, size\]"),
        ({"key": rows(heads=4, size=4)}, ValueError, "heads of a pool of shape"),
        ({"key": rows()[:, 0]}, ValueError, "key must have shape"),
        ({"key": rows(tokens=0)}, ValueError, "key must have shape"),
        ({"key": rows(tokens=2)}, ValueError, "as many tokens, got 2 and 1"),
        ({"key": rows(dtype=np.float16)}, TypeError, "pools' key and key must have the same dtype"),
        ({"value": [1.0]}, TypeError, "value must be a JAX or NumPy array"),
        ({"weight": weights(16)}, ValueError, r"weight\[0\] must have shape"),
        ({"weight": weights(32)[0]}, TypeError, "weight must be a sequence of 2"),
        ({"slots": [0, 1, 3]}, ValueError, "slots must be different numbers below 3"),
        ({"slots": [0, 1, 1]}, ValueError, r"slots must be .* got \[0, 1, 1\]"),
        ({"slots": [0.5, 1, 2]}, TypeError, "slots must hold integers"),
        ({"slots": [0, 1]}, ValueError, r"key must have shape \[2, tokens"),
        ({"tables": None}, TypeError, "tables must be a PageTables, got NoneType"),
        ({"tables": empty(32, 16, pages=8)[0]}, ValueError, "key must have 8 pages of 16 rows"),
        ({"tables": empty(32, 16, page_block_size=32)[0]}, ValueError, "9 pages of 32 rows"),
        ({"implementation": "tpu"}, ValueError, "implementation"),
    ],
)
def test_append_refuses(changes, error, message):
    tables, pools = empty(32, 16)
    good = {
        "tables": tables, "key": rows(), "value": rows(size=VALUE_SIZE), "weight": weights(32),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        pools.append(**good | changes)


@pytest.mark.parametrize(
    ("method", "argument", "error", "message"),
    [
        ("allocate", [1, 2], ValueError, "counts must have an entry for each of 3 slots"),
        ("allocate", [1, -2, 0], ValueError, r"counts\[1\] must be at least 0, got -2"),
        ("allocate", [0.5, 1, 1], TypeError, "counts must hold integers"),
        ("allocate", None, ValueError, "counts is required"),
        ("truncate", [[1], [2], [3]], ValueError, "lengths must have rank 1"),
        ("truncate", [-1, 0, 0], ValueError, r"lengths\[0\] must be at least 0"),
        ("free", [0, 1, 2], TypeError, r"slots must hold bools, got \[0, 1, 2\]"),
        ("free", None, TypeError, "slots must hold bools, got None"),
        ("free", [[True], [True, False]], TypeError, "slots must hold bools, got"),
        ("free", [2**31, 0, 0], TypeError, "slots must hold bools, got"),
        ("free", [True], ValueError, r"slots must have shape \(3,\), got \(1,\)"),
    ],
)
def test_tables_refuse(method, argument, error, message):
    with pytest.raises(error, match=message):
        getattr(empty(32, 16)[0], method)(argument)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"slots": 0}, ValueError, r"slots must be in \[1, "),
        ({"pages": 2.0}, TypeError, "pages must be a Python integer"),
        ({"page_block_size": 24}, ValueError, "page_block_size must be a multiple of 16"),
        (
            {"pages_per_slot": 2**28},
            ValueError,
            "pages_per_slot \\* page_block_size must be at most",
        ),
        # Beyond it, rows would be dropped, and slots promised pages that there are not.
        ({"pages": 2**28}, ValueError, "pages \\* page_block_size must be at most"),
        ({"slots": 2**29}, ValueError, "slots \\* pages_per_slot must be at most"),
        ({"compress_stride": 24}, ValueError, "compress_stride must be one of"),
        ({"compress_block_size": 40}, ValueError, "compress_block_size must be a multiple of 16"),
    ],
)
def test_empty_tables_refuse(changes, error, message):
    with pytest.raises(error, match=message):
        PageTables.empty(**SIZES | {"compress_block_size": 32, "compress_stride": 16} | changes)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 8), ValueError, "key_value_head_num must be in"),
        ((2, 8, 4, "float64"), ValueError, "dtype must be one of"),
        ((2, 8.5), TypeError, "head_size must be a Python integer"),
        ((2, 193, 64), ValueError, "head_size must be at most 192, got 193"),
        ((2, 8, 4, "abc"), ValueError, "dtype must be one of .* got .*abc"),
        ((2, 8, 4, 1), ValueError, "dtype must be one of"),
    ],
)
def test_empty_pools_refuse(arguments, error, message):
    with pytest.raises(error, match=message):
        PagePools.empty(empty(32, 16)[0], *arguments)


def test_slots_to_free_may_be_traced_one_by_one():
    tables, _ = empty(32, 16)[0].allocate([3, 2, 1])
    free = jax.jit(lambda leaves, stays: tables.free([leaves, stays, leaves]).lengths)
    assert free(True, False).tolist() == [0, 2, 0]


def test_empty_pools_need_tables():
    with pytest.raises(TypeError, match="tables must be a PageTables, got NoneType"):
        PagePools.empty(None, 2, 8)
