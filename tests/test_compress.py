"""Compression into the cache: each implementation by the contract."""

import jax
import pytest
from compress.contract import CompressContract

from jax_nsa import native


class TestReference(CompressContract):
    implementation = "reference"


@pytest.mark.skipif(
    native.unavailable("cpu", "compress") is not None,
    reason=f"{native.unavailable('cpu', 'compress')}",
)
class TestCpu(CompressContract):
    implementation = "cpu"
    fails_on_faults = True


@pytest.mark.cuda
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU and jax[cuda]")
class TestCuda(CompressContract):
    implementation = "cuda"
