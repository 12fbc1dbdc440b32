"""The CPU kernel: the contract on each instruction set, and what is particular to it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import jax
import pytest
from contract import CompressAttentionContract

from jax_nsa import native
from jax_nsa.backends import cpu

ISAS = ("amx", "avx512", "avx2", "sse2", "neon")


class OnIsa:
    """Runs the tests of a class on one instruction set, if this machine has it."""

    isa: str

    @pytest.fixture(autouse=True, scope="class")
    def forced_isa(self) -> Iterator[None]:
        if self.isa not in native.module().cpu_kernels():
            pytest.skip(f"this machine has no {self.isa}")
        before = os.environ.get(cpu.ISA_VARIABLE)
        os.environ[cpu.ISA_VARIABLE] = self.isa
        jax.clear_caches()  # programs keep the instruction set that they were compiled with
        yield
        if before is None:
            del os.environ[cpu.ISA_VARIABLE]
        else:
            os.environ[cpu.ISA_VARIABLE] = before
        jax.clear_caches()


class CpuContract(OnIsa, CompressAttentionContract):
    implementation = "cpu"
    fails_on_faults = True


for _isa in ISAS:
    globals()[f"TestCpu{_isa.capitalize()}"] = type(
        f"TestCpu{_isa.capitalize()}", (CpuContract,), {"isa": _isa}
    )
