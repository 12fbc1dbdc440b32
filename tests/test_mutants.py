"""The mutator changes what it says, in either language, and nothing else."""

from __future__ import annotations

import pytest
from mutation import mutants


def changed(path, source):
    return {mutant.apply(source) for mutant in mutants.of(path, source)}


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("some.cc", "return a % b + c;\n", {"return a / b + c;\n", "return a % b - c;\n"}),
        ("some.py", "x = a % b + c\n", {"x = a // b + c\n", "x = a % b - c\n"}),
        ("some.cc", "f(a);  // a + 1\n", set()),
        ("some.py", "f = a  # a + 1\n", set()),
        ("some.cc", "  if (a < 7) return b;\n", {
            "  if (a <= 7) return b;\n", "  if (a < 8) return b;\n", "  ;\n",
        }),
        ("some.py", "x = min(a, y=b)\n", {"x = max(a, y=b)\n", "x = min(a, )\n"}),
    ],
)  # fmt: skip
def test_changes(path, source, expected):
    assert changed(path, source) == expected
