"""The selected and the window branch through both routes to CANN's operator, on the stand-in."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from ascend.device_route import DeviceRoute
from hypothesis import given
from hypothesis import strategies as st
from select_attention.calls import USUAL
from select_attention.contract import SelectAttentionContract
from select_attention.problems import build, geometries

pytest_plugins = ("ascend.fixtures",)

HOST = MappingProxyType({"dtype": "bfloat16"})
# What CANN's kernel takes where nothing is gathered for it.
DEVICE = HOST | {"key_value_heads": 1, "head_size": 192, "value_size": 128, "page": 64}
FLOAT16 = st.sampled_from(["bfloat16", "float16"])
LAUNCHES = "launches of aclnnNsaSelectedAttentionInfer"


class Contract(SelectAttentionContract):
    """The contract as far as CANN's kernel has what a test asks for."""

    changes = HOST

    def serves(self, arguments: dict[str, Any]) -> bool:
        """Whether the route takes such arguments, but for a log-sum-exp."""
        return arguments["query"].dtype != np.float32

    def apply(self, arguments: dict[str, Any], **options: Any) -> tuple:
        if not self.serves(arguments):
            pytest.skip(f"outside the domain of {self.implementation}")
        return super().apply(without_lse(arguments), **options)

    def assert_agrees(self, results: tuple, arguments: dict[str, Any]) -> None:
        super().assert_agrees(results, without_lse(arguments))

    @pytest.mark.parametrize("ids", [[-1, 0, 2], [0, -1, 2], [-1, -1, -1], [2, 2, 0], [3, 3, 3]])
    def test_ids(self, ids):
        arguments = build(self.usual(USUAL, lengths=(100, 100)))
        shape = arguments["topk_indices"].shape
        arguments["topk_indices"] = np.broadcast_to(np.array(ids, np.int32), shape)
        results = self.call(arguments)
        self.assert_agrees(results, arguments)
        assert np.all(np.asarray(results[0]) == 0) == (set(ids) == {-1})


def without_lse(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name != "return_lse"}


@pytest.mark.usefixtures("standin")
class TestHostRoute(Contract):
    """Under host JAX: what is read is gathered, so that all but float32 and lse is served."""

    implementation = "ascend"
    fails_on_faults = True

    @given(geometry=geometries(), dtype=FLOAT16)
    def test_any_legal_call(self, geometry, dtype):
        self.check(replace(geometry, dtype=dtype, return_lse=False))


@pytest.mark.usefixtures("standin", "harness")
class TestDeviceRoute(Contract):
    """Under an Ascend PJRT plugin: buffers on the device, faulty rows NaN."""

    implementation = DeviceRoute.NAME
    changes = DEVICE

    def serves(self, arguments):
        heads, groups = arguments["key_value_head_num"], arguments["head_num"]
        sizes = (
            arguments["query"].shape[-1] // (groups if arguments["layout"] == "BSH" else 1),
            arguments["value"].shape[-1] // (heads if arguments["value"].ndim == 3 else 1),
        )
        return (
            super().serves(arguments)
            and heads == 1
            and groups <= 16
            and sizes == (192, 128)
            and arguments["page_block_size"] in (64, 128)
        )

    @given(
        geometry=geometries(), dtype=FLOAT16, page=st.sampled_from([64, 128]),
        group=st.sampled_from([1, 2, 16]),
    )  # fmt: skip
    def test_any_legal_call(self, geometry, dtype, page, group):
        changes = DEVICE | {"dtype": dtype, "page": page, "group": group, "return_lse": False}
        self.check(replace(geometry, **changes))

    # Those that name two heads.

    def test_faults(self):
        arguments = build(self.usual(USUAL))
        truth = self.call(arguments)
        for name, index, value in [
            ("actual_seq_kvlen", 1, -1), ("actual_seq_kvlen", 1, 129), ("block_table", (1, 0), 99),
            ("block_table", (1, 0), -1), ("topk_indices", (1, 0, 1), -2),
            ("topk_indices", (1, 0, 2), 2), ("topk_indices", (1, 0, 2), 2**31 - 1),
        ]:  # fmt: skip
            changed = np.array(arguments[name])
            changed[index] = value
            results = self.call(arguments | {name: changed}, "jit, arrays")
            for result, right in zip(results, truth, strict=True):
                np.testing.assert_array_equal(result[0], right[0])
            assert any(np.all(np.isnan(np.asarray(result)[1])) for result in results)

    def test_no_sequences(self):
        arguments = build(self.usual(USUAL))
        for name in ("query", "topk_indices", "block_table", "actual_seq_kvlen"):
            arguments[name] = arguments[name][:0]
        attention, window = self.call(arguments)
        assert attention.shape == window.shape == (0, 2, 128)
