"""Each limit of CANN's kernels is refused by its name, or served around; on the stand-in."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_ascend_select
from ascend.calls import COMPRESS, FUNCTIONS, SELECT_ATTENTION
from ascend.compressed import USUAL, call, check
from ascend.device_route import DeviceRoute
from compress.problems import build as build_compress
from compress_attention.problems import build
from interleaved.pools import interleaved
from select_attention.calls import USUAL as SELECT_USUAL
from select_attention.problems import build as build_select

from jax_nsa import nsa_compress_attention_infer, nsa_compress_infer, nsa_select_attention_infer
from jax_nsa.backends import ascend

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


@pytest.mark.parametrize("target", ["compress_attention", "select_attention"])
def test_handlers_refuse_interleaved_pools(monkeypatch, standin, implementation, target):
    """Themselves too: a program may come to them that no lowering of this process has checked."""
    operator, arguments = {
        "compress_attention": (nsa_compress_attention_infer, build(USUAL)),
        "select_attention": (
            nsa_select_attention_infer, build_select(replace(SELECT_ATTENTION, head_size=128)),
        ),
    }[target]  # fmt: skip
    arrays = jax.tree.map(
        lambda value: jnp.asarray(value) if isinstance(value, np.ndarray) else value,
        interleaved(arguments),
    )
    monkeypatch.setattr(ascend, "refuses", lambda call, platform: None)
    asked = standin.counter(f"{FUNCTIONS[target]}GetWorkspaceSize")
    message = 'keys and values in pools of their own, got kv_layout="interleaved"'
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(operator(**arrays, implementation=implementation))
    assert standin.counter(f"{FUNCTIONS[target]}GetWorkspaceSize") == asked


def test_more_positions_than_the_kernel_reads(standin):
    geometry = replace(SELECT_ATTENTION, lengths=(8300, 40), window=8193)
    with pytest.raises(Exception, match="at most 8192 positions for a row of query, and row 0"):
        nsa_select_attention_infer(**build_select(geometry), implementation="ascend")


def test_more_sequences_than_one_run_takes(standin):
    """3072 of the selected branch; a sequence for each row of query and key/value head."""
    geometry = replace(
        SELECT_USUAL, **test_ascend_select.HOST, lengths=(17,) * 1537, k=None, group=1, window=3,
        hostile=False,
    )  # fmt: skip
    before = standin.counter(test_ascend_select.LAUNCHES)
    contract = test_ascend_select.TestHostRoute()
    contract.check(geometry)
    assert standin.counter(test_ascend_select.LAUNCHES) == before + 2


def assert_refused(standin, arguments, implementation, *messages):
    """Asserts that a call fails with all messages before anything reaches the operator."""
    asked = standin.counter("aclnnNsaCompressAttentionInferGetWorkspaceSize")
    with pytest.raises((ValueError, NotImplementedError, jax.errors.JaxRuntimeError)) as failure:
        call(arguments, implementation)
    for message in messages:
        assert message in str(failure.value)
    assert standin.counter("aclnnNsaCompressAttentionInferGetWorkspaceSize") == asked


@pytest.mark.usefixtures("fresh")
class TestCompressAttention:
    """Refusals come before anything is launched."""

    def test_float32(self, standin, implementation):
        arguments = build(replace(USUAL, dtype="float32"))
        assert_refused(standin, arguments, implementation, "bfloat16 and float16, got float32")

    def test_log_sum_exp(self, standin, implementation):
        arguments = build(replace(USUAL, return_lse=True))
        assert_refused(standin, arguments, implementation, "return_lse")

    def test_length_zero(self, standin, implementation):
        arguments = build(USUAL)
        arguments["actual_cmp_seq_kvlen"][1] = 0
        assert_refused(
            standin, arguments, implementation,
            "actual_cmp_seq_kvlen[1] = 0", "1 to 8192 compressed positions",
        )  # fmt: skip

    def test_length_above_8192(self, standin, implementation):
        geometry = replace(
            USUAL, lengths=(8, 8193), page=128, window=(16, 16, 128), key_value_heads=1, group=1,
            head_size=1, value_size=1, k=1,
        )  # fmt: skip
        assert_refused(
            standin, build(geometry), implementation,
            "actual_cmp_seq_kvlen[1] = 8193", "1 to 8192 compressed positions",
        )  # fmt: skip

    def test_length_of_8192(self, implementation):
        geometry = replace(
            USUAL, lengths=(8192,), page=128, window=(16, 16, 128), key_value_heads=1, group=1,
            head_size=1, value_size=1, k=1,
        )  # fmt: skip
        check(build(geometry), implementation)

    def test_more_than_4096_blocks(self, standin, implementation):
        geometry = replace(
            USUAL, lengths=(4097,), page=128, window=(16, 16, 16), key_value_heads=1, group=1,
            head_size=1, value_size=1, k=1,
        )  # fmt: skip
        assert_refused(standin, build(geometry), implementation, "4097 select blocks", "4096")
        check(build(replace(geometry, lengths=(4096,))), implementation)

    def test_more_selected_than_the_smallest_has_blocks(self, standin, implementation):
        arguments = build(replace(USUAL, k=10))  # 33 positions make 9 blocks
        assert_refused(
            standin, arguments, implementation,
            "actual_cmp_seq_kvlen[1] = 33", "9 select blocks, fewer than select_block_count (10)",
        )  # fmt: skip

    def test_more_selected_than_any_has_blocks(self, standin, implementation):
        assert_refused(
            standin, build(replace(USUAL, k=1000)), implementation, "select_block_count = 1000"
        )

    @pytest.mark.parametrize("count", [0, 5])
    def test_token_counts(self, standin, implementation, count):
        arguments = build(replace(USUAL, token_counts=(2, count, 1)))
        assert_refused(
            standin, arguments, implementation,
            f"actual_seq_qlen[1] = {count}", "1 to 4 query tokens",
        )  # fmt: skip

    def test_five_batched_tokens(self, standin, implementation):
        arguments = build(replace(USUAL, layout="BSND", tokens=5))
        assert_refused(standin, arguments, implementation, "at most 4 query tokens", "got 5")

    def test_more_than_10000_sequences(self, standin, implementation):
        geometry = replace(
            USUAL, lengths=(1,) * 10_001, key_value_heads=1, group=1, head_size=1, value_size=1,
            k=1, shared_pages=True, hostile=False,
        )  # fmt: skip
        assert_refused(standin, build(geometry), implementation, "10000 sequences, got 10001")

    def test_pages_outside_the_pool(self, standin, implementation):
        arguments = build(USUAL)
        arguments["block_table"][2, 3] = 1000
        assert_refused(standin, arguments, implementation, "block_table[2, 3]", "got 1000")

    @pytest.mark.parametrize(
        ("length", "message"),
        [(0, "actual_cmp_seq_kvlen[1] = 0"), (8, "actual_cmp_seq_kvlen[1] = 8 with 3")],
    )
    def test_host_lengths_when_traced(self, length, message):
        """What the program's constants tell is refused when it is traced."""
        arguments = build(USUAL)
        arguments["actual_cmp_seq_kvlen"][1] = length
        query = jnp.asarray(arguments.pop("query"))
        with pytest.raises(NotImplementedError, match=re.escape(message)):
            jax.jit(
                lambda q: nsa_compress_attention_infer(q, **arguments, implementation="ascend")
            ).lower(query)

    def test_refusals_name_every_implementation(self):
        with pytest.raises(NotImplementedError, match='implementation="cuda"') as failure:
            call(build(replace(USUAL, dtype="float32")), ("cuda", "ascend"))
        assert 'implementation="ascend": CANN' in str(failure.value)
