"""Selected and window attention: each implementation by the contract, and the front doors."""

import pytest
from select_attention.contract import SelectAttentionContract

from jax_nsa import native


class TestReference(SelectAttentionContract):
    implementation = "reference"


@pytest.mark.skipif(
    native.unavailable("cpu", "select_attention") is not None,
    reason=f"{native.unavailable('cpu', 'select_attention')}",
)
class TestCpu(SelectAttentionContract):
    implementation = "cpu"
    fails_on_faults = True


@pytest.mark.cuda
class TestCuda(SelectAttentionContract):
    implementation = "cuda"
