"""Where the CPU's kernels are not compiled, their tests are skipped and say why."""

from __future__ import annotations

import pytest

from jax_nsa import native


def need_cpu(*operators: str) -> pytest.MarkDecorator:
    """The mark of tests that call the CPU's kernels of these operators, by their targets."""
    missing = [reason for o in operators if (reason := native.unavailable("cpu", o)) is not None]
    return pytest.mark.skipif(bool(missing), reason="; ".join(missing))


def cpu_or_reference(*operators: str) -> list:
    """Implementations to parametrise tests with that call these operators."""
    return ["reference", pytest.param("cpu", marks=need_cpu(*operators))]
