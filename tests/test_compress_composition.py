"""Compression into the cache under sharding, differentiation and export."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from compress.calls import copies
from compress.problems import CACHES, Geometry, build
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_nsa
from jax_nsa import native, nsa_compress_infer

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
GEOMETRY = Geometry(heads=4, head_sizes=(6, 3), hostile=False)
FLOATS = ("input", "weight", "cache", "bias")
# How heads lie in the operands: input is [pages, page, N * D].
BY_HEADS = {
    "input": P(None, None, "x"), "weight": P(None, "x"), "cache": P(None, "x"), "bias": P("x"),
}  # fmt: skip


@pytest.fixture(params=["reference", "cpu"])
def implementation(request):
    reason = native.unavailable("cpu", "compress")
    if request.param == "cpu" and reason is not None:
        pytest.skip(reason)
    return request.param


def operator(geometry, implementation):
    """The operator as a function of its arrays, and those arrays."""
    arguments = build(geometry)
    static = {n: v for n, v in arguments.items() if isinstance(v, int)}
    arrays = {
        n: jax.tree.map(jnp.asarray, v) for n, v in arguments.items() if not isinstance(v, int)
    }

    def call(arrays):
        return nsa_compress_infer(**static, **arrays, implementation=implementation)

    return call, arrays


def assert_same(results, expected):
    for result, want in zip(results, expected, strict=True):
        assert result.dtype == want.dtype
        np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-5)


def put(mesh, arrays, specs):
    return {
        n: jax.tree.map(lambda a, n=n: jax.device_put(a, NamedSharding(mesh, specs.get(n, P()))), v)
        for n, v in arrays.items()
    }


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("devices", [2, 4])
def test_heads_split_without_a_collective(implementation, axis_type, devices):
    call, arrays = operator(GEOMETRY, implementation)
    expected = call(arrays)
    mesh = jax.make_mesh((devices,), ("x",), (axis_type,), devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        placed = put(mesh, arrays, BY_HEADS)
        compiled = jax.jit(call).lower(placed).compile()
        results = compiled(placed)
    for result in results:
        assert result.sharding.spec[:2] == (None, "x")
    text = compiled.as_text()
    assert not [name for name in COLLECTIVES if re.search(rf"\b{name}", text)]
    assert_same(results, expected)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("cache", CACHES)
def test_a_donated_cache_that_is_split_is_not_copied(implementation, cache, axis_type):
    call, arrays = operator(replace(GEOMETRY, cache=cache), implementation)
    expected = call(arrays)
    by_heads = BY_HEADS | {"cache": P(None, "x") if cache == "rows" else P(None, None, "x")}
    mesh = jax.make_mesh((2,), ("x",), (axis_type,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        placed = put(mesh, arrays, by_heads)
        caches = placed.pop("cache")
        run = jax.jit(lambda cache, rest: call(rest | {"cache": cache}), donate_argnums=0)
        compiled = run.lower(caches, placed).compile()
        assert copies(compiled, {c.size // 2 for c in caches}) == []
        assert compiled.memory_analysis().alias_size_in_bytes >= sum(c.nbytes // 2 for c in caches)
        assert_same(compiled(caches, placed), expected)


def test_sequences_that_are_split_are_gathered(implementation):
    call, arrays = operator(GEOMETRY, implementation)
    expected = call(arrays)
    mesh = jax.make_mesh((4,), ("x",), (AxisType.Auto,))
    specs = dict.fromkeys(("block_table", "actual_seq_len", "slot_mapping"), P("x"))
    with jax.set_mesh(mesh):
        assert_same(jax.jit(call)(put(mesh, arrays, specs)), expected)


def test_sequences_that_are_split_are_refused_on_an_explicit_mesh():
    call, arrays = operator(GEOMETRY, "reference")
    mesh = jax.make_mesh((4,), ("x",), (AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = put(mesh, arrays, {"slot_mapping": P("x")})
        with pytest.raises(ValueError, match="slot_mapping is sharded as"):
            jax.jit(call)(placed)


def test_a_cache_for_each_device(implementation):
    """Under shard_map each device writes its own sequences into its own cache."""
    geometries = [Geometry(heads=2, hostile=False, seed=seed) for seed in range(4)]
    calls = [operator(g, implementation) for g in geometries]
    call = calls[0][0]
    expected = [c(arrays | {n: calls[0][1][n] for n in ("weight", "bias")}) for c, arrays in calls]
    shared = {n: calls[0][1][n] for n in ("weight", "bias")}
    split = {
        n: jnp.concatenate([arrays[n] for _, arrays in calls])
        for n in calls[0][1]
        if n not in shared
    }
    mesh = jax.make_mesh((4,), ("x",), (AxisType.Auto,))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))
    def run(split, shared):
        return call({**split, **shared})

    result = run(split, shared)
    np.testing.assert_allclose(result, jnp.concatenate(expected), rtol=1e-5, atol=1e-5)


def test_derivatives():
    """What is written depends on input, weight and bias; the rows that stay, on the cache."""
    call, arrays = operator(GEOMETRY, "reference")
    floats = {n: arrays[n] for n in FLOATS}
    rest = {n: v for n, v in arrays.items() if n not in FLOATS}

    def loss(floats):
        return sum(jnp.sum(jnp.sin(c)) for c in call({**floats, **rest}))

    gradient = jax.grad(loss)(floats)
    random = np.random.default_rng(0)
    step = jax.tree.map(lambda a: random.standard_normal(a.shape).astype(np.float32), floats)
    size = 1e-2
    plus, minus = (
        loss(jax.tree.map(lambda a, s, sign=sign: a + sign * size * s, floats, step))
        for sign in (1, -1)
    )
    slope = sum(
        jnp.vdot(g, s)
        for g, s in zip(jax.tree.leaves(gradient), jax.tree.leaves(step), strict=True)
    )
    np.testing.assert_allclose((plus - minus) / (2 * size), slope, rtol=2e-2)
    assert all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(gradient))


def test_derivatives_of_what_holds_garbage():
    call, arrays = operator(Geometry(lengths=(48, 47, 31)), "reference")

    def loss(weight):
        written = arrays["slot_mapping"][0]
        return jnp.sum(call({**arrays, "weight": weight})[written])

    assert np.all(np.isfinite(jax.grad(loss)(arrays["weight"])))


def test_kernels_have_no_derivative():
    call, arrays = operator(GEOMETRY, "cpu")

    def loss(weight):
        return jnp.sum(call({**arrays, "weight": weight})[0])

    with pytest.raises(NotImplementedError, match="nsa_compress_infer is an inference operator"):
        jax.grad(loss)(arrays["weight"])


def test_export(implementation):
    call, arrays = operator(GEOMETRY, implementation)
    checks = jax_nsa.export_disabled_checks()
    exported = jax.export.export(jax.jit(call), disabled_checks=checks)(arrays)
    blob = exported.serialize()
    assert_same(jax.export.deserialize(blob).call(arrays), call(arrays))


def test_export_of_any_number_of_sequences(implementation):
    call, arrays = operator(Geometry(hostile=False), implementation)
    (sequences,) = jax.export.symbolic_shape("b")
    by_sequence = ("block_table", "actual_seq_len", "slot_mapping")
    shapes = {
        n: jax.ShapeDtypeStruct((sequences, *v.shape[1:]) if n in by_sequence else v.shape, v.dtype)
        for n, v in arrays.items()
    }
    checks = jax_nsa.export_disabled_checks()
    exported = jax.export.export(jax.jit(call), disabled_checks=checks)(shapes)
    for count in (1, 3):
        fewer = {n: v[:count] if n in by_sequence else v for n, v in arrays.items()}
        assert_same([exported.call(fewer)], [call(fewer)])
