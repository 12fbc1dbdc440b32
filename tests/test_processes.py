"""Several processes, each with devices of its own, compute what one does."""

from __future__ import annotations

import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

HERE = pathlib.Path(__file__).parent


def run_two(command: Callable[[str, int], list[str]]) -> list[str]:
    """What two processes print, each started by `command(coordinator, its number)`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, *command(coordinator, i)],
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
    return outputs


@pytest.mark.timeout(240)
def test_compressed_attention():
    program = HERE.parent / "examples" / "multi_process.py"
    outputs = run_two(
        lambda coordinator, i: [
            str(program), "--coordinator", coordinator, "--processes", "2", "--process", str(i),
            "--cpu-devices", "2",
        ]
    )  # fmt: skip
    for output in outputs:
        for road in ("batch and heads", "context"):
            assert f"{road}: agrees with one device" in output


@pytest.mark.timeout(240)
def test_selected_attention_and_the_whole_step():
    program = HERE / "process_program.py"
    for output in run_two(lambda coordinator, i: [str(program), coordinator, "2", str(i)]):
        for operator in ("selected", "step"):
            for split in ("batch and heads", "context"):
                assert f"{operator} by {split}: agrees with one device" in output
