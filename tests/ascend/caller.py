"""Calls CANN's C interface as a program without JAX would."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

INT32, BFLOAT16 = 3, 27  # aclDataType
TO_DEVICE, TO_HOST = 1, 2  # aclrtMemcpyKind


class Cann(Protocol):
    """CANN's libraries."""

    runtime: ctypes.CDLL
    tensors: ctypes.CDLL
    operators: ctypes.CDLL


class Caller:
    """A stream of device 0, and whatever else was asked for, owned until `close`."""

    def __init__(self, cann: Cann) -> None:
        self.acl, self.nn, self.op = cann.runtime, cann.tensors, cann.operators
        self.nn.aclCreateTensor.restype = self.nn.aclCreateIntArray.restype = ctypes.c_void_p
        self.owned: list[tuple[Callable, ctypes.c_void_p]] = []
        self.acl.aclInit(None)
        assert self.acl.aclrtSetDevice(0) == 0
        self.stream = self.create_stream()

    def own(self, give_back: Callable, pointer: ctypes.c_void_p) -> ctypes.c_void_p:
        self.owned.append((give_back, pointer))
        return pointer

    def give_back(self, pointer: ctypes.c_void_p) -> None:
        for entry in self.owned:
            if entry[1].value == pointer.value:
                self.owned.remove(entry)
                assert entry[0](pointer) == 0
                return

    def close(self) -> None:
        """Waits for the stream and gives back everything, the latest first."""
        if any(give_back is self.acl.aclrtDestroyStream for give_back, _ in self.owned):
            self.acl.aclrtSynchronizeStream(self.stream)
        for give_back, pointer in reversed(self.owned):
            give_back(pointer)
        self.owned.clear()

    def create_stream(self) -> ctypes.c_void_p:
        stream = ctypes.c_void_p()
        assert self.acl.aclrtCreateStream(ctypes.byref(stream)) == 0
        return self.own(self.acl.aclrtDestroyStream, stream)

    def synchronize(self) -> int:
        return self.acl.aclrtSynchronizeStream(self.stream)

    def malloc(self, size: int) -> ctypes.c_void_p:
        pointer = ctypes.c_void_p()
        assert self.acl.aclrtMalloc(ctypes.byref(pointer), ctypes.c_size_t(size), 0) == 0
        return self.own(self.acl.aclrtFree, pointer)

    def malloc_pinned(self, size: int) -> np.ndarray:
        """Pinned host memory, as bytes."""
        pointer = ctypes.c_void_p()
        assert self.acl.aclrtMallocHost(ctypes.byref(pointer), ctypes.c_size_t(size)) == 0
        self.own(self.acl.aclrtFreeHost, pointer)
        assert pointer.value is not None
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer.value))

    def tensor(
        self, dims: Sequence[int], dtype: int, data: ctypes.c_void_p, *, stride: int = 1,
        format: int = 2,
    ) -> ctypes.c_void_p:  # fmt: skip
        """A tensor over device memory, its axes packed unless `stride` says otherwise."""
        strides = [stride * int(np.prod(dims[i + 1 :])) for i in range(len(dims))]
        rank = ctypes.c_uint64(len(dims))
        tensor = self.nn.aclCreateTensor(
            int64s(dims), rank, dtype, int64s(strides), ctypes.c_int64(0), format,
            int64s(dims), rank, data,
        )  # fmt: skip
        return self.own(self.nn.aclDestroyTensor, ctypes.c_void_p(tensor))

    def integers(self, values: Sequence[int]) -> ctypes.c_void_p:
        array = self.nn.aclCreateIntArray(int64s(values), ctypes.c_uint64(len(values)))
        return self.own(self.nn.aclDestroyIntArray, ctypes.c_void_p(array))

    def copied_in(self, array: np.ndarray) -> ctypes.c_void_p:
        """Device memory with an array's bytes."""
        pinned = self.malloc_pinned(array.nbytes)
        pinned[:] = np.ascontiguousarray(array).view(np.uint8).ravel()
        pointer = self.malloc(array.nbytes)
        self.copy(pointer, address(pinned), array.nbytes, TO_DEVICE)
        assert self.synchronize() == 0
        self.give_back(address(pinned))
        return pointer

    def copy_out(self, pointer: ctypes.c_void_p, array: np.ndarray) -> None:
        """Fills an array with device memory's bytes."""
        pinned = self.malloc_pinned(array.nbytes)
        self.copy(address(pinned), pointer, array.nbytes, TO_HOST)
        assert self.synchronize() == 0
        array.view(np.uint8).ravel()[:] = pinned
        self.give_back(address(pinned))

    def copy(self, to: ctypes.c_void_p, source: ctypes.c_void_p, count: int, kind: int) -> None:
        size = ctypes.c_size_t(count)
        assert self.acl.aclrtMemcpyAsync(to, size, source, size, kind, self.stream) == 0

    def run(self, operator: str, *arguments: Any) -> list[int]:
        """Enqueues an operator of CANN: the statuses of its phases, up to the first that fails."""
        passed = [
            ctypes.c_int64(a) if isinstance(a, int)
            else ctypes.c_double(a) if isinstance(a, float) else a
            for a in arguments
        ]  # fmt: skip
        size, executor = ctypes.c_uint64(), ctypes.c_void_p()
        first = getattr(self.op, f"{operator}GetWorkspaceSize")
        statuses = [first(*passed, ctypes.byref(size), ctypes.byref(executor))]
        if statuses == [0]:
            workspace = self.malloc(size.value) if size.value else None
            statuses.append(getattr(self.op, operator)(workspace, size, executor, self.stream))
        return statuses


def address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def int64s(values: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)
