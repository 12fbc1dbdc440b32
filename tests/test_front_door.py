"""Every rule for values that are known at the call, and what it says when broken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention.arguments import (
    ARGUMENTS,
    BATCH,
    KEY,
    MASK,
    QUERY,
    TABLE,
    TOKENS,
    VALUE,
    call,
    table_with,
)
from compress_attention.calls import INTEGERS
from domain import DTYPES

from jax_nsa import nsa_compress_attention_infer

INTEGER_ARGUMENTS = [
    "head_num",
    "key_value_head_num",
    "select_block_size",
    "select_block_count",
    "page_block_size",
    "compress_block_size",
    "compress_stride",
]

REFUSED = [
    # Arrays.
    *[
        (changes, TypeError, message)
        for name, array in (("query", QUERY), ("key", KEY), ("value", VALUE))
        for changes, message in [
            ({name: array.tolist()}, f"{name} must be a JAX or NumPy array, got list"),
            ({name: None}, f"{name} must be a JAX or NumPy array.*, got NoneType"),
            ({name: np.ma.masked_array(array)}, f"{name} must be .* got MaskedArray"),
            ({name: array.astype(np.float64)}, f"{name} must have dtype .*, got float64"),
            ({name: array.astype(np.int32)}, f"{name} must have dtype .*, got int32"),
            ({name: array.astype(">f4")}, f"{name} must have dtype .*, got >f4"),
        ]
    ],
    (
        {"key": KEY.astype(np.float16)},
        TypeError,
        "query and key must have the same dtype, got float32 and float16",
    ),
    (
        {"value": VALUE.astype(DTYPES["bfloat16"])},
        TypeError,
        "query and value .* and bfloat16",
    ),
    *[
        (changes, ValueError, message)
        for name, array in (("query", QUERY), ("key", KEY), ("value", VALUE))
        for changes, message in [
            ({name: array[0]}, rf"{name} must have shape \[.*\], got \(\d+, \d+\)"),
            ({name: array[None, None]}, rf"{name} must have shape \[.*\], got \(1, 1, "),
            ({name: array[:, :0]}, rf"{name} must not be empty, got shape \(\d+, 0, "),
            ({name: array[..., :0]}, rf"{name} must not be empty, got shape \(.*, 0\)"),
        ]
    ],
    ({"key": KEY[..., :-1]}, ValueError, r"key's last axis must be .* 2 \* 16 = 32, got 31"),
    ({"value": VALUE[..., :-1]}, ValueError, r"value's last axis must be .* \(2\), got 15"),
    ({"key": KEY[1:]}, ValueError, "key and value must have as many pages, got 4 and 5"),
    ({"key": KEY[:0]}, ValueError, r"key must not be empty, got shape \(0, "),
    ({"value": VALUE[:0]}, ValueError, r"value must not be empty, got shape \(0, "),
    ({"key": KEY[:, :, None]}, ValueError, r"key's third axis must be its 2 heads"),
    ({"query": QUERY[1:]}, ValueError, r"query must have one row .* \(1, 4, 16\) and \(2, 4\)"),
    ({"key": KEY[:, :8]}, ValueError, r"key's second axis must be page_block_size \(16\)"),
    ({"value": VALUE[:, :8]}, ValueError, r"value's second axis must be page_block_size \(16\)"),
    # Sizes.
    (
        {"query": np.zeros((2, 4, 193), np.float32), "key": np.zeros((5, 16, 386), np.float32)},
        ValueError,
        "query's head size must be at most 192, got 193",
    ),
    (
        {"value": np.zeros((5, 16, 34), np.float32)},
        ValueError,
        r"value's head size must be at most 128 and at most query's \(16\), got 17",
    ),
    (
        {
            "query": np.zeros((2, 4, 192), np.float32),
            "key": np.zeros((5, 16, 384), np.float32),
            "value": np.zeros((5, 16, 258), np.float32),
        },
        ValueError,
        "value's head size must be at most 128 .* got 129",
    ),
    *[
        ({name: value}, TypeError, f"{name} must be a Python integer, got .*")
        for name in INTEGER_ARGUMENTS
        for value in (True, np.True_, 4.0, np.float32(4), "4", None, np.array([4]), 1j)
    ],
    *[
        ({name: value}, ValueError, rf"{name} must be in \[1, 2147483647\], got {value}")
        for name in ("head_num", "key_value_head_num", "select_block_count")
        for value in (0, -1, 2**31, 2**70)
    ],
    ({"head_num": 8}, ValueError, "head_num must equal the heads of query, 4 .* got 8"),
    ({"key_value_head_num": 3}, ValueError, r"head_num must be a multiple .* \(3\), got 4"),
    ({"key_value_head_num": 1}, ValueError, r"key's last axis .* 1 \* 16 = 16, got 32"),
    (
        {"query": np.zeros((2, 6, 16), np.float32), "head_num": 6},
        ValueError,
        "head_num / key_value_head_num must divide 128, got 6 / 2 = 3",
    ),
    (
        {"query": np.zeros((2, 512, 16), np.float32), "head_num": 512},
        ValueError,
        "head_num / key_value_head_num must divide 128, got 512 / 2 = 256",
    ),
    *[
        ({"page_block_size": n}, ValueError, f"page_block_size must be a multiple of 16 .* {n}")
        for n in (-16, 0, 8, 24, 272)
    ],
    ({"page_block_size": 32}, ValueError, r"key's second axis must be page_block_size \(32\)"),
    # Windows.
    *[
        ({name: n}, ValueError, rf"{name} must be a multiple of 16 in \[16, 128\], got {n}")
        for name in ("compress_block_size", "select_block_size")
        for n in (-16, 0, 8, 40, 144)
    ],
    *[
        ({"compress_stride": n}, ValueError, rf"compress_stride .* \(16, 32, 48, 64\), got {n}")
        for n in (-16, 0, 8, 80, 128)
    ],
    (
        {"compress_block_size": 16, "compress_stride": 32},
        ValueError,
        r"compress_block_size must be at least compress_stride \(32\), got 16",
    ),
    (
        {"compress_block_size": 64, "select_block_size": 48},
        ValueError,
        r"select_block_size must be at least compress_block_size \(64\), got 48",
    ),
    (
        {"compress_stride": 32, "select_block_size": 80},
        ValueError,
        r"select_block_size must be a multiple of compress_stride \(32\), got 80",
    ),
    # Scale and options.
    *[
        ({"scale_value": value}, TypeError, "scale_value must be a real number, got .*")
        for value in (True, np.True_, "1", b"1", None, [1.0], np.ones(1), 1j, np.complex64(1))
    ],
    *[
        ({"scale_value": value}, ValueError, "scale_value must be finite in float32, got .*")
        for value in (np.nan, np.inf, -np.inf, 1e39, np.float32(np.inf), 10**400)
    ],
    *[
        ({"scale_value": value}, ValueError, r"scale_value must be at most 2\*\*127 .*, got .*")
        for value in (1.71e38, -(2.0**127.5), np.float32(3.4e38))
    ],
    *[
        ({"layout": value}, ValueError, r"layout must be one of \('TND', 'BSND'\), got .*")
        for value in ("tnd", "BNSD", "", None, b"TND", ["TND"], np.array(["TND"]))
    ],
    *[
        ({"return_lse": value}, TypeError, "return_lse must be a bool, got .*")
        for value in (1, 0, None, "no", [True])
    ],
    *[
        ({"topk_mask": value}, NotImplementedError, "topk_mask is not supported")
        for value in (MASK, False)
    ],
    # Implementations.
    *[
        ({"implementation": value}, ValueError, r"implementation must name some of \['ascend'")
        for value in ("", "CPU", "torch", (), [], ["reference", "torch"], [None], b"cpu", [["cpu"]])
    ],
    *[
        ({"implementation": value}, TypeError, "implementation must be a name or a sequence")
        for value in (5, True, {"cpu"})
    ],
    # Integers for each sequence.
    *[
        (changes, error, message)
        for name in ("actual_cmp_seq_kvlen", "actual_seq_qlen", "actual_sel_seq_kvlen")
        for changes, error, message in [
            ({name: 40}, ValueError, rf"{name} must have rank 1, got shape \(\): 40"),
            ({name: [[40, 7]]}, ValueError, rf"{name} must have rank 1, got shape \(1, 2\)"),
            ({name: [40]}, ValueError, rf"{name} must have an entry for .* 2 .* shape \(1,\)"),
            ({name: []}, ValueError, rf"{name} must have an entry for .* 2 .* shape \(0,\)"),
            ({name: "40"}, TypeError, rf"{name} must hold integers, got dtype str.*'40'"),
            ({name: [40.0, 7.0]}, TypeError, rf"{name} must hold integers, got .*\[40.0, 7.0\]"),
            ({name: [True, False]}, TypeError, f"{name} must hold integers, got dtype bool"),
            ({name: np.ones(2, "m8[s]")}, TypeError, f"{name} must hold integers, .*timedelta64"),
            ({name: jnp.ones(2)}, TypeError, f"{name} must hold integers, got dtype float32"),
            ({name: [40, None]}, TypeError, f"{name} must hold integers, got .*None"),
            ({name: [40, [7]]}, TypeError, f"{name} must be an array or nested lists"),
            ({name: np.ma.masked_array([40, 7])}, TypeError, f"{name} must not be a masked"),
            ({name: [40, 2**70]}, TypeError, rf"{name} must hold integers, .* {2**70}"),
        ]
    ],
    ({"actual_cmp_seq_kvlen": None}, ValueError, "actual_cmp_seq_kvlen is required, got None"),
    *[
        (
            {"actual_cmp_seq_kvlen": make([40, n])},
            ValueError,
            rf"actual_cmp_seq_kvlen\[1\] must be in \[0, 64\] .*, got {n}",
        )
        for n in (-1, 65, 2**31, -(2**40))
        for make in (list, tuple, np.array)
    ],
    ({"block_table": None}, ValueError, "block_table is required, got None"),
    ({"block_table": []}, ValueError, r"block_table must have rank 2, got shape \(0,\)"),
    ({"block_table": [[]]}, ValueError, r"block_table must not be empty, got shape \(1, 0\)"),
    ({"block_table": TABLE[0]}, ValueError, r"block_table must have rank 2, got shape \(4,\)"),
    ({"block_table": [[0, 1], [2]]}, TypeError, r"block_table must be .*, got \[\[0, 1\], \[2\]\]"),
    ({"block_table": TABLE.astype(float)}, TypeError, "block_table must hold integers, .*float64"),
    ({"block_table": TABLE[:1]}, ValueError, r"must have an entry for .* 1 rows of block_table"),
    ({"block_table": TABLE[:, :2]}, ValueError, r"kvlen\[0\] must be in \[0, 32\] .*, got 40"),
    *[
        (
            {"block_table": table_with(b, p, value)},
            ValueError,
            rf"block_table\[{b}, {p}\] must be in \[0, 5\), .*, got {value}",
        )
        for b, p in ((0, 0), (0, 2), (1, 0))
        for value in (-1, 5, 2**40, -(2**40))
    ],
    # Tokens.
    *[
        (TOKENS | {"actual_seq_qlen": counts}, ValueError, message)
        for counts, message in [
            ([1, 1], r"actual_seq_qlen must sum to query's tokens \(3\), got a sum of 2"),
            ([2, 2], r"actual_seq_qlen must sum to query's tokens \(3\), got a sum of 4"),
            ([4, -1], r"actual_seq_qlen\[1\] must be at least 0, got -1"),
            ([2**40, 1], r"actual_seq_qlen must sum to query's tokens \(3\)"),
            (None, r"query must have one row .* unless actual_seq_qlen is given"),
        ]
    ],
    *[
        (BATCH | {"actual_seq_qlen": counts}, ValueError, message)
        for counts, message in [
            ([3, 4], r"actual_seq_qlen\[1\] must be in \[0, 3\], got 4"),
            ([-1, 3], r"actual_seq_qlen\[0\] must be in \[0, 3\], got -1"),
        ]
    ],
    (BATCH | {"query": QUERY}, ValueError, r"query must have shape \[B, S, heads, head_size\]"),
    (
        BATCH | {"query": BATCH["query"][:1]},
        ValueError,
        r"block_table must have a row for each sequence of query, got shapes \(2, 4\) and \(1, ",
    ),
    # Original lengths.
    ({"atten_mask": MASK}, ValueError, "actual_sel_seq_kvlen is required with atten_mask"),
    *[
        (
            {"atten_mask": mask, "actual_sel_seq_kvlen": lengths},
            ValueError,
            rf"actual_sel_seq_kvlen\[{b}\] must be in {legal}, .*, got {lengths[b]}",
        )
        for mask in (MASK, None)
        for b, lengths, legal in [
            (0, [655, 128], r"\[656, 671\]"),
            (0, [672, 128], r"\[656, 671\]"),
            (1, [656, 144], r"\[128, 143\]"),
            (1, [656, -1], r"\[128, 143\]"),
        ]
    ],
    *[
        (
            {
                "atten_mask": MASK,
                "actual_cmp_seq_kvlen": [40, 0],
                "actual_sel_seq_kvlen": [656, length],
            },
            ValueError,
            rf"actual_sel_seq_kvlen\[1\] must be in \[0, 31\], .*, got {length}",
        )
        for length in (-1, 32)
    ],
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED)
def test_refuses(changes, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        call(**ARGUMENTS | changes)


def traceable(array):
    """Whether JAX takes a host array as it is: not in twice its precision, or in bytes reversed."""
    return (
        type(array) is np.ndarray
        and array.dtype.isnative
        and jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
    )


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED)
def test_refuses_under_jit(changes, error, message):
    """The same rules while tracing, where arrays that JAX can have are shapes without values."""
    arguments = ARGUMENTS | changes
    arrays = {n: arguments.pop(n) for n in ("query", "key", "value") if traceable(arguments[n])}
    with pytest.raises(error, match=f"(?s){message}"):
        jax.jit(lambda arrays: call(**arguments, **arrays))(arrays)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: {"scale_value": x}, "scale_value must be known when the call is traced"),
        (lambda x: {"head_num": x}, "head_num must be a Python integer"),
        (lambda x: {"select_block_count": x}, "select_block_count must be a Python integer"),
        (lambda x: {"return_lse": x}, "return_lse must be a bool"),
        (lambda x: {"actual_cmp_seq_kvlen": [40, x]}, "lists cannot hold traced values .*stack"),
        (lambda x: {"block_table": [[x, 1, 2, 3]] * 2}, "lists cannot hold traced values .*stack"),
    ],
    ids=lambda value: "call" if callable(value) else None,
)
def test_refuses_traced_values(make, message):
    with pytest.raises(TypeError, match=message):
        jax.jit(lambda x: call(**ARGUMENTS | make(x)))(7)


def test_signature_is_torch_npu_s():
    """Positional calls ported from torch_npu mean the same."""
    names = [
        "query", "key", "value", "scale_value", "head_num", "key_value_head_num",
        "select_block_size", "select_block_count", "page_block_size", "compress_block_size",
        "compress_stride", "atten_mask", "block_table", "topk_mask", "actual_seq_qlen",
        "actual_cmp_seq_kvlen",
    ]  # fmt: skip
    by_position = [ARGUMENTS.get(name) for name in names]
    got = nsa_compress_attention_infer(*by_position, implementation="reference")
    for one, other in zip(got, call(**ARGUMENTS), strict=True):
        np.testing.assert_array_equal(one, other)


def test_integers_on_a_device_are_not_fetched():
    """A program is traced from their shapes and dtypes alone: here there is nothing to fetch."""
    integers = {n: jnp.array(TOKENS[n]) for n in INTEGERS if n in TOKENS}
    for array in integers.values():
        array.delete()
    attention, indices = jax.eval_shape(lambda: call(**TOKENS | integers))
    assert attention.shape == (3, 4, 8)
    assert indices.shape == (3, 2, 4)
