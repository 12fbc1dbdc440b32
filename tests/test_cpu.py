"""The CPU kernel: the contract on each instruction set, and what is particular to it."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention.contract import CompressAttentionContract
from compress_attention.problems import Geometry, build

from jax_nsa import native, nsa_compress_attention_infer
from jax_nsa.backends import cpu

REPOSITORY = pathlib.Path(__file__).parent.parent
ISAS = ("amx", "avx512", "avx2", "sse2", "neon")

# 1.4 MB of keys and values: enough to be spread over threads, in several splits.
THREADED = Geometry(
    dtype="bfloat16", lengths=(2100, 1, 400, 900), token_counts=(2, 1, 3, 1), key_value_heads=2,
    group=4, head_size=64, value_size=32, page=64, k=9, scale=0.125, return_lse=True,
)  # fmt: skip


class CpuContract(CompressAttentionContract):
    implementation = "cpu"
    fails_on_faults = True
    isa: str

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def forced_isa(cls) -> Iterator[None]:
        """Runs the tests of the class on its instruction set, if this machine has it."""
        if cls.isa not in native.module().cpu_kernels():
            pytest.skip(f"this machine has no {cls.isa}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(cpu.ISA_VARIABLE, cls.isa)
            jax.clear_caches()  # programs keep the instruction set that they were compiled for
            yield
        jax.clear_caches()


for _isa in ISAS:
    _name = f"Test{_isa.capitalize()}"
    globals()[_name] = type(_name, (CpuContract,), {"isa": _isa})


def call(arguments: dict) -> tuple:
    return nsa_compress_attention_infer(**arguments, implementation="cpu")


def split(geometry: Geometry = THREADED) -> tuple[dict, dict]:
    """A call's arguments as arrays and the static others."""
    arguments = build(geometry)
    arrays = {n: jnp.asarray(a) for n, a in arguments.items() if isinstance(a, np.ndarray)}
    return arrays, {n: a for n, a in arguments.items() if n not in arrays}


def assert_same_bits(results: tuple, expected: tuple) -> None:
    for result, other in zip(results, expected, strict=True):
        assert np.asarray(result).tobytes() == np.asarray(other).tobytes()


# Which instruction set.


def test_best_instruction_set_comes_first():
    kernels = native.module().cpu_kernels()
    assert kernels == [isa for isa in ISAS if isa in kernels]
    assert kernels[-1] in ("sse2", "neon")


def test_forced_instruction_set_is_in_the_program(monkeypatch):
    arrays, static = split()
    isa = native.module().cpu_kernels()[-1]
    monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
    program = jax.jit(lambda arrays: call(static | arrays)).lower(arrays).as_text()
    assert f'isa = "{isa}"' in program


@pytest.mark.parametrize("isa", ["avx3", "AVX2", "x"])
def test_unknown_instruction_set_is_refused(monkeypatch, isa):
    monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
    arrays, static = split()
    with pytest.raises(ValueError, match=rf"JAX_NSA_CPU_ISA must name.*sse2.*got '{isa}'"):
        jax.jit(lambda arrays: call(static | arrays)).lower(arrays)


def test_program_for_a_missing_instruction_set_fails(monkeypatch):
    monkeypatch.setattr(cpu, "configuration", lambda call: {"isa": "mmx"})
    arrays, static = split()
    with pytest.raises(jax.errors.JaxRuntimeError, match='no CPU kernel "mmx"'):
        jax.block_until_ready(jax.jit(lambda arrays: call(static | arrays))(arrays))


# Threads.


def test_many_calls_in_one_program():
    arrays, static = split()

    def program(arrays):
        query = arrays.pop("query")
        return [call({**static, **arrays, "query": query * (1 + i % 3)}) for i in range(64)]

    results = jax.block_until_ready(jax.jit(program)(dict(arrays)))
    for i in range(3):
        expected = call({**static, **arrays, "query": arrays["query"] * (1 + i)})
        for results_here in results[i::3]:
            assert_same_bits(results_here, expected)


def test_calls_from_many_threads():
    arrays, static = split()
    operator = jax.jit(lambda arrays: call(static | arrays))
    expected = operator(arrays)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for results in pool.map(
            lambda _: jax.block_until_ready(operator(arrays)), range(64), timeout=120
        ):
            assert_same_bits(results, expected)


def test_calls_in_a_map():
    arrays, static = split()
    query = arrays.pop("query")
    queries = jnp.stack([query * (1 + i) for i in range(5)])
    mapped = jax.lax.map(lambda query: call({**static, **arrays, "query": query}), queries)
    for i in range(5):
        expected = call({**static, **arrays, "query": queries[i]})
        assert_same_bits(tuple(r[i] for r in mapped), expected)


def digest() -> str:
    """A hash of the bits of a threaded call's results."""
    arrays, static = split()
    results = jax.block_until_ready(call(static | arrays))
    return hashlib.sha256(b"".join(np.asarray(r).tobytes() for r in results)).hexdigest()


def python(code: str, **environment: str) -> str:
    """What a fresh Python prints that can import this file."""
    path = os.pathsep.join([str(REPOSITORY / "tests"), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | environment,
        check=True, capture_output=True, text=True, timeout=300,
    ).stdout.strip()  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot bind to one processor")
def test_bits_do_not_depend_on_the_number_of_threads():
    alone = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code = "import test_cpu; print(test_cpu.digest())"
    assert python(alone + code, NPROC="1") == python(code, NPROC="5") == digest()


# Memory.


def memory_bound(
    *, threads: int, heads: int, rows: int, head_size: int, value_size: int, tile: int,
    length: int, blocks: int, splits: int, tokens: int,
) -> int:  # fmt: skip
    """The bound that docs/performance.md states, in bytes."""
    tiles = 4 * (
        heads * rows * (head_size + 2 * tile + 80) + 64 * heads + 16 * head_size + 64 * value_size
    )
    state = blocks + splits * (value_size + 5) + length // tile + 2  # of a row
    group = 4 * heads * (rows * state + tokens * blocks)
    return threads * tiles + (2 * threads + 1) * group


def peak_growth(sequences: int, length: int) -> tuple[int, int]:
    """Peak memory that one call adds, and the bound of it; the sequences share their pages."""
    page, heads, head_size, value_size = 128, 16, 32, 32
    pages = -(-length // page)
    pool = jnp.ones((pages, page, head_size), jnp.bfloat16)
    query = jnp.ones((sequences, heads, head_size), jnp.bfloat16)
    operator = jax.jit(
        lambda table, lengths: nsa_compress_attention_infer(
            query, pool, pool, 0.1, heads, 1, 64, 16, page, 32, 16,
            block_table=table, actual_cmp_seq_kvlen=lengths, implementation="cpu",
        )
    )  # fmt: skip
    table = jnp.tile(jnp.arange(pages, dtype=jnp.int32), (sequences, 1))
    jax.block_until_ready(operator(table, jnp.zeros(sequences, jnp.int32)))

    def peak() -> int:
        status = pathlib.Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024

    before = peak()
    jax.block_until_ready(operator(table, jnp.full(sequences, length, jnp.int32)))
    bound = memory_bound(
        threads=(os.cpu_count() or 1) + 1, heads=1, rows=heads, head_size=head_size,
        value_size=value_size, tile=page, length=length, blocks=length // 4 + 1, splits=1, tokens=1,
    )  # fmt: skip
    return peak() - before, bound


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc to read peaks from")
def test_memory_is_bounded_by_threads_not_by_sequences():
    code = "import test_cpu; print(*test_cpu.peak_growth(256, 16384))"
    growth, bound = map(int, python(code).split())
    allowed = bound + (8 << 20)  # what else a call costs
    everything = 256 * 16384 * 16 * 4  # one float for each sequence, position and head
    assert growth < allowed < everything


# The kernels of other machines, and how they are linked.


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def compile_kernel(compiler: str, isa: str, target: pathlib.Path, *flags: str) -> None:
    subprocess.run(
        [compiler, "-std=c++17", "-O3", "-ffp-contract=fast", "-fno-exceptions", "-Wno-psabi",
         f"-DJAX_NSA_ISA={isa}", f"-I{REPOSITORY / 'cc'}", *flags, "-c",
         str(REPOSITORY / "cc/cpu/compress_attention_kernel.cc"), "-o", str(target)],
        check=True, timeout=600,
    )  # fmt: skip


def test_kernel_of_aarch64(tmp_path):
    compiler, emulator = tool("aarch64-linux-gnu-g++"), tool("qemu-aarch64")
    compile_kernel(compiler, "neon", tmp_path / "kernel.o")
    subprocess.run(
        [compiler, "-std=c++17", "-O2", "-static", f"-I{REPOSITORY / 'cc'}",
         *(str(REPOSITORY / f) for f in
           ("tests/cc/compress_attention_cpu_kernel_test.cc", "cc/cpu/isa.cc",
            "cc/cpu/compress_attention_isa.cc", "cc/cpu/compress_attention_run.cc")),
         str(tmp_path / "kernel.o"), "-o", str(tmp_path / "test"), "-pthread"],
        check=True, timeout=600,
    )  # fmt: skip
    done = subprocess.run(
        [emulator, str(tmp_path / "test")], check=False, capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "kernel neon\n", "")


def test_kernels_leave_nothing_for_the_linker_to_choose(tmp_path):
    # A weak symbol compiled for one instruction set might serve all.
    compiler, nm = tool("g++"), tool("nm")
    flags = () if "neon" in native.module().cpu_kernels() else ("-mavx2", "-mfma", "-mf16c")
    compile_kernel(compiler, "some", tmp_path / "kernel.o", *flags)
    symbols = subprocess.run(
        [nm, "--defined-only", str(tmp_path / "kernel.o")],
        check=True, capture_output=True, text=True,
    ).stdout.split("\n")  # fmt: skip
    external = [s.split()[1:] for s in symbols if re.search(r" [A-Z] |[uvw] ", s)]
    shared = [s for kind, s in external if kind in "WVuvw"]
    assert shared == []
    assert [s for kind, s in external if kind in "RDT"] == [
        "_ZN7jax_nsa3cpu4some17kCompressedKernelE"
    ]
