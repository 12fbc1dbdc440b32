"""Compression into the cache: each implementation by the contract."""

import jax
import pytest
from compress.contract import CompressContract
from kernels import need_cpu


class TestReference(CompressContract):
    implementation = "reference"


@need_cpu("compress")
class TestCpu(CompressContract):
    implementation = "cpu"
    fails_on_faults = True


@pytest.mark.cuda
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU and jax[cuda]")
class TestCuda(CompressContract):
    implementation = "cuda"
