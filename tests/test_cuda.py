"""The CUDA kernel: the contract on a GPU, and what is particular to it."""

from types import MappingProxyType

import pytest
from compress_attention.contract import CompressAttentionContract
from compress_attention.problems import Geometry
from interleaved.pools import Interleaved
from select_attention.contract import SelectAttentionContract

pytestmark = pytest.mark.cuda


class TestCuda(CompressAttentionContract):
    implementation = "cuda"
    # The kernel rounds probabilities to the inputs' dtype before they meet the values, as CANN's
    # does: an error of up to the output's own rounding, once more.
    attention_tolerance = MappingProxyType({"bfloat16": 8e-3, "float16": 1.2e-3, "float32": 1e-5})

    def test_longer_and_shorter_sequences_that_make_up_for_each_other(self):
        # As much work in all as if each were as long as the first; shares must not be cut so.
        self.check(Geometry(lengths=(1024, 512, 1536), page=128))


class TestInterleavedCompress(Interleaved, TestCuda):
    """The same calls with keys and values in one pool."""


class TestInterleavedSelect(Interleaved, SelectAttentionContract):
    """The selected branch with keys and values in one pool."""

    implementation = "cuda"
