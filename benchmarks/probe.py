"""What a host can do at best, by a small library of our own: see probe.cc.

It is compiled for this processor by the system's compiler (CXX, or c++) and against the FFI headers
of the jaxlib that runs, when a benchmark first asks for it.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import ctypes
import functools
import os
import pathlib
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np

SOURCE = pathlib.Path(__file__).with_name("probe.cc")
NOTHING = "jax_nsa_benchmarks_nothing"


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library; RuntimeError with the remedy where it cannot be had."""
    directory = tempfile.TemporaryDirectory()
    atexit.register(directory.cleanup)
    target = pathlib.Path(directory.name, "probe.so")
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [
        *compiler, "-std=c++17", "-O3", "-march=native", "-shared", "-fPIC",
        f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(target),
    ]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError(
            f"benchmarks on a CPU need a C++17 compiler, and {compiler[0]} is not there: install "
            "one, or name it by CXX"
        ) from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{error.stderr}") from error
    loaded = ctypes.CDLL(str(target))
    loaded.read_all.restype = ctypes.c_uint64
    loaded.read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    jax.ffi.register_ffi_target(NOTHING, jax.ffi.pycapsule(loaded.do_nothing), platform="cpu")
    return loaded


class HostBandwidth:
    """Bytes a second that all cores together read from memory, by plain vector loads."""

    THREAD_BYTES, PARTS = 256 << 20, 4

    def __init__(self) -> None:
        self._read = library().read_all
        threads = len(os.sched_getaffinity(0))
        self._pool = concurrent.futures.ThreadPoolExecutor(threads)
        # A thread's own memory, written once so that it is there.
        self._data = [np.ones(self.THREAD_BYTES, np.uint8) for _ in range(threads)]
        self._next = 0

    def sample(self) -> float:
        """Of reading one part after another, all together larger than any cache."""
        part = self.THREAD_BYTES // self.PARTS
        offset = self._next % self.PARTS * part
        self._next += 1
        start = time.perf_counter()
        reads = [
            self._pool.submit(self._read, data.ctypes.data + offset, part) for data in self._data
        ]
        for read in reads:
            read.result()
        return part * len(self._data) / (time.perf_counter() - start)


def empty_call(run: Callable) -> Callable:
    """A function of a benchmark's operands that passes them, and its results, to do nothing."""
    library()

    def nothing(*operands: jax.Array) -> list[jax.Array]:
        results = jax.tree.leaves(jax.eval_shape(run, *operands))
        return jax.ffi.ffi_call(NOTHING, results)(*operands)

    return nothing
