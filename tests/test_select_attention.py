"""Selected and window attention: each implementation by the contract, and the front doors."""

import pytest
from kernels import need_cpu
from select_attention.contract import SelectAttentionContract


class TestReference(SelectAttentionContract):
    implementation = "reference"


@need_cpu("select_attention")
class TestCpu(SelectAttentionContract):
    implementation = "cpu"
    fails_on_faults = True


@pytest.mark.cuda
class TestCuda(SelectAttentionContract):
    implementation = "cuda"
