"""Several processes, each with devices of its own, compute what one does."""

from __future__ import annotations

import pathlib
import socket
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).parents[1] / "examples" / "multi_process.py"


@pytest.mark.timeout(240)
def test_two_processes_agree_with_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, str(PROGRAM), "--coordinator", coordinator, "--processes", "2"]
    processes = [
        subprocess.Popen(
            [*command, "--process", str(i), "--cpu-devices", "2"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        for road in ("batch and heads", "context"):
            assert f"{road}: agrees with one device" in output
