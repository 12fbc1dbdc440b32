"""Integers in host memory may have any dtype: narrow and unsigned ones say what int32 says."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention.examples import FAILURES

from jax_nsa import (
    nsa_compress_attention_infer,
    nsa_compress_infer,
    nsa_select_attention_infer,
    nsa_window_attention_infer,
)

HEADS = {"scale_value": 0.25, "head_num": 4, "key_value_head_num": 2, "page_block_size": 16}
# The second sequence needs one page; its other entries name none.
TABLE = np.array([[4, 0, 3, 127], [2, 127, 126, 125]], np.int32)
LENGTHS = np.array([40, 7], np.int32)


def pools():
    random = np.random.default_rng(0)
    return {
        name: random.normal(size=(6, 16, 2 * 16)).astype(np.float32) for name in ("key", "value")
    }


def query(*rows):
    return np.random.default_rng(1).normal(size=(*rows, 4, 16)).astype(np.float32)


def compressed():
    return nsa_compress_attention_infer, pools() | HEADS | {
        "query": query(2, 3), "layout": "BSND", "select_block_size": 64, "select_block_count": 3,
        "compress_block_size": 32, "compress_stride": 16, "block_table": TABLE,
        "actual_cmp_seq_kvlen": LENGTHS, "actual_seq_qlen": np.array([3, 2], np.int32),
    }  # fmt: skip


def selected():
    return nsa_select_attention_infer, pools() | HEADS | {
        "query": query(3), "layout": "TND", "select_block_size": 128, "select_block_count": 2,
        "topk_indices": np.array([[[0, -1]] * 2] * 3, np.int8), "block_table": TABLE,
        "actual_seq_kvlen": LENGTHS, "actual_seq_qlen": np.array([2, 1], np.int32),
    }  # fmt: skip


def window(size, table=TABLE):
    return nsa_window_attention_infer, pools() | HEADS | {
        "query": query(2), "layout": "TND", "window_size": size, "block_table": table,
        "actual_seq_kvlen": LENGTHS,
    }  # fmt: skip


def compress():
    random = np.random.default_rng(2)
    return nsa_compress_infer, {
        "input": pools()["key"], "weight": random.normal(size=(32, 2)).astype(np.float32),
        "cache": np.zeros((5, 2, 16), np.float32), "slot_mapping": np.array([4, 1], np.int32),
        "compress_block_size": 32, "compress_stride": 16, "page_block_size": 16,
        "block_table": TABLE, "actual_seq_len": np.array([48, 7], np.int32),
        "actual_seq_qlen": np.array([3, 16], np.int32),
    }  # fmt: skip


CALLS = {
    "compressed": compressed(), "selected": selected(), "compress": compress(),
    # Of its first sequence's pages it needs one, the third.
    "a short window": window(7, np.where(np.arange(4) < [[2], [0]], 99, TABLE)),
    "a long window": window(300),
}  # fmt: skip


def integers(arguments, dtype):
    """The integer arrays among the arguments, in another dtype."""
    return {
        n: a.astype(dtype) for n, a in arguments.items() if getattr(a, "dtype", None) == np.int32
    }


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("place", [np.asarray, jnp.asarray], ids=["host", "device"])
def test_say_the_same(name, dtype, place):
    operator, arguments = CALLS[name]
    expected = operator(**arguments)
    with jax.enable_x64(True):
        given = {n: place(a) for n, a in integers(arguments, dtype).items()}
        assert {a.dtype for a in given.values()} == {np.dtype(dtype)}
        found = operator(**arguments | given)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("name", CALLS)
def test_a_bad_page_is_found(name, dtype):
    operator, arguments = CALLS[name]
    given = integers(arguments, dtype)
    given["block_table"][0, 2] = 6
    # Where the host does not know all that decides which pages are read, the kernel finds it.
    with pytest.raises(FAILURES, match=r"block_table\[0, 2\] must be in \[0, 6\), .* got 6"):
        jax.block_until_ready(operator(**arguments | given))


@pytest.mark.parametrize("name", ["int8", "uint8", "int4"])
def test_a_bad_page_is_found_in_pools_of_more_than_the_type_has(name):
    pool = np.zeros((300, 16, 32), np.float32)
    table = np.zeros((1, 2)).astype(jnp.dtype(name))
    call = functools.partial(
        nsa_window_attention_infer, np.zeros((1, 2, 16), np.float32), pool, pool, 1.0, 2, 2, 5, 16,
        layout="TND", actual_seq_kvlen=[32],
    )  # fmt: skip
    assert not np.any(call(block_table=table))
    if name == "uint8":
        return
    table[0, 1] = -1
    with pytest.raises(ValueError, match=r"block_table\[0, 1\] must be in \[0, 300\), .* got -1"):
        call(block_table=table)


@pytest.mark.parametrize("page", [2**32 + 4, -(2**32) + 4])
@pytest.mark.parametrize("place", [np.asarray, jnp.asarray], ids=["host", "device"])
def test_pages_beyond_int32_do_not_wrap(page, place):
    operator, arguments = CALLS["a short window"]
    table = TABLE.astype(np.int64)
    table[0, 2] = page
    with jax.enable_x64(True):
        # What only the program knows of lengths says which pages are needed.
        given = {"block_table": place(table), "actual_seq_kvlen": jnp.asarray(LENGTHS)}
        with pytest.raises(FAILURES, match=r"block_table\[0, 2\] must be in"):
            jax.block_until_ready(operator(**arguments | given))
