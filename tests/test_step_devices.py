"""The step differentiated, exported, and on several devices."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from step.calls import TOKENS, USUAL, step_of
from step.problems import Step, arguments_of

from jax_nsa import (
    PagedKV,
    export_disabled_checks,
)


def test_gradient_is_that_of_the_composition():
    arguments = arguments_of(Step(replace(USUAL.original, hostile=False)))
    run, arrays = step_of(arguments, "reference")
    separate, more = step_of(arguments | {"window": arguments["selected"]}, "reference")

    def loss(f, *arrays):
        return (f(*arrays)[0] ** 2).sum()

    together = jax.grad(functools.partial(loss, run), argnums=(0, 1))(*arrays)
    apart = jax.grad(functools.partial(loss, separate), argnums=(0, 1))(*more)
    for gradient, right in zip(together, apart, strict=True):
        assert np.any(np.asarray(gradient))
        np.testing.assert_allclose(gradient, right, rtol=1e-4, atol=1e-6)
    small = 1e-2
    direction = jnp.ones_like(arrays[1])
    moved = [loss(run, arrays[0], arrays[1] + s * small, *arrays[2:]) for s in (1, -1)]
    slope = float((moved[0] - moved[1]) / (2 * small))
    assert slope == pytest.approx(float(jnp.vdot(together[1], direction)), rel=1e-2)


@pytest.mark.parametrize("cache", [2, 3], ids=["compressed", "selected"])
def test_gradient_where_values_are_zero(cache):
    """Attention is linear in the values, so a step of any size along the gradient is exact."""
    arguments = arguments_of(Step(replace(USUAL.original, hostile=False)))
    run, arrays = step_of(arguments, "reference")
    zero = [
        replace(a, value=jnp.zeros_like(a.value)) if isinstance(a, PagedKV) else a for a in arrays
    ]

    def loss(value):
        return run(*zero[:cache], replace(zero[cache], value=value), *zero[cache + 1 :])[0].sum()

    value = jnp.nan_to_num(arrays[cache].value)
    gradient = jax.grad(loss)(zero[cache].value)
    moved = float(loss(value))
    assert abs(moved) > 0.1
    assert float(jnp.vdot(gradient, value)) == pytest.approx(moved, rel=1e-4)


SHARDINGS = {
    "sequences": {"query": ("x",), "gates": ("x",), "cache": ((), (), ("x",), ("x",))},
    "heads": {
        "query": (None, None, "x"), "gates": (None, None, "x"),
        "cache": ((None, None, "x"), (None, None, "x"), (), ()),
    },
    "heads, gates whole": {
        "query": (None, None, "x"), "gates": (),
        "cache": ((None, None, "x"), (None, None, "x"), (), ()),
    },
}  # fmt: skip


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("split", SHARDINGS)
def test_devices_share_a_step(split, axis, implementation):
    arguments = arguments_of(Step(replace(USUAL.original, layout="BSND", tokens=2, hostile=False)))
    run, arrays = step_of(arguments, implementation)
    truth = jax.jit(run)(*arrays)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(axis,), devices=jax.devices()[:2])
    specs = SHARDINGS[split]

    def put(array, spec):
        return jax.device_put(array, NamedSharding(mesh, P(*spec)))

    query, gates, *caches = arrays
    placed = [
        put(query, specs["query"]),
        put(gates, specs["gates"]),
        *(PagedKV(*map(put, (c.key, c.value, c.block_table, c.lengths), specs["cache"]))
          for c in caches),
    ]  # fmt: skip
    with jax.set_mesh(mesh):
        results = jax.jit(run)(*placed)
    for result, right in zip(results, truth, strict=True):
        np.testing.assert_allclose(result, right, rtol=1e-5, atol=1e-6)
    assert tuple(results[0].sharding.spec)[: len(specs["query"])] == specs["query"]


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_axis_of_one_device(axis):
    """Heads of which there is one, split over it, are whole: the chosen blocks are handed on so."""
    arguments = arguments_of(Step(replace(USUAL.original, key_value_heads=1, hostile=False)))
    run, (query, gates, *caches) = step_of(arguments, None)
    truth = jax.jit(run)(query, gates, *caches)
    mesh = jax.make_mesh((2, 1), ("b", "h"), (axis,) * 2, devices=jax.devices()[:2])
    cache = PagedKV(P(None, None, "h"), P(None, None, "h"), P("b"), P("b"))
    specs = (P("b", "h"), P("b", "h"), *[cache] * len(caches))
    placed = jax.tree.map(
        lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec)),
        (query, gates, *caches), specs,
    )  # fmt: skip
    with jax.set_mesh(mesh):
        results = jax.jit(run)(*placed)
    for result, right in zip(results, truth, strict=True):
        np.testing.assert_allclose(result, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cache", [(), (None, None, "h")])
def test_gradient_on_an_explicit_mesh(cache):
    """Of parts whose operands are split as query, whole, or lost the mesh axis of one device."""
    arguments = arguments_of(Step(replace(USUAL.original, key_value_heads=1, hostile=False)))
    run, arrays = step_of(arguments, "reference")

    def gradient(query, *others):
        return jax.grad(lambda q: (run(q, *others)[0] ** 2).sum())(query)

    truth = jax.jit(gradient)(*arrays)
    mesh = jax.make_mesh((2, 1), ("b", "h"), (AxisType.Explicit,) * 2, devices=jax.devices()[:2])
    table = ("b",) if cache else ()
    caches = PagedKV(P(*cache), P(*cache), P(*table), P(*table))
    placed = jax.tree.map(
        lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec)),
        tuple(arrays), (P("b", "h"), P("b", "h"), caches, caches),
    )  # fmt: skip
    with jax.set_mesh(mesh):
        result = jax.jit(gradient)(*placed)
    np.testing.assert_allclose(result, truth, rtol=1e-4, atol=1e-6)


def test_caches_split_over_positions():
    """Each device holds the pages of its columns of every block table."""
    original = replace(
        USUAL.original, lengths=(128, 100), layout="BSND", tokens=2, page=32, spare_slots=0,
        hostile=False,
    )  # fmt: skip
    step = Step(original, compressed_page=16)
    arguments = arguments_of(step)
    run, (query, gates, compressed, selected) = step_of(arguments, "reference")
    truth = run(query, gates, compressed, selected)
    run, _ = step_of(arguments, "reference", context_axis="x")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    odd = compressed.block_table.shape[1] % 2
    compressed = replace(
        compressed, block_table=jnp.pad(compressed.block_table, ((0, 0), (0, odd)))
    )
    cache = PagedKV(P(), P(), P(None, "x"), P())
    results = jax.shard_map(
        run, mesh=mesh, in_specs=(P(), P(), cache, cache), out_specs=(P(), P())
    )(query, gates, compressed, selected)
    np.testing.assert_array_equal(results[1], truth[1])
    np.testing.assert_allclose(results[0], truth[0], rtol=1e-5, atol=1e-6)


def test_export():
    arguments = arguments_of(TOKENS)
    run, arrays = step_of(arguments, None)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    # The caches as their arrays: an exported program knows no classes of ours.
    caches = [(c.key, c.value, c.block_table, c.lengths) for c in shapes[2:]]
    exported = jax.export.export(
        jax.jit(lambda q, g, *caches: run(q, g, *(PagedKV(*c) for c in caches))),
        disabled_checks=export_disabled_checks(),
    )(*shapes[:2], *caches)
    again = jax.export.deserialize(exported.serialize())
    given = [(c.key, c.value, c.block_table, c.lengths) for c in arrays[2:]]
    for result, right in zip(again.call(*arrays[:2], *given), run(*arrays), strict=True):
        np.testing.assert_array_equal(result, right)
