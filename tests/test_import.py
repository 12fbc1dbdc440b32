"""What `import jax_nsa` loads, and how the rest of the package is found."""

import ast
import importlib
import inspect
import subprocess
import sys

import pytest

import jax_nsa


def loaded_by(code):
    """The modules that some code loads beyond jax."""
    program = (
        f"import jax, sys; before = set(sys.modules); {code}; print(*set(sys.modules) - before)"
    )
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()


def test_import_is_light():
    """What is exported is loaded when it is first named; all of Pallas would cost more."""
    assert set(loaded_by("import jax_nsa")) <= {
        "jax_nsa", "jax_nsa.native", "jax_nsa._native", "jax_nsa.axes", "atexit", "pkgutil",
    }  # fmt: skip
    everything = loaded_by("from jax_nsa import *")
    assert {"jax_nsa.step", "jax_nsa.training"} <= set(everything)
    assert not [name for name in everything if "pallas" in name]


def test_exports_are_found_where_type_checkers_find_them():
    [lazily] = [n for n in ast.parse(inspect.getsource(jax_nsa)).body if isinstance(n, ast.If)]
    told = {name.name: node.module for node in lazily.body for name in node.names}
    assert told == {name: f"jax_nsa.{home}" for name, home in jax_nsa._HOMES.items()}
    assert {*told, "export_disabled_checks"} == set(jax_nsa.__all__) <= set(dir(jax_nsa))
    for name, home in told.items():
        assert getattr(jax_nsa, name) is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match="no attribute 'nsa_decode'"):
        jax_nsa.nsa_decode  # noqa: B018
    assert not hasattr(jax_nsa, "no.module")


def test_modules_are_attributes_though_nobody_imported_them():
    told = subprocess.run(
        [sys.executable, "-c", "import jax_nsa; print(jax_nsa.blocks.__name__)"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert told.stdout.strip() == "jax_nsa.blocks"


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-p", "no:cacheprovider"]))
