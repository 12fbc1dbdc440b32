"""What cc/ascend declares of CANN's interface is what the torch-npu wheel says of it.

The wheel carries the headers of CANN's runtime; a header with the types of the functions that make
tensors and lists of integers; and a library that calls the operators. No header declares those, but
the library's type names tell which arguments it hands to each operator, in what order. The wheel is
fetched, and never part of this project.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import zipfile

import pytest
from ascend.standin import CC, HERE, compile_cc

WHEEL = "2.9.0.post9"
CREATORS = "aclCreateTensor|aclCreateIntArray|aclDestroyTensor|aclDestroyIntArray"
OPERATORS = {
    "compress_abi.h": "aclnnNsaCompressWithCache",
    "compress_attention_abi.h": "aclnnNsaCompressAttentionInfer",
    "select_attention_abi.h": "aclnnNsaSelectedAttentionInfer",
}


@pytest.fixture(scope="session")
def torch_npu(tmp_path_factory):
    """A directory with what is needed of the wheel."""
    directory = tmp_path_factory.mktemp("torch_npu")
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
         "--python-version=3.11", "--platform=manylinux_2_28_x86_64",
         "--dest", str(directory), f"torch-npu=={WHEEL}"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    wheels = list(directory.glob("*.whl"))
    if not wheels:
        pytest.skip(
            f"cannot fetch torch-npu {WHEEL} from the package index: {result.stderr[-300:]}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        for name in wheel.namelist():
            if "third_party/acl/inc/" in name or name.endswith("/op_api_common_base.h"):
                wheel.extract(name, directory)
        library = wheel.read("torch_npu/lib/libtorch_npu.so")
    (base,) = directory.glob("**/op_api_common_base.h")
    types = re.findall(
        rf"typedef struct \w+ \w+;|typedef [^;]*\(\*_(?:{CREATORS})\)[^;]*;", base.read_text()
    )
    (directory / "tensor_types.h").write_text("\n".join(['#include "acl/acl.h"', *types]))
    (directory / "calls.txt").write_text("\n".join(sorted(calls_of_operators(library))))
    return directory


def calls_of_operators(library: bytes) -> set[str]:
    """The kinds of arguments of each way in which a library calls operators of CANN."""
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_char_p
    calls = set()
    for name in set(re.findall(rb"\0\*?(Z9hit_cacheI\w+)\0", library)):
        text = demangle(name, None, None, None).decode()
        arguments = re.search(r"hit_cache<(.*)>\(void\*", text)
        assert arguments is not None, text
        calls.add(" ".join(kind(argument) for argument in split(arguments[1])))
    return calls


def split(arguments: str) -> list[str]:
    """Arguments of a template, apart."""
    depth, parts = 0, [""]
    for character in arguments:
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def kind(cpp: str) -> str:
    """What CANN gets for an argument of torch_npu's, or what our declaration says it gets."""
    for name, pattern in {
        "integers": r"ArrayRef<long>|aclIntArray",
        "tensor": r"at::Tensor|aclTensor",
        "string": r"char",
        "integer": r"\blong\b|int64_t",
        "real": r"\bdouble\b",
    }.items():
        if re.search(pattern, cpp):
            return name
    return cpp.strip().replace(" ", "_")


def declared(header: str, operator: str) -> str:
    """The kinds of arguments that our declaration of an operator's first phase has."""
    found = re.search(rf"{operator}GetWorkspaceSize, \((.*?)\)\)", on_one_line(header))
    assert found is not None
    *arguments, size, executor = found[1].split(",")
    assert "uint64_t* workspace_size" in size
    assert "aclOpExecutor** executor" in executor
    return " ".join(map(kind, arguments))


def on_one_line(header: str) -> str:
    """A header with the lines of its macros joined."""
    return re.sub(r"\s*\\\s*", " ", header)


def test_runtime_and_tensors(torch_npu, tmp_path):
    compile_abi_test(torch_npu, tmp_path)


@pytest.mark.parametrize(
    ("ours", "other"),
    [
        ("(int32_t device)", "(int64_t device)"),
        ("size_t size, aclrtMemMallocPolicy policy", "aclrtMemMallocPolicy policy, size_t size"),
        ("F(aclError, aclrtFreeHost,", "F(void, aclrtFreeHost,"),
        ("(const int64_t* values, uint64_t size)", "(const int32_t* values, uint64_t size)"),
        ("aclDestroyTensor, (const aclTensor*", "aclDestroyTensor, (const aclIntArray*"),
        ("ACL_BF16 = 27", "ACL_BF16 = 26"),
        ("ACL_MEMCPY_HOST_TO_DEVICE = 1", "ACL_MEMCPY_HOST_TO_DEVICE = 2"),
        ("ACL_ERROR_REPEAT_INITIALIZE = 100002", "ACL_ERROR_REPEAT_INITIALIZE = 100003"),
    ],
)  # fmt: skip
def test_another_declaration_would_be_noticed(torch_npu, tmp_path, ours, other):
    header = (CC / "ascend" / "acl_abi.h").read_text()
    assert ours in header
    (tmp_path / "ascend").mkdir()
    (tmp_path / "ascend" / "acl_abi.h").write_text(header.replace(ours, other))
    with pytest.raises(AssertionError, match="static assertion failed"):
        compile_abi_test(torch_npu, tmp_path, f"-iquote{tmp_path}")


def compile_abi_test(torch_npu, tmp_path, *options):
    (include,) = torch_npu.glob("**/third_party/acl/inc")
    compile_cc(
        tmp_path / "abi.o", [HERE / "abi_test.cc"], *options, "-c",
        "-isystem", str(include), "-isystem", str(torch_npu),
    )  # fmt: skip


@pytest.mark.parametrize("header", OPERATORS)
def test_operators(torch_npu, header):
    calls = (torch_npu / "calls.txt").read_text().splitlines()
    text = (CC / "ascend" / header).read_text()
    assert declared(text, OPERATORS[header]) in calls


@pytest.mark.parametrize(
    ("header", "ours", "other"),
    [
        ("compress_abi.h", "const aclIntArray* actual_seq_len, const aclTensor* block_table",
         "const aclTensor* block_table, const aclIntArray* actual_seq_len"),
        ("compress_attention_abi.h", "double scale_value, char* layout",
         "char* layout, double scale_value"),
        ("select_attention_abi.h", "double scale_value, int64_t sparse_mode",
         "int64_t sparse_mode, double scale_value"),
    ],
)  # fmt: skip
def test_another_order_would_be_noticed(torch_npu, header, ours, other):
    calls = (torch_npu / "calls.txt").read_text().splitlines()
    text = on_one_line((CC / "ascend" / header).read_text())
    assert ours in text
    assert declared(text.replace(ours, other), OPERATORS[header]) not in calls
