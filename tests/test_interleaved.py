"""Pools that hold keys and values in turn: the contracts again, transformations, and misuse."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import select_attention.problems as select_problems
from compress_attention.contract import CompressAttentionContract
from compress_attention.problems import Geometry, build
from interleaved.pools import Interleaved, assert_same, interleave, interleaved
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kernels import cpu_or_reference, need_cpu
from select_attention.contract import SelectAttentionContract
from step.problems import Step, arguments_of

from jax_nsa import (
    PagedKV,
    export_disabled_checks,
    nsa_compress_attention_infer,
    nsa_decode_step,
    nsa_select_attention_infer,
    nsa_window_attention_infer,
)

needs_cpu_kernels = need_cpu("compress_attention", "select_attention")


@needs_cpu_kernels
class TestCompressCpu(Interleaved, CompressAttentionContract):
    implementation = "cpu"
    fails_on_faults = True


@needs_cpu_kernels
class TestSelectCpu(Interleaved, SelectAttentionContract):
    implementation = "cpu"
    fails_on_faults = True


# Four sequences and heads that two devices can share; keys as large as values.
COMPRESS = Geometry(
    lengths=(40, 7, 20, 33), value_size=16, k=3, return_lse=True, hostile=False, spare_slots=0
)
SELECT = select_problems.Geometry(
    lengths=(100, 37, 5, 64), value_size=16, return_lse=True, hostile=False, spare_slots=0
)
CALLS = {
    "compress": build(COMPRESS),
    "compress, aligned tokens": build(
        replace(COMPRESS, layout="BSND", tokens=3, masked=True, importance="aligned",
                slack=(1, 0, 5, 2))
    ),
    "select": select_problems.build(SELECT),
    "select, tokens": select_problems.build(
        replace(SELECT, layout="BSND", tokens=3, token_counts=(3, 1, 0, 2))
    ),
    "window": select_problems.build(replace(SELECT, k=None)),
}  # fmt: skip
SOME = ("compress, aligned tokens", "select, tokens", "window")
TRACED = ("query", "key", "block_table", "topk_indices")
IMPLEMENTATIONS = cpu_or_reference("compress_attention", "select_attention")

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("on_cpu")]
each_call = pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
some_calls = pytest.mark.parametrize("arguments", [CALLS[n] for n in SOME], ids=SOME)
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def operator_of(arguments):
    """The operator whose arguments these are."""
    if "compress_stride" in arguments:
        return nsa_compress_attention_infer
    return nsa_select_attention_infer if "topk_indices" in arguments else nsa_window_attention_infer


def bound(arguments, implementation, **options):
    """The operator as a function of arrays by name, and these in host memory."""
    arrays = {n: arguments[n] for n in TRACED if n in arguments}
    static = {n: v for n, v in arguments.items() if n not in arrays} | options
    operator = operator_of(arguments)

    def call(arrays):
        results = operator(**static, **arrays, implementation=implementation)
        return results if isinstance(results, tuple) else (results,)

    return call, arrays


def results_of(arguments, implementation):
    call, arrays = bound(arguments, implementation)
    return call(jax.tree.map(jnp.asarray, arrays))


@each_call
@each_implementation
def test_every_form_of_the_pool(implementation, arguments):
    """Separate pools with the same contents give the same bits."""
    expected = results_of(arguments | {"value": jnp.asarray(arguments["value"])}, implementation)
    both = interleaved(arguments)
    pages, page, rows, size = both["key"].shape
    for shape in ((rows, size), (rows // 2, 2, size), (rows * size,)):
        pool = both["key"].reshape(pages, page, *shape)
        assert_same(results_of(both | {"key": pool}, implementation), expected, implementation)


@needs_cpu_kernels
@each_call
def test_nothing_is_copied(arguments):
    call, arrays = bound(interleaved(arguments), "cpu")
    program = jax.jit(call).lower(arrays).compile()
    pool = arrays["key"]
    of_pool = [
        re.search(r"= \w+\[[\d,]+\]\S* ([\w-]+)\(", line)[1]
        for line in program.as_text().splitlines()
        if (found := re.search(r"= \w+\[([\d,]+)\]", line))
        and np.prod([int(n) for n in found[1].split(",")]) == pool.size
    ]
    assert of_pool == ["parameter", "bitcast"]
    calls = re.findall(r"custom-call\(([^)]*)\), custom_call_target=\"jax_nsa", program.as_text())
    operands = re.findall(r"%[\w.-]+", calls[0])
    assert len(calls) == 1
    assert sum(operands.count(name) == 2 for name in set(operands)) == 1  # as key and as value


# Transformations.


@some_calls
@each_implementation
@pytest.mark.parametrize("mapped", ["key", "query", "both"])
def test_vmap(mapped, implementation, arguments):
    other = dict(interleaved(arguments))
    call, arrays = bound(interleaved(arguments), implementation)
    names = {"key": ["key"], "query": ["query"], "both": ["key", "query", "block_table"]}[mapped]
    changed = {
        n: arrays[n][::-1] if n == "block_table" else (arrays[n] * np.float32(-0.5)) for n in names
    }
    stacked = arrays | {n: np.stack([arrays[n], changed[n]], 1) for n in names}
    if "topk_indices" in arrays and "block_table" in names:  # ids that any sequence has
        stacked["topk_indices"] = np.minimum(arrays["topk_indices"], 0)
    axes = {n: 1 if n in names else None for n in stacked}
    results = jax.jit(jax.vmap(call, in_axes=(axes,)))(stacked)
    for index in range(2):
        one = {n: np.take(x, index, 1) if n in names else x for n, x in stacked.items()}
        expected = results_of(other | one, implementation)
        assert_same([r[index] for r in results], expected, implementation)


def specs_of(arguments, pool_axes):
    """Sequences over x and key/value heads over y."""
    row = ("x", *(None,) * (arguments["query"].ndim - 3))
    return {
        "query": P(*row, "y"),
        "key": P(None, None, "y", *(None,) * (pool_axes - 3)),
        "block_table": P("x"),
        "topk_indices": P(*row, "y"),
    }


@some_calls
@each_implementation
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("pool_axes", [4, 5])
def test_meshes(pool_axes, kind, implementation, arguments):
    both = interleaved(arguments)
    expected = results_of(both, implementation)
    pages, page, rows, size = both["key"].shape
    shape = {3: (rows * size,), 4: (rows, size), 5: (rows // 2, 2, size)}[pool_axes]
    both["key"] = both["key"].reshape(pages, page, *shape)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2, devices=jax.devices("cpu")[:4])
    call, arrays = bound(both, implementation)
    specs = specs_of(both, pool_axes)
    placed = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in arrays.items()}
    with jax.set_mesh(mesh):
        program = jax.jit(call).lower(placed).compile()
        results = program(placed)
    assert not re.search(r"all-(gather|reduce|to-all)|collective-permute", program.as_text())
    assert_same(results, expected, implementation)
    assert results[0].sharding.is_equivalent_to(
        NamedSharding(mesh, specs["query"]), results[0].ndim
    )


def test_an_explicit_mesh_that_cuts_keys_from_values():
    """One head's pool has two rows: devices that share them cannot compute."""
    arguments = interleaved(build(replace(COMPRESS, key_value_heads=1)))
    mesh = jax.make_mesh(
        (2,), ("y",), axis_types=(AxisType.Explicit,), devices=jax.devices("cpu")[:2]
    )
    call, arrays = bound(arguments, "reference")
    placed = {n: jax.device_put(x, NamedSharding(mesh, P())) for n, x in arrays.items()}
    placed["key"] = jax.device_put(arrays["key"], NamedSharding(mesh, P(None, None, "y")))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="key is sharded as"):
        jax.jit(call)(placed)


@pytest.mark.parametrize("name", ["compress", "select", "window"])
@each_implementation
def test_context_axis(implementation, name):
    """Two devices hold half of the positions each, in pools of their own."""
    arguments, devices = CALLS[name], 2
    lengths = "actual_cmp_seq_kvlen" if name == "compress" else "actual_seq_kvlen"
    random = np.random.default_rng(3)
    sequences, columns = len(arguments[lengths]), 8
    each = sequences * columns // devices
    tables = [random.permutation(each).reshape(sequences, -1) for _ in range(devices)]
    pools = [random.standard_normal((devices * each, 16, 2, 16)).astype(np.float32) for _ in "kv"]
    whole = np.concatenate([t + r * each for r, t in enumerate(tables)], axis=1).astype(np.int32)
    arguments = arguments | {"key": pools[0], "value": pools[1], "block_table": whole}
    expected = results_of(arguments | {"value": jnp.asarray(pools[1])}, "reference")
    call, arrays = bound(interleaved(arguments), implementation, context_axis="context")
    arrays["block_table"] = np.concatenate(tables, axis=1).astype(np.int32)
    split = {"key": P("context"), "block_table": P(None, "context")}
    here = jax.devices("cpu")[:devices]
    mesh = jax.make_mesh((devices,), ("context",), axis_types=(AxisType.Auto,), devices=here)
    specs = ({n: split.get(n, P()) for n in arrays},)
    parts = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=P())
    for result, want in zip(jax.jit(parts)(arrays), expected, strict=True):
        np.testing.assert_allclose(result, want, rtol=2e-5, atol=2e-6)


@needs_cpu_kernels
@each_call
def test_export(arguments):
    call, arrays = bound(interleaved(arguments), None)
    exported = jax.export.export(jax.jit(call), disabled_checks=export_disabled_checks())(arrays)
    blob = jax.export.deserialize(exported.serialize())
    assert_same(blob.call(arrays), results_of(interleaved(arguments), "cpu"))


@each_call
def test_derivatives_of_the_reference(arguments):
    heads = arguments["key_value_head_num"]

    def of(pools, **options):
        static = {n: v for n, v in arguments.items() if n not in ("key", "value")}
        results = operator_of(arguments)(**static, **pools, **options, implementation="reference")
        return jnp.sum(jnp.sin(results[0]))

    apart = jax.grad(of)({n: jnp.asarray(arguments[n]) for n in ("key", "value")})
    pool = {"key": jnp.asarray(interleaved(arguments)["key"])}
    both = jax.grad(lambda pool: of(pool | {"value": None}, kv_layout="interleaved"))(pool)
    np.testing.assert_allclose(
        both["key"], interleave(apart["key"], apart["value"], heads), rtol=1e-5, atol=1e-6
    )


# The whole step.

ORIGINAL = replace(Step().original, value_size=16)
STEPS = {
    "one token": Step(ORIGINAL),
    "tokens": Step(replace(ORIGINAL, layout="BSND", tokens=3, token_counts=(3, 1))),
    "a window of its own": Step(ORIGINAL, window_page=48),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@each_implementation
def test_step(implementation, step):
    arguments = arguments_of(step)
    heads = arguments["key_value_head_num"]
    expected = nsa_decode_step(**arguments, implementation=implementation)
    for name in ("compressed", "selected", "window"):
        if name in arguments:
            cache = arguments[name]
            pool = interleave(cache.key, cache.value, heads)
            arguments[name] = PagedKV(pool, None, cache.block_table, cache.lengths)
    results = nsa_decode_step(**arguments, implementation=implementation, kv_layout="interleaved")
    assert_same(results, expected, implementation)


# What goes wrong.


@pytest.mark.parametrize("name", ["compress", "select", "window"])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"kv_layout": "fused"}, ValueError, "kv_layout must be one of ('separate', 'interleaved'"),
        ({"kv_layout": None}, ValueError, "kv_layout must be one of"),
        (
            {"value": np.zeros((1, 16, 2, 16), np.float32)},
            ValueError,
            'value must be None with kv_layout="interleaved"',
        ),
        ({"kv_layout": "separate"}, TypeError, "value must be a JAX or NumPy array with kv_layout"),
        ({"key": np.zeros((9, 16, 2, 16), np.float32)}, ValueError,
         "key must have shape [pages, 16, 4, 16] or [pages, 16, 2, 2, 16] or [pages, 16, 64] with "
         'kv_layout="interleaved"'),
        ({"key": np.zeros((9, 16, 2, 2, 8), np.float32)}, ValueError, "got (9, 16, 2, 2, 8)"),
        ({"key": np.zeros((9, 32, 4, 16), np.float32)}, ValueError, "got (9, 32, 4, 16)"),
        ({"key": np.zeros((0, 16, 4, 16), np.float32)}, ValueError, "got (0, 16, 4, 16)"),
        ({"key": np.zeros(16, np.float32)}, ValueError, "got (16,)"),
        ({"key": np.zeros((9, 16, 4, 16), np.float16)}, TypeError, "query and key must have the"),
        ({"query": np.zeros((4, 4, 144), np.float32)}, ValueError,
         "query's head size must be at most 128 with kv_layout"),
    ],
)  # fmt: skip
def test_misuse(name, changes, error, message):
    arguments = interleaved(CALLS[name])
    with pytest.raises(error, match=re.escape(message)):
        results_of(arguments | changes, "reference")


def test_misuse_of_a_step():
    arguments = arguments_of(Step(ORIGINAL))
    with pytest.raises(ValueError, match=r"compressed\.value must be None with kv_layout"):
        nsa_decode_step(**arguments, kv_layout="interleaved")
    with pytest.raises(ValueError, match="kv_layout must be one of"):
        nsa_decode_step(**arguments, kv_layout="both")
    arguments["selected"] = dataclasses.replace(arguments["selected"], value=None)
    with pytest.raises(TypeError, match=r"selected\.value must be a JAX or NumPy array"):
        nsa_decode_step(**arguments)


@needs_cpu_kernels
@pytest.mark.parametrize("name", ["compress", "select", "window"])
def test_ascend_refuses(name, monkeypatch):
    from jax_nsa.backends import ascend

    monkeypatch.setattr(ascend, "unavailable", lambda operator, platform: None)
    arguments = interleaved(CALLS[name])
    arguments["query"], arguments["key"] = (
        arguments[n].astype(np.float16) for n in ("query", "key")
    )
    reason = (
        'CANN\'s kernel takes keys and values in pools of their own, got kv_layout="interleaved"'
    )
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        results_of(arguments, "ascend")
    assert_same(results_of(arguments, ("ascend", "cpu")), results_of(arguments, "cpu"))
