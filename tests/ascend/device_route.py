"""Runs the device route's handlers where no JAX platform has device buffers.

The operands of a call go to the stand-in's device memory, XLA's part is played by
`call_frame.h`, and the results come back. As an implementation beside the others, so that whatever
calls the front door can be run through it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import functools
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ascend.standin import StandIn

from jax_nsa import chain, native
from jax_nsa.backends import Call, ascend, decode_step
from jax_nsa.backends.ascend import step
from jax_nsa.operator import Operator

DEVICE = 1
# XLA_FFI_DataType
FFI_TYPES = {"int32": 4, "float16": 10, "float32": 11, "bfloat16": 16}
# XLA_FFI_Error_Code
ERRORS = {3: "INVALID_ARGUMENT", 9: "FAILED_PRECONDITION", 12: "UNIMPLEMENTED", 13: "INTERNAL"}


class HandlerError(Exception):
    """The error that a handler returned."""


class Harness:
    """The handlers of the device route, on a stream of the stand-in."""

    def __init__(self, library: pathlib.Path, standin: StandIn) -> None:
        self.frames = ctypes.CDLL(str(library))
        self.frames.frame_new.restype = ctypes.c_void_p
        self.standin = standin
        self.acl = standin.runtime
        targets = native.module().registrations()["ascend"]
        self.handlers = {name: _pointer(capsule) for name, (_, capsule) in targets.items()}
        self.lock = threading.RLock()  # a hook below may run another call
        # What a test does right before and after the handler runs.
        self.on_entry: Callable[[], None] | None = None
        self.on_exit: Callable[[], None] | None = None
        self.in_new_thread = False  # whether the handler runs on one, which has set no device
        self.stream = ctypes.c_void_p()
        self.acl.aclInit(None)
        assert self.acl.aclrtSetDevice(DEVICE) == 0
        assert self.acl.aclrtCreateStream(ctypes.byref(self.stream)) == 0

    def close(self) -> None:
        """Gives back the stream."""
        native.module().ascend_release()
        assert self.acl.aclrtSetDevice(DEVICE) == 0
        assert self.acl.aclrtDestroyStream(self.stream) == 0

    def run(self, call: Call, operands: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Runs the call's handler once; HandlerError with its message if it fails."""
        return self.run_joint(call.operator.target, {"": (call, operands)})[0]

    def run_joint(
        self, target: str, parts: Mapping[str, tuple[Call, Sequence[np.ndarray]]]
    ) -> list[list[np.ndarray]]:
        """Runs a handler of several calls, by the prefixes of their attributes; each's results."""
        with self.lock, self._frame() as frame, contextlib.ExitStack() as memory:
            assert self.acl.aclrtSetDevice(DEVICE) == 0
            results = []
            for prefix, (call, operands) in parts.items():
                self.frames.frame_begin(frame, prefix.encode())
                results.append(self._add(frame, memory, call, operands))
            self.frames.frame_stream(frame, self.stream, DEVICE)
            message = ctypes.create_string_buffer(4096)
            if self.on_entry:
                self.on_entry()
            handler = self.handlers[native.target_name("ascend", target)]
            handle = functools.partial(
                self.frames.frame_run, frame, handler, message, ctypes.c_size_t(len(message))
            )
            if self.in_new_thread:
                with concurrent.futures.ThreadPoolExecutor(1) as pool:
                    code = pool.submit(handle).result()
            else:
                code = handle()
            if self.on_exit:
                self.on_exit()
            synchronized = self.acl.aclrtSynchronizeStream(self.stream)
            if code != 0:
                raise HandlerError(f"{ERRORS[code]}: {message.value.decode()}")
            assert synchronized == 0, self.acl.aclGetRecentErrMsg()
            for output, pointer in (pair for pairs in results for pair in pairs):
                self.acl.standin_peek(
                    ctypes.c_void_p(output.ctypes.data), pointer, ctypes.c_size_t(output.nbytes)
                )
            return [[output for output, _ in pairs] for pairs in results]

    def _add(
        self, frame: ctypes.c_void_p, memory: contextlib.ExitStack, call: Call,
        operands: Sequence[np.ndarray],
    ) -> list[tuple[np.ndarray, ctypes.c_void_p]]:  # fmt: skip
        """Adds a call to a frame: its results, and where they lie on the device."""

        def add(
            name: str, array: np.ndarray, is_result: bool, pointer: ctypes.c_void_p | None = None
        ) -> ctypes.c_void_p:
            pointer = pointer or memory.enter_context(self._device_copy(array))
            self.frames.frame_buffer(
                frame, name.encode(), int(is_result), FFI_TYPES[array.dtype.name],
                ctypes.c_int64(array.ndim), _int64s(array.shape), pointer,
            )  # fmt: skip
            return pointer

        inputs = {
            name: add(name, np.ascontiguousarray(operand), False)
            for name, operand in zip(call.names, operands, strict=True)
        }
        outputs = [np.empty(r.shape, r.dtype) for r in call.results()]
        names = [result.name for result in call.operator.results(call.problem)]
        pointers = [
            # A result of an operand's name lies in its memory.
            add(name, output, True, inputs.get(name))
            for name, output in zip(names, outputs, strict=True)
        ]
        for name, value in call.problem.scalars().items():
            if isinstance(value, float):
                self.frames.frame_problem_float(frame, name.encode(), ctypes.c_float(value))
            else:
                self.frames.frame_problem_integer(frame, name.encode(), ctypes.c_int64(value))
        self.frames.frame_string(frame, b"faults", call.on_fault.encode())
        self.frames.frame_integer(frame, b"pool_maps", ctypes.c_int64(call.pool_maps))
        lengths = ascend.configuration(call)["host_lengths"].tolist()
        for name, values in (("host_lengths", lengths), ("maps", call.maps)):
            self.frames.frame_integers(
                frame, name.encode(), ctypes.c_int64(len(values)), _int64s(values)
            )
        return list(zip(outputs, pointers, strict=True))

    @contextlib.contextmanager
    def _frame(self) -> Iterator[ctypes.c_void_p]:
        frame = ctypes.c_void_p(self.frames.frame_new())
        try:
            yield frame
        finally:
            self.frames.frame_delete(frame)

    @contextlib.contextmanager
    def _device_copy(self, array: np.ndarray) -> Iterator[ctypes.c_void_p]:
        pointer = ctypes.c_void_p()
        size = ctypes.c_size_t(array.nbytes)
        room = ctypes.c_size_t(max(array.nbytes, 1))  # CANN allocates no nothing
        assert self.acl.aclrtMalloc(ctypes.byref(pointer), room, 0) == 0
        self.acl.standin_poke(pointer, ctypes.c_void_p(array.ctypes.data), size)
        try:
            yield pointer
        finally:
            assert self.acl.aclrtFree(pointer) == 0


class DeviceRoute:
    """An implementation like those of jax_nsa.backends."""

    NAME = "ascend_device_route"
    PLATFORMS = None
    DEFAULT_PLATFORMS = ()

    def __init__(self, harness: Harness) -> None:
        self.harness = harness

    def unavailable(self, operator: Operator, platform: str) -> str | None:
        """As the Ascend platform sees it."""
        del platform
        return ascend.unavailable(operator, "ascend")

    def refuses(self, call: Call, platform: str) -> str | None:
        """As the Ascend platform sees it."""
        del platform
        return ascend.refuses(call, "ascend")

    def configuration(self, call: Call) -> Mapping[str, Any]:
        """As the Ascend platform has it."""
        return ascend.configuration(call)

    def compute(self, call: Call, *operands: jax.Array) -> Sequence[jax.Array]:
        """What the program does on the device, with callbacks to the harness."""

        def run(call: Call, operands: Sequence[jax.Array]) -> Sequence[jax.Array]:
            results = tuple(call.results())

            def handle(*arrays: Any) -> tuple[np.ndarray, ...]:
                return tuple(self.harness.run(call, list(map(np.asarray, arrays))))

            return jax.pure_callback(handle, results, *operands)

        return ascend.on_device(call, operands, run)

    def joins_here(self) -> bool:
        """As where there is an Ascend plugin."""
        return True

    def joint(self, calls: Sequence[Call], platform: str) -> chain.Joint | None:
        """As the Ascend platform has it, with a callback to the harness."""
        del platform
        if not decode_step.is_one(calls):
            return None

        def run(branches: Sequence[step.Branch]) -> Sequence[Sequence[jax.Array]]:
            prefixes = [f"{name}_" for name in decode_step.BRANCHES]
            inner = [call for call, _ in branches]

            def handle(*operands: Any) -> list[list[np.ndarray]]:
                arrays = [list(map(np.asarray, its)) for its in operands]
                branch_of = zip(prefixes, zip(inner, arrays, strict=True), strict=True)
                return self.harness.run_joint(decode_step.TARGET, dict(branch_of))

            results = [call.results() for call in inner]
            return jax.pure_callback(handle, results, *(list(its) for _, its in branches))

        return lambda operands: step.joint(calls, operands, run)


def _pointer(capsule: Any) -> ctypes.c_void_p:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return ctypes.c_void_p(get(capsule, None))


def _int64s(values: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)
