"""Compression into the cache through both routes to CANN's operator, on the stand-in for CANN."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from ascend.device_route import DeviceRoute
from compress.calls import COUNTED, USUAL, listed
from compress.contract import CompressContract
from compress.problems import CACHES, Geometry, build, geometries
from hypothesis import assume, given
from hypothesis import strategies as st

pytest_plugins = ("ascend.fixtures",)

FLOAT16 = st.sampled_from(["bfloat16", "float16"])
HOST = MappingProxyType({"dtype": "bfloat16", "bias": False})
DEVICE = HOST | {"page": 64}


class Contract(CompressContract):
    """The contract as far as CANN's kernel has what a test asks for."""

    def serves(self, arguments: dict[str, Any]) -> bool:
        """Whether the route takes such arguments."""
        weights = listed(arguments["weight"])
        return (
            "bias" not in arguments
            and all(
                array.dtype != np.float32 and weight.dtype == array.dtype
                for array, weight in zip(listed(arguments["input"]), weights, strict=True)
            )
            and arguments["compress_block_size"] <= 64
            and weights[0].shape[1] <= 64
        )

    def apply(self, arguments: dict[str, Any], **options: Any) -> Any:
        if not self.serves(arguments):
            pytest.skip(f"outside the domain of {self.implementation}")
        return super().apply(arguments, **options)


def not_here(reason: str) -> Any:
    """In place of a test of the contract."""

    @pytest.mark.skip(reason)
    def test(self: Contract) -> None:
        del self

    return test


@pytest.mark.usefixtures("standin")
class TestHostRoute(Contract):
    """Under host JAX: windows are gathered, so that pages and heads of any size are served."""

    implementation = "ascend"
    changes = HOST
    fails_on_faults = True

    @given(geometry=geometries(), dtype=FLOAT16)
    def test_any_legal_call(self, geometry, dtype):
        assume(geometry.window[0] <= 64)
        self.check(replace(geometry, dtype=dtype, weight_dtype=None, bias=False))


@pytest.mark.usefixtures("standin", "harness")
class TestDeviceRoute(Contract):
    """Under an Ascend PJRT plugin: buffers on the device."""

    implementation = DeviceRoute.NAME
    changes = DEVICE
    fails_on_faults = True

    def usual(self, geometry: Geometry, **changes: Any) -> Geometry:
        sizes = (32, 16)[-len(geometry.head_sizes) :]
        return super().usual(geometry, **{"head_sizes": sizes} | changes)

    def serves(self, arguments):
        heads = listed(arguments["weight"])[0].shape[1]
        return (
            super().serves(arguments)
            and arguments["page_block_size"] in (64, 128)
            and all(
                np.prod(array.shape[2:]) // heads % 16 == 0 for array in listed(arguments["input"])
            )
        )

    @given(
        geometry=geometries(), dtype=FLOAT16, page=st.sampled_from([64, 128]),
        sizes=st.lists(st.sampled_from([16, 48, 256]), min_size=1, max_size=2),
    )  # fmt: skip
    def test_any_legal_call(self, geometry, dtype, page, sizes):
        assume(geometry.window[0] <= 64)
        changes = {"dtype": dtype, "weight_dtype": None, "page": page, "head_sizes": tuple(sizes)}
        self.check(replace(geometry, **changes, bias=False))

    @pytest.mark.parametrize("cache", CACHES)
    @pytest.mark.parametrize("lengths", [(64, 47, 80), (32, 48, 144)])
    def test_pairs(self, cache, lengths):
        self.check(replace(Geometry(), **DEVICE, head_sizes=(32, 16), cache=cache, lengths=lengths))

    def test_faults(self):
        arguments = build(self.usual(COUNTED, head_sizes=(16, 32)))
        for name, index, value, message in [
            ("actual_seq_len", 2, -1, "actual_seq_len[2] must be in [0, 192]"),
            ("actual_seq_qlen", 2, 17, "actual_seq_qlen[2] must be in [0, 16]"),
            ("block_table", (2, 1), -1, "block_table[2, 1] must be in [0, 7)"),
            ("block_table", (2, 1), 7, "the pages of input, got 7"),
            ("slot_mapping", 2, 9, "slot_mapping[2] must be below 9, the rows of cache"),
        ]:
            faulty = {**arguments, name: arguments[name].copy()}
            faulty[name][index] = value
            self._check_fault(faulty, arguments, message, unwritten=(2,))

    def test_a_cache_without_rows(self):
        arguments = build(self.usual(USUAL, lengths=(32, 31), skipped=(0,)))
        arguments["cache"] = arguments["cache"][:0]
        assert self.call(arguments).shape == (0, 2, 16)

    test_pages_outside_the_window_are_not_needed = not_here("is about pages of 16 rows")
    test_scan_over_growing_sequences = not_here("is about pages of 16 rows")
    test_one_array_as_several = not_here("is about heads of 5")
    test_a_donated_cache_is_not_copied = not_here("the harness copies what it is given")
