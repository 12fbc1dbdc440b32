"""The Ascend route's C++: under sanitizers, on other processors, and against CANN's own headers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from ascend.standin import CC, HERE, INCLUDES, build, compile_cc

SOURCES = [
    *sorted((CC / "ascend").glob("*.cc")),
    CC / "ffi_call.cc",
    CC / "compress_attention_call.cc",
    CC / "compress_call.cc",
    CC / "select_attention_call.cc",
]


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_have_no_complaint(tmp_path, sanitizers):
    """JAX_NSA_SOAK_CALLS sets the calls: a few by default, 10000 to be sure."""
    calls = os.environ.get("JAX_NSA_SOAK_CALLS", "400")
    options = f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g", "-O1"
    build(tmp_path, *options)
    program = tmp_path / "soak"
    compile_cc(
        program, [HERE / "soak.cc", *SOURCES], *options, "-pthread",
        f"-L{tmp_path}", "-lascendcl", f"-Wl,-rpath,{tmp_path}",
    )  # fmt: skip
    for threads in (1, 4):
        result = subprocess.run(
            [program, calls, str(threads)],
            env={**os.environ, "JAX_NSA_CANN_LIBRARY_PATH": str(tmp_path)},
            capture_output=True, text=True, timeout=1500, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout.startswith(f"{calls} calls")
        print(threads, "threads:", result.stdout.strip())


def test_compiles_for_aarch64(tmp_path):
    """The hosts of Ascend NPUs are often Kunpeng."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("needs aarch64-linux-gnu-g++ (Debian's g++-aarch64-linux-gnu)")
    for source in SOURCES:
        result = subprocess.run(
            [compiler, "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", *INCLUDES,
             "-c", str(source), "-o", str(tmp_path / "object.o")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr


def test_compiles_without_processor_specific_headers():
    for source in (CC / "ascend").iterdir():
        text = source.read_text()
        assert "immintrin" not in text
        assert "__x86_64__" not in text


@pytest.fixture(scope="session")
def cann_headers(tmp_path_factory):
    """CANN's runtime headers, as the torch-npu wheel carries them; never part of this project."""
    directory = tmp_path_factory.mktemp("torch_npu")
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
         "--python-version=3.11", "--platform=manylinux_2_17_x86_64",
         "--dest", str(directory), "torch-npu==2.5.1"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    wheels = list(directory.glob("*.whl"))
    if not wheels:
        pytest.skip(f"cannot fetch torch-npu 2.5.1 from the package index: {result.stderr[-300:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [n for n in wheel.namelist() if "third_party/acl/inc/" in n]
        wheel.extractall(directory, names)
    (include,) = directory.glob("**/third_party/acl/inc")
    return include


def test_the_declarations_are_canns(cann_headers, tmp_path):
    compile_cc(tmp_path / "abi.o", [HERE / "abi_test.cc"], "-c", "-isystem", str(cann_headers))


@pytest.mark.parametrize(
    ("ours", "other"),
    [
        ("(int32_t device)", "(int64_t device)"),
        ("size_t size, aclrtMemMallocPolicy policy", "aclrtMemMallocPolicy policy, size_t size"),
        ("F(aclError, aclrtFreeHost,", "F(void, aclrtFreeHost,"),
        ("ACL_BF16 = 27", "ACL_BF16 = 26"),
        ("ACL_MEMCPY_HOST_TO_DEVICE = 1", "ACL_MEMCPY_HOST_TO_DEVICE = 2"),
        ("ACL_ERROR_REPEAT_INITIALIZE = 100002", "ACL_ERROR_REPEAT_INITIALIZE = 100003"),
    ],
)  # fmt: skip
def test_another_declaration_would_be_noticed(cann_headers, tmp_path, ours, other):
    header = (CC / "ascend" / "acl_abi.h").read_text()
    assert ours in header
    (tmp_path / "ascend").mkdir()
    (tmp_path / "ascend" / "acl_abi.h").write_text(header.replace(ours, other))
    with pytest.raises(AssertionError, match="static assertion failed"):
        compile_cc(
            tmp_path / "abi.o", [HERE / "abi_test.cc"], f"-iquote{tmp_path}", "-c",
            "-isystem", str(cann_headers),
        )  # fmt: skip
