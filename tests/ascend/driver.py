"""A small caller of CANN's functions that can be told to break one rule."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from ascend.caller import BFLOAT16, INT32, Caller
from ascend.standin import StandIn


class Driver(Caller):
    """A small caller of CANN's functions that can be told to break one rule."""

    HEADS, HEAD_SIZE, PAGE, LENGTH, K = 2, 16, 16, 20, 2

    def __init__(self, standin: StandIn) -> None:
        super().__init__(standin)
        self.standin = standin
        self.sizes = {
            "query": (1, self.HEADS, self.HEAD_SIZE), "key": (2, self.PAGE, self.HEAD_SIZE),
            "value": (2, self.PAGE, self.HEAD_SIZE), "attention": (1, self.HEADS, self.HEAD_SIZE),
            "table": (1, 2), "topk": (1, 1, self.K),
        }  # fmt: skip
        self.arrays = {name: self.malloc(4 * int(np.prod(s))) for name, s in self.sizes.items()}
        for name in ("query", "key", "value"):
            self.poke(name, np.full(2 * int(np.prod(self.sizes[name])), 0x3F00, np.uint16))
        self.poke("table", np.array([0, 1], np.int32))
        self.pinned = self.malloc_pinned(64)

    def close(self) -> None:
        super().close()
        self.standin.take_violations(expected=True)
        self.standin.take_violations()

    def destroy_stream(self) -> None:
        self.give_back(self.stream)

    def poke(self, name: str, values: np.ndarray) -> None:
        data, size = ctypes.c_void_p(values.ctypes.data), ctypes.c_size_t(values.nbytes)
        assert self.acl.standin_poke(self.arrays[name], data, size) == 0

    def attention(self) -> np.ndarray:
        bits = np.empty(self.HEADS * self.HEAD_SIZE, np.uint16)
        data, size = ctypes.c_void_p(bits.ctypes.data), ctypes.c_size_t(bits.nbytes)
        assert self.acl.standin_peek(data, self.arrays["attention"], size) == 0
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def copy_in(
        self, *, pageable: bool = False, stream: ctypes.c_void_p | None = None, name: str = "query"
    ) -> int:
        """Copies the pinned memory to an array."""
        source = np.zeros(64, np.uint8) if pageable else self.pinned
        data, size = ctypes.c_void_p(source.ctypes.data), ctypes.c_size_t(64)
        return self.acl.aclrtMemcpyAsync(
            self.arrays[name], size, data, size, 1, stream or self.stream
        )

    def array(self, name: str, dtype: int = BFLOAT16, **changes: Any) -> ctypes.c_void_p:
        """The tensor over one of the arrays."""
        data = changes.pop("data", None) or self.arrays[name]
        return self.tensor(self.sizes[name], dtype, data, **changes)

    def launch(
        self, *, query_dtype=27, key_dtype=27, table_dtype=3, format=2, stride=1,
        host_query=False, freed_query=False, small_query=False, other_device=False,
        null_query=False, destroyed_query=False, null_q_lengths=False, null_lengths=False,
        q_lengths=(1,), lengths=(LENGTH,), layout=b"TND", heads=HEADS, k=K, stride_d=16,
        sparse_mode=0, freed_workspace=False, host_workspace=False, small_workspace=False,
        tensor_destroyed_early=False, executor_twice=False, destroyed_stream=False,
        workspace_freed_after_launch=False, copies_on_another_stream=False,
    ) -> int:  # fmt: skip
        """Both phases; the status of the one that fails, or 0."""
        data = None
        if host_query:
            data = ctypes.c_void_p(self.pinned.ctypes.data)
        elif freed_query:
            data = self.malloc(64)
            self.give_back(data)
        elif small_query:
            data = self.malloc(8)
        elif other_device:
            self.acl.aclrtSetDevice(1)
            data = self.malloc(64)
            self.acl.aclrtSetDevice(0)
        if copies_on_another_stream:
            self.pinned[:] = 0xFF
            self.poke("query", np.full(32, 0xFFFF, np.uint16))
            other = self.create_stream()
            assert self.copy_in(stream=other) == 0
        query = self.array("query", query_dtype, stride=stride, format=format, data=data)
        key, value = self.array("key", key_dtype), self.array("value")
        table, attention = self.array("table", table_dtype), self.array("attention")
        topk = self.array("topk", INT32)
        if destroyed_query:
            self.give_back(query)
        workspace_size, executor = ctypes.c_uint64(), ctypes.c_void_p()
        i64 = ctypes.c_int64
        status = self.op.aclnnNsaCompressAttentionInferGetWorkspaceSize(
            None if null_query else query, key, value, None, table,
            None if null_q_lengths else self.integers(list(q_lengths)),
            None if null_lengths else self.integers(list(lengths)),
            None, None, i64(heads), i64(1), i64(64), i64(k), i64(32), i64(stride_d),
            ctypes.c_double(1.0), layout, i64(self.PAGE), i64(sparse_mode), attention, topk,
            ctypes.byref(workspace_size), ctypes.byref(executor),
        )  # fmt: skip
        if status != 0:
            return status
        workspace = self.malloc(workspace_size.value)
        if freed_workspace:
            self.give_back(workspace)
        if host_workspace:
            workspace = ctypes.c_void_p(self.pinned.ctypes.data)
        if tensor_destroyed_early:
            self.give_back(query)
        if destroyed_stream:
            self.give_back(self.stream)

        def second_phase() -> int:
            size = ctypes.c_uint64(workspace_size.value - int(small_workspace))
            return self.op.aclnnNsaCompressAttentionInfer(workspace, size, executor, self.stream)

        status = second_phase()
        if executor_twice:
            status = second_phase()
        if workspace_freed_after_launch:
            self.give_back(workspace)
        return status
