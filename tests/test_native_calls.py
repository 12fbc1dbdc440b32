"""What the compiled library answers to callers that lie about a call's arrays and attributes."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_nsa  # noqa: F401  (which registers the kernel)

TARGET = "jax_nsa_compress_attention_cpu"

# The kernels trust what cc/ffi_call.cc and paged_call.cc let through, so they are called here
# without the front door.

ARRAYS = {
    "query": np.zeros((2, 3, 4, 8), np.float32),
    "key": np.zeros((5, 16, 2 * 8), np.float32),
    "value": np.zeros((5, 16, 2 * 6), np.float32),
    "block_table": np.zeros((2, 2), np.int32),
    "lengths": np.zeros(2, np.int32),
}
RESULTS = {
    "attention": jax.ShapeDtypeStruct((2, 3, 4, 6), np.float32),
    "topk_indices": jax.ShapeDtypeStruct((2, 3, 2, 1), np.int32),
    "lse": jax.ShapeDtypeStruct((2, 3, 4), np.float32),
    "block_scores": jax.ShapeDtypeStruct((2, 3, 4, 9), np.float32),
}
ATTRIBUTES = {
    "scale": np.float32(1.0),
    "key_value_heads": np.int64(2),
    "compress_block_size": np.int64(32),
    "compress_stride": np.int64(16),
    "select_block_size": np.int64(64),
    "aligned": np.int64(0),
    "init_blocks": np.int64(1),
    "local_blocks": np.int64(2),
    "causal": np.int64(0),
    "interleaved": np.int64(0),
}
# Operands that a good call may have too.
FURTHER = ("select_lengths", "first_rows", "surprise")
TOKENS = {"token_counts": np.full(2, 3, np.int32), "early_counts": np.zeros(2, np.int32)}


def call_kernel(*, operands=None, results=None, **changes):
    """Calls the CPU kernel with some arrays and attributes other than the good ones.

    Args:
        operands: names of the operands, where they are not those of the arrays.
        results: likewise.
        **changes: arrays and attributes by name; None leaves one out.
    """
    arrays, outputs, attributes = (
        {name: value for name, value in (part | changes).items() if value is not None}
        for part in (ARRAYS | TOKENS, RESULTS, ATTRIBUTES)
    )
    known = {*ARRAYS, *TOKENS, *FURTHER}
    arrays = {name: arrays[name] for name in arrays if name in known}
    outputs = {name: outputs[name] for name in outputs if name in {*RESULTS, "more"}}
    attributes = {name: attributes[name] for name in attributes if name in ATTRIBUTES}
    call = jax.ffi.ffi_call(TARGET, list(outputs.values()))
    return jax.block_until_ready(
        call(
            *map(jnp.asarray, arrays.values()),
            operands=" ".join(arrays) if operands is None else operands,
            results=" ".join(outputs) if results is None else results,
            problem=attributes,
        )
    )


def f32(*shape):
    return np.zeros(shape, np.float32)


def i32(*shape):
    return np.zeros(shape, np.int32)


def result(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


HUGE = 2**63 - 1
LIES = {
    "query_rank": ({"query": f32(6, 4, 8)}, "query must have rank 4"),
    "query_dtype": ({"query": i32(2, 3, 4, 8)}, "query must be bfloat16"),
    "query_without_heads": ({"query": f32(2, 3, 0, 8)}, "query must not be empty"),
    "query_without_rows": ({"query": f32(2, 0, 4, 8)}, "query must not be empty"),
    "query_of_other_sequences": ({"query": f32(4, 3, 4, 8)}, "as many sequences"),
    "key_heads": ({"key": f32(5, 16, 3 * 8)}, "key must have shape [5, 16, 16], got [5, 16, 24]"),
    "key_dtype": ({"key": np.zeros((5, 16, 16), np.float16)}, "key has an unexpected element"),
    "page_of_8_rows": (
        {"key": f32(5, 8, 16), "value": f32(5, 8, 12)},
        "page size must be a multiple of 16 up to 256, got 8",
    ),
    "large_heads": (
        {"query": f32(2, 3, 4, 193), "key": f32(5, 16, 2 * 193)},
        "query's head size must be at most 192, got 193",
    ),
    "large_values": (
        {"value": f32(5, 16, 2 * 129), "attention": result(2, 3, 4, 129)},
        "value's head size must be at most 128, got 129",
    ),
    "large_group": (
        {"query": f32(2, 3, 258, 8), "attention": result(2, 3, 258, 6)},
        "heads for each of key's must divide 128, got 129",
    ),
    "group_of_3": (
        {
            "query": f32(2, 3, 6, 8),
            "attention": result(2, 3, 6, 6),
            "lse": result(2, 3, 6),
            "block_scores": result(2, 3, 6, 9),
        },
        "heads for each of key's must divide 128, got 3",
    ),
    "key_without_rows": ({"key": f32(5, 0, 16), "value": f32(5, 0, 12)}, "key must not be empty"),
    "key_without_pages": ({"key": f32(0, 16, 16), "value": f32(0, 16, 12)}, "key must not be"),
    "value_pages": ({"value": f32(4, 16, 12)}, "value must have shape [5, 16, 12]"),
    "value_page": ({"value": f32(5, 32, 12)}, "value must have shape [5, 16, 12]"),
    "value_heads": ({"value": f32(5, 16, 13)}, "value must have shape"),
    "value_less_than_heads": ({"value": f32(5, 16, 1)}, "value must have shape"),
    "table_without_pages": ({"block_table": i32(2, 0)}, "block_table must not be empty"),
    "table_dtype": ({"block_table": f32(2, 2)}, "block_table has an unexpected element"),
    "table_past_int32": (
        {
            "block_table": i32(2, 2**15),
            "key": f32(1, 2**16, 2 * 8),
            "value": f32(1, 2**16, 2 * 6),
        },
        "block_table names more positions",
    ),
    "lengths_shape": ({"lengths": i32(3)}, "lengths must have shape [2]"),
    "no_lengths": ({"lengths": None}, "needs lengths"),
    "no_query": ({"query": None}, "needs query"),
    "no_attention": ({"attention": None}, "needs attention"),
    "no_scale": ({"scale": None}, "needs the float scale"),
    "scale_of_another_type": ({"scale": np.int64(3)}, "needs the float scale"),
    "no_stride": ({"compress_stride": None}, "needs the integer compress_stride"),
    "packed_without_counts": (
        {
            "query": f32(6, 4, 8),
            "first_rows": i32(2),
            "token_counts": None,
            "attention": result(6, 4, 6),
            "topk_indices": result(6, 2, 1, dtype=np.int32),
            "lse": None,
            "block_scores": None,
        },
        "needs token_counts beside first_rows",
    ),
    "unknown_operand": ({"surprise": i32(2)}, 'does not know "surprise" among its operands'),
    "operand_twice": (
        {"operands": "query key value block_table lengths lengths token_counts"},
        'has "lengths" twice among its operands',
    ),
    "too_few_names": ({"operands": "query key value block_table lengths"}, "names 5 operands and"),
    "too_many_names": (
        {"operands": f"{' '.join(ARRAYS | TOKENS)} select_lengths"},
        "names 8 operands and has 7",
    ),
    "too_many_results": (
        {"more": result(1)},
        'does not know "more" among its results',
    ),
    "too_few_results": ({"results": "attention topk_indices"}, "names 2 results and has 4"),
    "too_many_names_of_results": (
        {"block_scores": None, "results": " ".join(RESULTS)},
        "names 4 results and has 3",
    ),
    "scores_without_lse": ({"lse": None}, "gives block_scores beside lse only"),
    "value_dtype": ({"value": np.zeros((5, 16, 12), np.float16)}, "value has an unexpected"),
    "page_of_272_rows": (
        {"key": f32(5, 272, 16), "value": f32(5, 272, 12)},
        "page size must be a multiple of 16 up to 256, got 272",
    ),
    "token_counts_shape": ({"token_counts": i32(3)}, "token_counts must have shape [2], got [3]"),
    "early_counts_dtype": ({"early_counts": f32(2)}, "early_counts has an unexpected element"),
    "first_rows_shape": ({"first_rows": i32(3)}, "query must have rank 3"),
    "aligned_without_lengths": ({"aligned": np.int64(1)}, "needs select_lengths where blocks"),
    "negative_init_blocks": ({"init_blocks": np.int64(-1)}, "must be at least 0"),
    "attention_shape": ({"attention": result(2, 3, 4, 7)}, "attention must have shape [2, 3, 4, 6"),
    "attention_dtype": (
        {"attention": result(2, 3, 4, 6, dtype=np.float16)},
        "attention has an unexpected element type",
    ),
    "indices_heads": (
        {"topk_indices": result(2, 3, 4, 1, dtype=np.int32)},
        "topk_indices must have shape [2, 3, 2, 1], got [2, 3, 4, 1]",
    ),
    "indices_of_no_block": (
        {"topk_indices": result(2, 3, 2, 0, dtype=np.int32)},
        "topk_indices must not be empty",
    ),
    "lse_shape": ({"lse": result(2, 4, 3)}, "lse must have shape [2, 3, 4], got [2, 4, 3]"),
    "lse_dtype": ({"lse": result(2, 3, 4, dtype=np.int32)}, "lse has an unexpected element type"),
    "block_scores_shape": (
        {"block_scores": result(2, 3, 4, 8)},
        "block_scores must have shape [2, 3, 4, 9], got [2, 3, 4, 8]",
    ),
    "no_heads": ({"key_value_heads": np.int64(0)}, "multiple of key_value_heads, got 4 and 0"),
    "negative_heads": (
        {"key_value_heads": np.int64(-2)},
        "multiple of key_value_heads, got 4 and -2",
    ),
    "too_many_heads": ({"key_value_heads": np.int64(HUGE)}, "multiple of key_value_heads"),
    "not_said_whether_interleaved": ({"interleaved": None}, "needs the integer interleaved"),
    "interleaved_without_values": (
        {"interleaved": np.int64(1), "value": f32(5, 16, 2 * 8)},
        "value's head size must be positive, got 0",
    ),
    "interleaved_in_other_pools": (
        {"interleaved": np.int64(1), "key": f32(5, 16, 2 * 14), "value": f32(5, 16, 2 * 13)},
        "key must have shape [5, 16, 26], got [5, 16, 28]",
    ),
    "stride_0": ({"compress_stride": np.int64(0)}, "sizes do not fit"),
    "stride_negative": ({"compress_stride": np.int64(-16)}, "sizes do not fit"),
    "compress_block_huge": (
        {"compress_block_size": np.int64(HUGE), "select_block_size": np.int64(HUGE)},
        "sizes do not fit",
    ),
    "select_less_than_compress": ({"select_block_size": np.int64(16)}, "sizes do not fit"),
    "select_not_of_strides": ({"select_block_size": np.int64(72)}, "sizes do not fit"),
}


@pytest.mark.parametrize(("changes", "message"), LIES.values(), ids=LIES)
def test_kernel_refuses_operands_that_do_not_fit(changes, message):
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        call_kernel(**changes)
    assert "INVALID_ARGUMENT" in str(caught.value)
    assert message in str(caught.value)


def test_kernel_takes_the_same_call_unchanged():
    attention, indices, lse, scores = call_kernel()
    np.testing.assert_array_equal(attention, 0)
    np.testing.assert_array_equal(indices, -1)
    np.testing.assert_array_equal(lse, -np.inf)
    np.testing.assert_array_equal(scores, 0)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-p", "no:cacheprovider"]))
