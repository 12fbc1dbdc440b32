"""The CUDA kernel: the contract on a GPU, and what is particular to it."""

from types import MappingProxyType

import pytest
from contract import CompressAttentionContract

pytestmark = pytest.mark.cuda


class TestCuda(CompressAttentionContract):
    implementation = "cuda"
    # The kernel rounds probabilities to the inputs' dtype before they meet the values, as CANN's
    # does: an error of up to the output's own rounding, once more.
    attention_tolerance = MappingProxyType({"bfloat16": 8e-3, "float16": 1.2e-3, "float32": 1e-5})
