"""Runs scripts in processes of their own, where CANN has not been looked for yet."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import textwrap

from ascend.standin import StandIn

TESTS = pathlib.Path(__file__).parent.parent


def run_alone(standin: StandIn, script: str, **environment: object) -> subprocess.CompletedProcess:
    """Runs a script in a fresh process, with the stand-in only where `environment` says so."""
    prelude = f"""
        import ctypes, pathlib, sys
        sys.path[:0] = {[str(TESTS), *sys.path]!r}
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
