"""Builds the stand-in for CANN and talks to it."""

from __future__ import annotations

import concurrent.futures
import ctypes
import pathlib
import shutil
import subprocess
from collections.abc import Sequence

import jax.ffi
import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
CC = ROOT / "cc"
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror")
INCLUDES = (f"-I{CC}", f"-I{HERE}", "-isystem", jax.ffi.include_dir())
LIBRARIES = ("libascendcl.so", "libnnopbase.so", "libopapi.so")
OPERATORS = ("compress", "compress_attention", "select_attention")


def compiler() -> str:
    """The C++ compiler; skips the test without one."""
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("needs a C++ compiler (g++ or clang++) to build the stand-in for CANN")
    return found


def compile_cc(output: pathlib.Path, sources: Sequence[pathlib.Path], *options: str) -> None:
    """Compiles and links; fails the test with what the compiler says."""
    command = [compiler(), *FLAGS, *INCLUDES, *map(str, sources), *options, "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"


def build(directory: pathlib.Path, *options: str) -> None:
    """Builds the stand-in's three libraries into `directory`."""
    _build_library(directory, "libascendcl.so", ("ascendcl",), *options)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        tensors = pool.submit(_build_library, directory, "libnnopbase.so", ("nnopbase",), *options)
        operators = pool.submit(build_operators, directory, "libopapi.so", OPERATORS, *options)
        tensors.result()
        operators.result()


def build_operators(
    directory: pathlib.Path, name: str, operators: Sequence[str], *options: str
) -> None:
    """Builds a library of some operators; the stand-in's runtime must be in `directory`."""
    _build_library(directory, name, ("operators", *operators), *options)


def _build_library(
    directory: pathlib.Path, name: str, sources: Sequence[str], *options: str
) -> None:
    shared = [] if name == "libascendcl.so" else [f"-L{directory}", "-lascendcl"]
    compile_cc(
        directory / name, [HERE / f"{source}.cc" for source in sources], "-shared",
        f"-Wl,-soname,{name}",
        "-Wl,-rpath,$ORIGIN", f'-DSTANDIN_LIBRARY="{name}"', *options, *shared,
    )  # fmt: skip


class StandIn:
    """The stand-in in this process: its counters, planned faults and record of violations."""

    loaded = False  # whether this process has one, which is then its CANN for good

    def __init__(self, directory: pathlib.Path) -> None:
        StandIn.loaded = True
        self.directory = directory
        self.runtime, self.tensors, self.operators = (
            ctypes.CDLL(str(directory / name)) for name in LIBRARIES
        )
        self.runtime.standin_counter.restype = ctypes.c_int64
        self.runtime.standin_take_violations.restype = ctypes.c_char_p
        self.runtime.aclGetRecentErrMsg.restype = ctypes.c_char_p

    def counter(self, name: str) -> int:
        """Calls of a function so far, or another of the counters."""
        return self.runtime.standin_counter(name.encode())

    def plan_fault(self, function: str, status: int, *, call: int = 1, null: bool = False) -> None:
        """Makes the `call`-th call from now of a function ("": of any) fail, or give null."""
        self.runtime.standin_plan_fault(function.encode(), ctypes.c_int64(call), status, null)

    def clear_faults(self) -> int:
        """Forgets the planned faults; how many had not come up."""
        return self.runtime.standin_clear_faults()

    def take_violations(self, *, expected: bool = False) -> str:
        """The violations so far, which it forgets."""
        return self.runtime.standin_take_violations(expected).decode()

    def live(self) -> dict[str, int]:
        """How many objects and allocations of each kind there are.

        Without executors: CANN has no way to give back one that was never launched.
        """
        kinds = "device memory", "pinned memory", "stream", "tensor", "integer array"
        return {kind: self.counter(f"live {kind}") for kind in kinds}
