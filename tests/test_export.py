"""Ahead-of-time compilation and jax.export, also from the oldest JAX to the newest."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention.problems import Geometry, build

import jax_nsa
from jax_nsa.compress.window import completed_window, gather_window, window_slots

GEOMETRY = Geometry(lengths=(60, 17, 33), head_size=16, value_size=8, hostile=False)
NAMES = ("query", "key", "value", "block_table", "actual_cmp_seq_kvlen")

# This interpreter, and others with a jax_nsa of their own, to show that programs outlive a JAX.
INTERPRETERS = [sys.executable, *os.environ.get("JAX_NSA_OTHER_PYTHON", "").split(os.pathsep)]
INTERPRETERS = [name for name in INTERPRETERS if name]

RUN_EXPORTED = """
import sys
import jax, jax.export, jax_nsa, numpy as np
with open(sys.argv[1], "rb") as file:
    exported = jax.export.deserialize(file.read())
arrays = np.load(sys.argv[2])
results = exported.call(*[arrays[n] for n in {names}])
np.savez(sys.argv[3], *map(np.asarray, results))
"""


def operator(implementation=None):
    arguments = build(GEOMETRY)
    arrays = [jnp.asarray(arguments.pop(n)) for n in NAMES]

    def call(*arrays):
        return jax_nsa.nsa_compress_attention_infer(
            **arguments, **dict(zip(NAMES, arrays, strict=True)), implementation=implementation
        )

    return call, arrays


def export(call, *arguments, **options):
    checks = jax_nsa.export_disabled_checks()
    return jax.export.export(jax.jit(call), disabled_checks=checks, **options)(*arguments)


def assert_same(results, expected):
    for result, want in zip(results, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(result), np.asarray(want))


def test_ahead_of_time():
    call, arrays = operator()
    compiled = jax.jit(call).lower(*arrays).compile()
    assert_same(compiled(*arrays), call(*arrays))


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_round_trip(implementation):
    call, arrays = operator(implementation)
    blob = export(call, *arrays).serialize()
    assert_same(jax.export.deserialize(blob).call(*arrays), call(*arrays))


def test_the_kernel_needs_the_disabled_checks():
    call, arrays = operator("cpu")
    with pytest.raises(ValueError, match="jax_nsa_compress_attention_cpu"):
        jax.export.export(jax.jit(call))(*arrays)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_symbolic_batch(implementation):
    call, arrays = operator(implementation)
    (b,) = jax.export.symbolic_shape("b")
    shapes = [
        jax.ShapeDtypeStruct(a.shape if n in ("key", "value") else (b, *a.shape[1:]), a.dtype)
        for n, a in zip(NAMES, arrays, strict=True)
    ]
    exported = jax.export.deserialize(export(call, *shapes).serialize())
    for size in (1, 3):
        batch = [
            a if n in ("key", "value") else a[:size] for n, a in zip(NAMES, arrays, strict=True)
        ]
        assert_same(exported.call(*batch), call(*batch))


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_symbolic_tokens(implementation):
    """Ragged tokens of a symbolic number, of sequences of a symbolic number."""
    arguments = build(dataclasses.replace(GEOMETRY, token_counts=(2, 0, 3)))
    names = (*NAMES, "actual_seq_qlen")
    arrays = [jnp.asarray(arguments.pop(n)) for n in names]

    def call(*arrays):
        return jax_nsa.nsa_compress_attention_infer(
            **arguments, **dict(zip(names, arrays, strict=True)), implementation=implementation
        )

    t, b = jax.export.symbolic_shape("t, b")
    leading = {"query": t, "block_table": b, "actual_cmp_seq_kvlen": b, "actual_seq_qlen": b}
    shapes = [
        jax.ShapeDtypeStruct((leading.get(n, a.shape[0]), *a.shape[1:]), a.dtype)
        for n, a in zip(names, arrays, strict=True)
    ]
    exported = jax.export.deserialize(export(call, *shapes).serialize())
    assert_same(exported.call(*arrays), call(*arrays))


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("counted", [False, True])
def test_symbolic_pages_of_a_table_that_is_known(implementation, counted):
    """How many pages there are only the program knows, and so which ids are bad."""
    (pages,) = jax.export.symbolic_shape("pages")
    known = {
        "block_table": [[0, 1], [2, 3]], "actual_seq_kvlen": [20, 32],
        "actual_seq_qlen": [1, 1] if counted else None,
    }  # fmt: skip
    query = jnp.ones((2, 2, 16))

    def step(pool):
        return (
            jax_nsa.nsa_window_attention_infer(
                query, pool, pool, 1.0, 2, 2, 20, 16, layout="TND", implementation=implementation,
                **known,
            ),
            jax_nsa.nsa_select_attention_infer(
                query, pool, pool, [[[0], [1]]] * 2, 1.0, 2, 2, 16, 1, 16, layout="TND",
                window_size=5, implementation=implementation, **known,
            ),
        )  # fmt: skip

    exported = jax.export.export(jax.jit(step), disabled_checks=jax_nsa.export_disabled_checks())(
        jax.ShapeDtypeStruct((pages, 16, 32), jnp.float32)
    )
    pool = jax.random.normal(jax.random.key(0), (5, 16, 32))
    jax.tree.map(np.testing.assert_array_equal, exported.call(pool), jax.jit(step)(pool))


def test_windows_of_symbolic_sequences():
    (b,) = jax.export.symbolic_shape("b")

    def step(pool, table, lengths):
        window = completed_window(lengths, compress_block_size=16, compress_stride=16)
        of_tokens = {"key_value_head_num": 1, "compress_block_size": 16}
        return (
            window_slots(window, table, page_block_size=16),
            gather_window(pool, table, window, **of_tokens),
        )

    arrays = jnp.ones((4, 16, 3)), jnp.array([[0, 1], [2, 3]]), jnp.array([16, 5])
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    shapes[1:] = [jax.ShapeDtypeStruct((b, *s.shape[1:]), s.dtype) for s in shapes[1:]]
    exported = jax.export.export(jax.jit(step))(*shapes)
    jax.tree.map(np.testing.assert_array_equal, exported.call(*arrays), step(*arrays))


def test_several_platforms_in_one_artefact():
    call, arrays = operator()
    exported = export(call, *arrays, platforms=("cpu", "cuda"))
    assert exported.platforms == ("cpu", "cuda")
    assert "jax_nsa_compress_attention_cpu" in exported.mlir_module()
    assert_same(jax.export.deserialize(exported.serialize()).call(*arrays), call(*arrays))


@pytest.mark.parametrize("interpreter", INTERPRETERS)
def test_another_process_runs_it(interpreter, tmp_path):
    call, arrays = operator("cpu")
    (tmp_path / "program").write_bytes(export(call, *arrays).serialize())
    np.savez(tmp_path / "arrays.npz", **dict(zip(NAMES, map(np.asarray, arrays), strict=True)))
    script = RUN_EXPORTED.format(names=NAMES)
    paths = [str(tmp_path / n) for n in ("program", "arrays.npz", "results.npz")]
    # Another XLA may not know this one's flags.
    environment = {n: v for n, v in os.environ.items() if n != "XLA_FLAGS"}
    subprocess.run(
        [interpreter, "-c", script, *paths], check=True, timeout=120, cwd=tmp_path, env=environment
    )
    with np.load(tmp_path / "results.npz") as results:
        assert_same([results[n] for n in results.files], call(*arrays))
