"""What the siblings' routes to CANN refuse and copy, on the stand-in for CANN."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import test_ascend_compress
import test_ascend_select
from ascend.calls import COMPRESS, SELECT_ATTENTION
from ascend.device_route import DeviceRoute
from compress.problems import build as build_compress
from select_attention.problems import build as build_select

from jax_nsa import nsa_compress_infer, nsa_select_attention_infer

pytest_plugins = ("ascend.fixtures",)

FLOAT32 = {"dtype": "float32"}
ROUTES = ("ascend", DeviceRoute.NAME)
REFUSED_SELECT = [
    *((route, FLOAT32, "bfloat16 and float16, got float32") for route in ROUTES),
    *((route, {"return_lse": True}, "no log-sum-exp") for route in ROUTES),
    (DeviceRoute.NAME, {"key_value_heads": 2}, "got key_value_head_num = 2"),
    (DeviceRoute.NAME, {"group": 32}, "at most 16 query heads, got 32"),
    (DeviceRoute.NAME, {"head_size": 128}, "heads of 192 and values of 128, got 128 and 128"),
    (DeviceRoute.NAME, {"page": 16}, "pages of 64 or 128 rows, got 16"),
]
REFUSED_COMPRESS = [
    *((route, FLOAT32, "bfloat16 and float16, got float32") for route in ROUTES),
    *((route, {"bias": True}, "has no bias") for route in ROUTES),
    *((route, {"weight_dtype": "float32"}, "weights of input's dtype") for route in ROUTES),
    *((route, {"window": (80, 16)}, "windows of at most 64 tokens, got 80") for route in ROUTES),
    *((route, {"heads": 65}, "at most 64 heads, got 65") for route in ROUTES),
    (DeviceRoute.NAME, {"page": 16}, "pages of 64 or 128 rows, got 16"),
    (DeviceRoute.NAME, {"head_sizes": (24,)}, "heads of a multiple of 16, got 24"),
]


@pytest.mark.parametrize(("implementation", "changes", "message"), REFUSED_SELECT)
def test_selected_attention_refuses(harness, standin, implementation, changes, message):
    arguments = build_select(replace(SELECT_ATTENTION, **changes))
    with pytest.raises(NotImplementedError, match=message):
        nsa_select_attention_infer(**arguments, implementation=implementation)


@pytest.mark.parametrize(("implementation", "changes", "message"), REFUSED_COMPRESS)
def test_compression_refuses(harness, standin, implementation, changes, message):
    arguments = build_compress(replace(COMPRESS, **changes))
    with pytest.raises(NotImplementedError, match=message):
        nsa_compress_infer(**arguments, implementation=implementation)


def test_more_positions_than_the_kernel_reads(standin):
    geometry = replace(SELECT_ATTENTION, lengths=(8300, 40), window=8193)
    with pytest.raises(Exception, match="at most 8192 positions for a row of query, and row 0"):
        nsa_select_attention_infer(**build_select(geometry), implementation="ascend")


def test_more_sequences_than_one_run_takes(standin):
    """3072 of the selected branch; a sequence for each row of query and key/value head."""
    geometry = replace(
        test_ascend_select.USUAL, lengths=(17,) * 1537, k=None, group=1, window=3,
        hostile=False,
    )  # fmt: skip
    before = standin.counter(test_ascend_select.LAUNCHES)
    contract = test_ascend_select.TestHostRoute()
    contract.check(geometry)
    assert standin.counter(test_ascend_select.LAUNCHES) == before + 2


def test_what_is_read_is_copied(standin):
    """In whole pages, of heads as large as the kernel takes, and nothing else."""
    geometry = replace(
        test_ascend_select.USUAL, lengths=(1000,), key_value_heads=2, k=3, block=64, window=200
    )
    arguments = build_select(geometry)
    arguments["topk_indices"] = np.array([[[1, -1, 15], [0, 5, 0]]], np.int32)
    before = standin.counter("bytes to device")
    nsa_select_attention_infer(**arguments, implementation="ascend")
    copied = standin.counter("bytes to device") - before
    # Of the first head 64 + 40 positions, of the second 192, of the window 200 for both.
    pages = 1 + 2 + 2 * 2
    pools = pages * 128 * (192 + 128) * 2
    assert pools <= copied <= pools + 8 * 1024


def test_the_windows_that_end_are_copied_and_no_cache(standin):
    geometry = replace(
        COMPRESS, **test_ascend_compress.HOST, head_sizes=(16,), lengths=(49, 47, 80)
    )
    arguments = build_compress(geometry)
    arguments["cache"] = np.zeros((5000, 2, 16), arguments["cache"].dtype)
    before = [standin.counter(f"bytes to {where}") for where in ("device", "host")]
    nsa_compress_infer(**arguments, implementation="ascend")
    after = [standin.counter(f"bytes to {where}") for where in ("device", "host")]
    windows, row = 2, 2 * 16 * 2
    to_device, to_host = np.subtract(after, before)
    assert windows * 64 * row <= to_device <= windows * 64 * row + 3 * 1024
    assert to_host == windows * row
