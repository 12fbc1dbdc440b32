"""An experiment: compressed pools that stay on the NPU under host JAX, behind a handle.

A handle is an array `int32[2]`, the number of the cache and a version that grows with each write.
Rows are written by small copies; a call of CANN's kernel takes the handle in place of pools. Both
are custom calls without side effects, as a function of a handle that names a value would be. The
cache trusts every handle, or checks that its version is the latest and refuses it otherwise.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import pathlib
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from ascend.caller import BFLOAT16, INT32, TO_DEVICE, Caller, address
from ascend.standin import HERE, StandIn, compile_cc

HEADS, SIZE, PAGE, PAGES, BLOCKS = 2, 16, 16, 8, 1  # BLOCKS: chosen ones
WINDOW = 32, 16, 64  # compress_block_size, compress_stride, select_block_size
SCALE = 0.25

TARGET = "ascend_resident_experiment"
# Of call_back.cc.
FUNCTION = ctypes.CFUNCTYPE(
    None, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_char), ctypes.c_size_t
)

_numbers = itertools.count()


@functools.cache
def register() -> None:
    """Builds the custom call and registers it with JAX."""
    library = pathlib.Path(tempfile.mkdtemp()) / "call_back.so"
    compile_cc(library, [HERE / "call_back.cc"], "-shared")
    handler = jax.ffi.pycapsule(ctypes.CDLL(str(library)).call_back)
    jax.ffi.register_ffi_target(TARGET, handler, platform="cpu")


def view(pointer: int, of: tuple[tuple[int, ...], np.dtype]) -> np.ndarray:
    """An array of XLA's."""
    shape, dtype = of
    size = int(np.prod(shape)) * dtype.itemsize
    content = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))
    return content.view(dtype).reshape(shape)


class ResidentCache(Caller):
    """Pools of one key/value head on the NPU; `handle` is the first handle."""

    def __init__(self, standin: StandIn, *, checks: bool) -> None:
        register()
        super().__init__(standin)
        self.checks = checks
        self.number, self.version = next(_numbers), 0
        self.writes = 0  # that ran
        self.lock = threading.Lock()
        self.open = True
        self.functions: dict[Any, Any] = {}  # for as long as programs may call them
        pool = np.zeros((PAGES, PAGE, SIZE), ml_dtypes.bfloat16)
        self.pools = [self.copied_in(pool) for _ in range(2)]

    @property
    def handle(self) -> jax.Array:
        return jax.numpy.array([self.number, 0], np.int32)

    def close(self) -> None:
        self.open = False
        super().close()

    # The operations of a program.

    def write(self, handle: jax.Array, rows: jax.Array, at: jax.Array) -> jax.Array:
        """Writes rows: the next handle.

        Args:
            handle: int32[2].
            rows: bfloat16[n, 2, SIZE], of keys and of values.
            at: int32[n], which rows of the pools, numbered through.
        """
        (new,) = self.custom_call(
            self.write_now, [jax.ShapeDtypeStruct((2,), np.int32)], handle, rows, at
        )
        return new

    def attend(
        self, handle: jax.Array, query: jax.Array, block_table: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """What nsa_compress_attention_infer gives for the pools.

        Args:
            handle: int32[2].
            query: bfloat16[B, HEADS, SIZE].
            block_table: int32[B, P].
            lengths: int32[B].
        """
        results = [
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((len(query), 1, BLOCKS), np.int32),
        ]
        attention, indices = self.custom_call(
            self.attend_now, results, handle, query, block_table, lengths
        )
        return attention, indices

    def custom_call(
        self, function: Callable, results: Sequence[jax.ShapeDtypeStruct], *operands: jax.Array
    ) -> Sequence[jax.Array]:
        """Runs a function of this object's; equal calls have equal text."""
        shapes = tuple((a.shape, np.dtype(a.dtype)) for a in (*operands, *results))
        if (function.__name__, shapes) not in self.functions:

            def run(pointers: Any, message: Any, size: int) -> None:
                arrays = [view(pointers[i], of) for i, of in enumerate(shapes)]
                try:
                    outcomes = function(*arrays[: len(operands)])
                except ValueError as error:
                    text = str(error).encode()[: size - 1] + b"\0"
                    ctypes.memmove(message, text, len(text))
                    return
                for array, outcome in zip(arrays[len(operands) :], outcomes, strict=True):
                    array[...] = outcome

            self.functions[function.__name__, shapes] = FUNCTION(run)
        pointer = ctypes.cast(self.functions[function.__name__, shapes], ctypes.c_void_p)
        return jax.ffi.ffi_call(TARGET, results, vmap_method="sequential")(
            *operands, function=np.int64(pointer.value)
        )

    # What runs.

    def write_now(self, handle: Any, rows: Any, at: Any) -> tuple[np.ndarray]:
        with self.lock:
            version = self.checked(handle)
            rows = np.asarray(rows)
            pinned = self.malloc_pinned(rows.nbytes)
            pinned[:] = rows.view(np.uint8).ravel()
            size = rows[0, 0].nbytes
            source = itertools.count(pinned.ctypes.data, size)
            for row in np.asarray(at).tolist():
                for pool in self.pools:
                    target = ctypes.c_void_p(pool.value + row * size)
                    self.copy(target, ctypes.c_void_p(next(source)), size, TO_DEVICE)
            assert self.synchronize() == 0
            self.give_back(address(pinned))
            self.writes += 1
            self.version = version + 1
            return (np.array([self.number, self.version], np.int32),)

    def attend_now(self, handle: Any, *operands: Any) -> tuple[np.ndarray, np.ndarray]:
        with self.lock:
            self.checked(handle)
            kept = len(self.owned)
            query, table, lengths = map(np.asarray, operands)
            attention = np.empty_like(query)
            indices = np.empty((len(query), 1, BLOCKS), np.int32)
            pool = PAGES, PAGE, SIZE
            results = [self.malloc(attention.nbytes), self.malloc(indices.nbytes)]
            statuses = self.run(
                "aclnnNsaCompressAttentionInfer",
                self.tensor(query.shape, BFLOAT16, self.copied_in(query)),
                *(self.tensor(pool, BFLOAT16, pointer) for pointer in self.pools), None,
                self.tensor(table.shape, INT32, self.copied_in(table)),
                self.integers([1] * len(lengths)), self.integers(lengths.tolist()), None, None,
                HEADS, 1, WINDOW[2], BLOCKS, *WINDOW[:2], SCALE, b"TND", PAGE, 0,
                self.tensor(attention.shape, BFLOAT16, results[0]),
                self.tensor(indices.shape, INT32, results[1]),
            )  # fmt: skip
            assert statuses == [0, 0]
            self.copy_out(results[0], attention)
            self.copy_out(results[1], indices)
            for _, pointer in reversed(self.owned[kept:]):
                self.give_back(pointer)
            return attention, indices

    def checked(self, handle: Any) -> int:
        """The version that a handle names; an error where that is not served."""
        number, version = np.asarray(handle).tolist()
        if number != self.number or not self.open:
            raise ValueError(f"the handle is of cache {number}, which is not there")
        if self.checks and version != self.version:
            raise ValueError(
                f"the handle is of version {version}, and cache {number} is at {self.version}"
            )
        assert self.acl.aclrtSetDevice(0) == 0
        return version
