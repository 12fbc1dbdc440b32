"""The Ascend route's C++ under sanitizers, and on other processors."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from ascend.standin import CC, HERE, INCLUDES, build, compile_cc, compiler

SOURCES = [
    *sorted((CC / "ascend").glob("*.cc")),
    *sorted({*CC.glob("*.cc")} - {CC / "module.cc"}),  # all but what Python sees of them
]


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_have_no_complaint(tmp_path, sanitizers):
    """JAX_NSA_SOAK_CALLS sets the calls: a few by default, 10000 to be sure."""
    calls = os.environ.get("JAX_NSA_SOAK_CALLS", "400")
    options = f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g", "-O0"
    skip_without(sanitizers, tmp_path)
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


def skip_without(sanitizers, tmp_path):
    """Skips the test where a program that does nothing neither builds nor runs under them."""
    source, program = tmp_path / "nothing.cc", tmp_path / "nothing"
    source.write_text("int main() {}")
    for command in ([compiler(), f"-fsanitize={sanitizers}", source, "-o", program], [program]):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            pytest.skip(
                f"needs a compiler whose sanitizers ({sanitizers}) work here, as those of Debian's "
                f"g++ do: {result.stderr[-300:]}"
            )


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
