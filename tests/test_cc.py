"""The C++ tests of tests/cc, built by CMake once for all of pytest's workers."""

from __future__ import annotations

import fcntl
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

SOURCE = pathlib.Path(__file__).parent / "cc"
TESTS = sorted(path.stem for path in SOURCE.glob("*_test.cc"))
# As pip has them, also where the virtual environment is not activated.
SEARCHED = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
REMEDIES = {"cmake": "pip install cmake", "ninja": "pip install ninja"}


def run(*command: str | pathlib.Path) -> None:
    """Runs a command, whose output is the message where it fails."""
    done = subprocess.run(
        command, env=os.environ | {"PATH": SEARCHED}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}"


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The directory of the built tests. CMAKE_ARGS adds options, as in the module's own build."""
    for tool, remedy in REMEDIES.items():
        if shutil.which(tool, path=SEARCHED) is None:
            pytest.skip(f"{tool} is not here: {remedy}")
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    if not any(shutil.which(shlex.split(c)[0], path=SEARCHED) for c in compilers):
        pytest.skip(
            f"no C++17 compiler among {', '.join(compilers)}: install one, or name it by CXX"
        )
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # whose parent all workers share
        shared = shared.parent
    build = shared / "cc"
    with open(shared / "cc.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # To build again what another worker has built takes a moment.
        options = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        run("cmake", "-S", SOURCE, "-B", build, "-G", "Ninja", *options)
        run("cmake", "--build", build)
    return build


@pytest.mark.parametrize("name", TESTS)
def test_cc(programs: pathlib.Path, name: str) -> None:
    run(programs / name)
