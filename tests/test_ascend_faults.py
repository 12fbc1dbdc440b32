"""CANN is absent or in odd places, and the stand-in for it must notice what CANN forbids."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable

import numpy as np
import pytest
from ascend.standin import OPERATORS, StandIn, build_operators

pytest_plugins = ("ascend.fixtures",)


class TestStandInIsStrict:
    """Each way to break CANN's rules, planted: the stand-in must notice it."""

    @pytest.fixture
    def driver(self, standin):
        driver = Driver(standin)
        yield driver
        driver.close()

    def test_the_rules_kept(self, driver):
        assert driver.launch() == 0
        assert driver.synchronize() == 0
        assert driver.standin.take_violations() == ""
        assert np.isfinite(driver.attention()).all()

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"query_dtype": 0}, "query has dtype 0"),
            ({"table_dtype": 9}, "blockTable has dtype 9"),
            ({"key_dtype": 1}, "key has dtype 1"),
            ({"format": 1}, "query is not ND"),
            ({"stride": 2}, "query is not contiguous"),
            ({"host_query": True}, "query is not in live device memory"),
            ({"freed_query": True}, "query is not in live device memory"),
            ({"small_query": True}, "query is not in live device memory of that size"),
            ({"other_device": True}, "query is not in live device memory"),
            ({"null_query": True}, "query is null"),
            ({"destroyed_query": True}, "query is not a live tensor"),
            ({"null_q_lengths": True}, "actualQSeqLen is null"),
            ({"null_lengths": True}, "actualCmpKvSeqLen is null"),
            ({"q_lengths": [1, 1]}, "actualQSeqLen has not one entry"),
            ({"q_lengths": [0]}, "actualQSeqLen is 0"),
            ({"q_lengths": [2]}, "T is not the sum"),
            ({"lengths": [8193]}, "actualCmpKvSeqLen is 8193"),
            ({"layout": b"BNSD"}, "layout is BNSD"),
            ({"layout": b"BSND"}, "query has rank 3"),
            ({"layout": None}, "layout is null"),
            ({"heads": 4}, "query has not numHeads heads"),
            ({"k": 99}, "topKOutput has the wrong shape"),
            ({"stride_d": 20}, "block sizes"),
            ({"sparse_mode": 1}, "sparseMode is not 0"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )  # fmt: skip
    def test_first_phase(self, driver, changes, complaint):
        assert driver.launch(**changes) in (161001, 161002)
        assert complaint in driver.standin.take_violations(expected=True)

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"freed_workspace": True}, "the workspace is not live device memory"),
            ({"host_workspace": True}, "the workspace is not live device memory"),
            ({"small_workspace": True}, "the workspace is too small"),
            ({"tensor_destroyed_early": True}, "a tensor was destroyed before"),
            ({"executor_twice": True}, "not an executor, or used before"),
            ({"destroyed_stream": True}, "is not a live stream"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_second_phase(self, driver, changes, complaint):
        assert driver.launch(**changes) != 0
        assert complaint in driver.standin.take_violations(expected=True)

    def test_workspace_freed_before_the_kernel_ran(self, driver):
        """The launch returns at once: freeing does not wait for it."""
        assert driver.launch(workspace_freed_after_launch=True) == 0
        assert driver.synchronize() != 0
        assert "freed meanwhile" in driver.standin.take_violations(expected=True)

    def test_missing_synchronize(self, driver):
        assert driver.launch() == 0
        assert not np.isfinite(driver.attention()).any()  # nothing has run
        driver.destroy_stream()
        assert "nobody waited" in driver.standin.take_violations(expected=True)

    def test_missing_order(self, driver):
        """Work on another stream sees nothing of what this stream has still to do."""
        assert driver.launch(copies_on_another_stream=True) == 0
        driver.synchronize()
        assert not np.isfinite(driver.attention()).all()
        driver.standin.take_violations(expected=True)

    def test_host_memory_reused_before_it_was_copied(self, driver):
        driver.copy_in()
        driver.pinned[0] = 7
        driver.synchronize()
        assert "changed before it was copied" in driver.standin.take_violations(expected=True)

    def test_copy_from_memory_that_is_not_pinned(self, driver):
        assert driver.copy_in(pageable=True) != 0
        assert "not pinned" in driver.standin.take_violations(expected=True)

    def test_no_device_set(self, driver):
        statuses = []
        pointer = ctypes.c_void_p()
        thread = threading.Thread(
            target=lambda: statuses.append(
                driver.acl.aclrtMalloc(ctypes.byref(pointer), ctypes.c_size_t(8), 0)
            )
        )
        thread.start()
        thread.join()
        assert statuses == [107002]
        assert "has set no device" in driver.standin.take_violations(expected=True)

    @pytest.mark.parametrize("function", ["aclrtFree", "aclrtFreeHost", "aclrtDestroyStream"])
    def test_given_back_twice(self, driver, function):
        assert getattr(driver.acl, function)(ctypes.c_void_p(4096)) != 0
        assert "not" in driver.standin.take_violations(expected=True)

    def test_device_memory_touched_by_the_host(self, driver, tmp_path):
        result = run_alone(
            driver.standin,
            """
            pointer = ctypes.c_void_p()
            standin.runtime.aclInit(None); standin.runtime.aclrtSetDevice(0)
            standin.runtime.aclrtMalloc(ctypes.byref(pointer), ctypes.c_size_t(64), 0)
            ctypes.memset(pointer, 0, 1)
            """,
        )
        assert result.returncode == -11  # a segmentation fault

    def test_leaks_at_exit(self, driver):
        result = run_alone(
            driver.standin,
            """
            pointer = ctypes.c_void_p()
            standin.runtime.aclInit(None); standin.runtime.aclrtSetDevice(0)
            standin.runtime.aclrtMalloc(ctypes.byref(pointer), ctypes.c_size_t(64), 0)
            """,
        )
        assert result.returncode == 70
        assert "leaked 64 bytes of device memory" in result.stderr


@pytest.fixture(scope="module")
def variants(standin_libraries, tmp_path_factory):
    """Directories of libraries, for other installs of CANN."""

    def directory(name, *libraries):
        path = tmp_path_factory.mktemp(name)
        for library in libraries:
            os.symlink(standin_libraries.directory / library, path / library)
        return path

    runtime = "libascendcl.so", "libnnopbase.so"
    variants = {
        "none": directory("none"),
        "half": directory("half", "libascendcl.so"),
        "no operators": directory("no_operators", *runtime),
        "old": directory("old", *runtime),
        "partial": directory("partial", *runtime),
        "custom": directory("custom", *runtime, "libopapi.so"),
        "split": directory("split", *runtime),
        "home": directory("home"),
    }
    build_operators(variants["old"], "libopapi.so", ())
    build_operators(variants["partial"], "libopapi.so", ("compress_attention",))
    build_operators(variants["custom"], "libcust_opapi.so", OPERATORS)
    build_operators(variants["split"], "libopapi.so", ())
    build_operators(variants["split"], "libopapi_math.so", ())
    build_operators(variants["split"], "libopapi_transformer.so", OPERATORS)
    os.symlink(variants["split"], variants["home"] / "lib64")
    return variants


class TestLoading:
    """How CANN is found, each time in a process of its own."""

    QUESTION = 'print(native.module().ascend_unavailable("compress_attention"))'
    CALL = """
        from problems import Geometry, build
        import jax.numpy as jnp
        from jax_nsa import nsa_compress_attention_infer
        arguments = build(Geometry(dtype="bfloat16", k=1))
        query = jnp.asarray(arguments.pop("query"))
        def call(): nsa_compress_attention_infer(query, **arguments, implementation="ascend")
        """

    def test_available(self, standin):
        result = run_alone(standin, self.QUESTION, JAX_NSA_CANN_LIBRARY_PATH=standin.directory)
        assert result.stdout == "None\n"

    @pytest.mark.parametrize(
        ("variant", "sentences"),
        [
            ("none", ["libascendcl.so cannot be loaded", "install the CANN toolkit",
                      "source its set_env.sh"]),
            ("half", ["libnnopbase.so cannot be loaded", "set_env.sh"]),
            ("no operators", ["libopapi.so cannot be loaded"]),
            ("old", ["has no function aclnnNsaCompressAttentionInfer", "/libopapi.so",
                     "8.2 or newer"]),
        ],
    )  # fmt: skip
    def test_unavailable(self, standin, variants, variant, sentences):
        path = variants[variant]
        result = run_alone(standin, self.QUESTION, JAX_NSA_CANN_LIBRARY_PATH=path)
        assert result.returncode == 0, result.stderr
        for sentence in sentences:
            assert sentence in result.stdout

    def test_one_operator_alone(self, standin, variants):
        """A CANN that lacks the others serves it."""
        script = """
            for target in ("compress_attention", "select_attention", "compress"):
                print(native.module().ascend_unavailable(target))
            """
        result = run_alone(standin, script, JAX_NSA_CANN_LIBRARY_PATH=variants["partial"])
        there, *absent = result.stdout.splitlines()
        assert there == "None", result.stderr
        assert "has no function aclnnNsaSelectedAttentionInfer" in absent[0]
        assert "has no function aclnnNsaCompressWithCache" in absent[1]

    def test_no_cann_at_all(self, standin):
        result = run_alone(standin, self.QUESTION)
        assert "libascendcl.so cannot be loaded" in result.stdout

    def test_no_device(self, standin):
        result = run_alone(
            standin, self.QUESTION,
            JAX_NSA_CANN_LIBRARY_PATH=standin.directory, STANDIN_CANN_DEVICES="0",
        )  # fmt: skip
        assert "finds no NPU" in result.stdout
        assert "ASCEND_RT_VISIBLE_DEVICES" in result.stdout

    def test_without_cann_the_call_says_so(self, standin):
        result = run_alone(standin, textwrap.dedent(self.CALL) + "call()\n")
        assert "NotImplementedError" in result.stderr
        assert 'implementation="ascend": CANN\'s library libascendcl.so cannot' in result.stderr

    @pytest.mark.parametrize(
        ("variables", "library"),
        [
            ({"JAX_NSA_CANN_LIBRARY_PATH": ["custom"]}, "libcust_opapi.so"),
            ({"JAX_NSA_CANN_LIBRARY_PATH": ["split"]}, "libopapi_transformer.so"),
            ({"JAX_NSA_CANN_LIBRARY_PATH": ["none", "split"]}, "libopapi_transformer.so"),
            ({"ASCEND_HOME_PATH": ["home"]}, "libopapi_transformer.so"),
            ({"LD_LIBRARY_PATH": ["custom"]}, "libcust_opapi.so"),
            ({"LD_LIBRARY_PATH": ["custom"], "ASCEND_HOME_PATH": ["home"]}, "libcust_opapi.so"),
            ({"LD_LIBRARY_PATH": ["custom"], "JAX_NSA_CANN_LIBRARY_PATH": ["split"]},
             "libopapi_transformer.so"),
        ],
    )  # fmt: skip
    def test_search_order(self, standin, variants, variables, library):
        environment = {
            name: ":".join(str(variants[v]) for v in values) for name, values in variables.items()
        }
        script = textwrap.dedent(self.CALL) + textwrap.dedent(
            f"""
            call()
            print(standin.counter("launches {library}"))
            """
        )
        result = run_alone(standin, script, **environment)
        assert result.stdout == "1\n", result.stderr

    def test_initialization_is_tried_again(self, standin):
        script = textwrap.dedent(self.CALL) + textwrap.dedent(
            """
            standin.plan_fault("aclInit", 100042)
            print(native.module().ascend_unavailable("compress_attention"))
            call(); call()
            print(standin.counter("aclInit"))
            """
        )
        result = run_alone(standin, script, JAX_NSA_CANN_LIBRARY_PATH=standin.directory)
        said, count = result.stdout.splitlines()
        assert said == "aclInit failed with status 100042: E19999: injected fault in aclInit"
        assert count == "2", result.stderr

    def test_initialized_by_somebody_else(self, standin):
        script = textwrap.dedent(self.CALL) + "standin.runtime.aclInit(None); call()\n"
        result = run_alone(standin, script, JAX_NSA_CANN_LIBRARY_PATH=standin.directory)
        assert result.returncode == 0, result.stderr

    def test_the_device_count_fails(self, standin):
        script = 'standin.plan_fault("aclrtGetDeviceCount", 507033)\n' + self.QUESTION
        result = run_alone(standin, script, JAX_NSA_CANN_LIBRARY_PATH=standin.directory)
        assert "aclrtGetDeviceCount failed with status 507033" in result.stdout

    def test_nothing_is_left_at_exit(self, standin):
        """Not even what is kept for further calls."""
        script = textwrap.dedent(self.CALL) + "call()\n"
        result = run_alone(standin, script, JAX_NSA_CANN_LIBRARY_PATH=standin.directory)
        assert (result.returncode, result.stderr) == (0, "")


def run_alone(standin: StandIn, script: str, **environment: object) -> subprocess.CompletedProcess:
    """Runs a script in a fresh process, with the stand-in only where `environment` says so."""
    prelude = f"""
        import ctypes, pathlib, sys
        sys.path[:0] = {[os.path.dirname(__file__), *sys.path]!r}
        import jax
        from ascend.standin import StandIn, build_operators
        from jax_nsa import native
        class Lazy:
            def __getattr__(self, name):
                return getattr(StandIn(pathlib.Path({str(standin.directory)!r})), name)
        standin = Lazy()
        """
    cleared = "JAX_NSA_CANN_LIBRARY_PATH", "ASCEND_HOME_PATH", "LD_LIBRARY_PATH"
    variables = {n: v for n, v in os.environ.items() if n not in cleared}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(script)],
        env=variables | {n: str(v) for n, v in environment.items()},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


class Driver:
    """A small caller of CANN's functions that can be told to break one rule."""

    HEADS, HEAD_SIZE, PAGE, LENGTH, K = 2, 16, 16, 20, 2

    def __init__(self, standin: StandIn) -> None:
        self.standin = standin
        self.acl, self.nn, self.op = standin.runtime, standin.tensors, standin.operators
        self.nn.aclCreateTensor.restype = self.nn.aclCreateIntArray.restype = ctypes.c_void_p
        self.owned: list[tuple[Callable, ctypes.c_void_p]] = []
        self.acl.aclInit(None)
        assert self.acl.aclrtSetDevice(0) == 0
        self.stream = self.create_stream()
        self.sizes = {
            "query": (1, self.HEADS, self.HEAD_SIZE), "key": (2, self.PAGE, self.HEAD_SIZE),
            "value": (2, self.PAGE, self.HEAD_SIZE), "attention": (1, self.HEADS, self.HEAD_SIZE),
            "table": (1, 2), "topk": (1, 1, self.K),
        }  # fmt: skip
        self.arrays = {name: self.malloc(4 * int(np.prod(s))) for name, s in self.sizes.items()}
        for name in ("query", "key", "value"):
            self.poke(name, np.full(2 * int(np.prod(self.sizes[name])), 0x3F00, np.uint16))
        self.poke("table", np.array([0, 1], np.int32))
        pointer = ctypes.c_void_p()
        assert self.acl.aclrtMallocHost(ctypes.byref(pointer), ctypes.c_size_t(64)) == 0
        self.own(self.acl.aclrtFreeHost, pointer)
        self.pinned = (ctypes.c_byte * 64).from_address(pointer.value)

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
        if any(give_back is self.acl.aclrtDestroyStream for give_back, _ in self.owned):
            self.acl.aclrtSynchronizeStream(self.stream)
        for give_back, pointer in reversed(self.owned):
            give_back(pointer)
        self.standin.take_violations(expected=True)
        self.standin.take_violations()

    def create_stream(self) -> ctypes.c_void_p:
        stream = ctypes.c_void_p()
        assert self.acl.aclrtCreateStream(ctypes.byref(stream)) == 0
        return self.own(self.acl.aclrtDestroyStream, stream)

    def destroy_stream(self) -> None:
        self.give_back(self.stream)

    def malloc(self, size: int) -> ctypes.c_void_p:
        pointer = ctypes.c_void_p()
        assert self.acl.aclrtMalloc(ctypes.byref(pointer), ctypes.c_size_t(size), 0) == 0
        return self.own(self.acl.aclrtFree, pointer)

    def poke(self, name: str, values: np.ndarray) -> None:
        data, size = ctypes.c_void_p(values.ctypes.data), ctypes.c_size_t(values.nbytes)
        assert self.acl.standin_poke(self.arrays[name], data, size) == 0

    def attention(self) -> np.ndarray:
        bits = np.empty(self.HEADS * self.HEAD_SIZE, np.uint16)
        data, size = ctypes.c_void_p(bits.ctypes.data), ctypes.c_size_t(bits.nbytes)
        assert self.acl.standin_peek(data, self.arrays["attention"], size) == 0
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def synchronize(self) -> int:
        return self.acl.aclrtSynchronizeStream(self.stream)

    def copy_in(
        self, *, pageable: bool = False, stream: ctypes.c_void_p | None = None, name: str = "query"
    ) -> int:
        """Copies the pinned memory to an array."""
        source = (ctypes.c_byte * 64)() if pageable else self.pinned
        size = ctypes.c_size_t(64)
        return self.acl.aclrtMemcpyAsync(
            self.arrays[name], size, ctypes.byref(source), size, 1, stream or self.stream
        )

    def tensor(self, name: str, dtype: int, *, stride: int = 1, format: int = 2,
               data: ctypes.c_void_p | None = None) -> ctypes.c_void_p:  # fmt: skip
        shape = self.sizes[name]
        strides = [stride * int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
        rank = ctypes.c_uint64(len(shape))
        tensor = self.nn.aclCreateTensor(
            int64s(shape), rank, dtype, int64s(strides), ctypes.c_int64(0), format,
            int64s(shape), rank, data or self.arrays[name],
        )  # fmt: skip
        return self.own(self.nn.aclDestroyTensor, ctypes.c_void_p(tensor))

    def integers(self, values: list[int]) -> ctypes.c_void_p:
        array = self.nn.aclCreateIntArray(int64s(values), ctypes.c_uint64(len(values)))
        return self.own(self.nn.aclDestroyIntArray, ctypes.c_void_p(array))

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
            data = ctypes.cast(self.pinned, ctypes.c_void_p)
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
            ctypes.memset(self.pinned, 0xFF, 64)
            self.poke("query", np.full(32, 0xFFFF, np.uint16))
            other = self.create_stream()
            assert self.copy_in(stream=other) == 0
        query = self.tensor("query", query_dtype, stride=stride, format=format, data=data)
        key, value = self.tensor("key", key_dtype), self.tensor("value", 27)
        table, attention = self.tensor("table", table_dtype), self.tensor("attention", 27)
        topk = self.tensor("topk", 3)
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
            workspace = ctypes.cast(self.pinned, ctypes.c_void_p)
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


def int64s(values) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)
