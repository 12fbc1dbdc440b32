"""Selected and window attention over several devices, and how programs with it are made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kernels import cpu_or_reference
from select_attention.problems import Geometry, build

from jax_nsa import export_disabled_checks, nsa_select_attention_infer

IMPLEMENTATIONS = cpu_or_reference("select_attention")
ARRAYS = ("query", "key", "value", "topk_indices", "block_table", "actual_seq_kvlen")
GEOMETRY = Geometry(
    lengths=(100, 37, 128, 3), layout="BSND", tokens=2, page=16, block=32, k=4, window=50,
    return_lse=True, spare_slots=0,
)  # fmt: skip


def operator(arguments, implementation, **options):
    """The operator as a function of its arrays, and these."""
    names = [name for name in (*ARRAYS, "actual_seq_qlen") if name in arguments]
    static = {name: value for name, value in arguments.items() if name not in names}

    def call(*arrays):
        return nsa_select_attention_infer(
            **static, **dict(zip(names, arrays, strict=True)), implementation=implementation,
            **options,
        )  # fmt: skip

    return call, [jnp.asarray(arguments[name]) for name in names]


def assert_same(results, expected):
    for result, right in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, right, rtol=2e-5, atol=1e-6)


def split_over_devices(arguments, devices):
    """The pools cut by columns of the block table: each device's pages, numbered anew."""
    table = arguments["block_table"]
    columns = table.shape[1] // devices
    parts = {"key": [], "value": [], "block_table": []}
    for device in range(devices):
        own = table[:, device * columns : (device + 1) * columns]
        used = np.unique(own[(own >= 0) & (own < len(arguments["key"]))])
        pages = np.resize(used if len(used) else [0], table.size)
        for name in ("key", "value"):
            parts[name].append(arguments[name][pages])
        number = {int(page): at for at, page in enumerate(used)}
        parts["block_table"].append(
            np.array([[number.get(int(page), -9) for page in row] for row in own], np.int32)
        )
    return {
        "key": np.concatenate(parts["key"]),
        "value": np.concatenate(parts["value"]),
        "block_table": np.concatenate(parts["block_table"], axis=1),
    }


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "geometry",
    [
        GEOMETRY,
        Geometry(lengths=(100, 37, 128, 3), token_counts=(3, 0, 4, 1), page=16, k=5, window=100,
                 return_lse=True, spare_slots=0),
        Geometry(lengths=(100, 0, 128), token_counts=(1, 1, 2), page=16, k=5, window=2**31 - 1,
                 return_lse=True, spare_slots=0),
    ],
    ids=["padded", "packed", "an empty sequence, a window without end"],
)  # fmt: skip
@pytest.mark.parametrize("faulty", [False, True])
def test_context_parallel(implementation, geometry, faulty):
    arguments = build(geometry)
    if faulty:
        blocks = -(-geometry.lengths[0] // geometry.block)
        arguments["topk_indices"][(0,) * (arguments["topk_indices"].ndim - 1)] = blocks
    call, arrays = operator(arguments, implementation, on_fault="nan")
    expected = call(*arrays)
    assert np.isnan(expected[0]).any() == faulty
    mesh = jax.make_mesh((4,), ("context",), axis_types=(AxisType.Auto,))
    parts = split_over_devices(arguments, 4)
    part, arrays = operator(
        arguments | parts, implementation, context_axis="context", on_fault="nan"
    )
    pages, whole = P("context"), P()
    specs = {"key": pages, "value": pages, "block_table": P(None, "context")}
    names = [name for name in (*ARRAYS, "actual_seq_qlen") if name in arguments]
    run = jax.jit(
        jax.shard_map(
            part,
            mesh=mesh,
            in_specs=tuple(specs.get(name, whole) for name in names),
            out_specs=(whole,) * len(expected),
        )
    )
    assert_same(run(*arrays), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("split", ["sequences", "heads", "both"])
def test_sharding_needs_no_collective(implementation, axis_type, split):
    arguments = build(GEOMETRY)
    call, arrays = operator(arguments, implementation, on_fault="nan")
    expected = call(*arrays)
    mesh = jax.make_mesh((2, 2), ("s", "h"), axis_types=(axis_type,) * 2)
    s = "s" if split != "heads" else None
    h = "h" if split != "sequences" else None
    specs = (P(s, None, h), P(None, None, h), P(None, None, h), P(s, None, h), P(s), P(s))
    placed = [
        jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs, strict=True)
    ]
    compiled = jax.jit(call).lower(*placed).compile()
    text = compiled.as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text
    results = compiled(*placed)
    assert_same(results, expected)
    assert results[0].sharding.spec[0] == s


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scan_and_export(implementation):
    arguments = build(GEOMETRY)
    call, (query, *rest) = operator(arguments, implementation)
    expected = call(query, *rest)

    def scanned(query, *rest):
        def step(carry, sign):
            return carry, call(sign * query, *rest)

        return jax.lax.scan(step, 0, jnp.array([-1.0, 1.0]))[1]

    assert_same([r[1] for r in jax.jit(scanned)(query, *rest)], expected)
    exported = jax.export.export(jax.jit(call), disabled_checks=export_disabled_checks())(
        query, *rest
    )
    assert_same(jax.export.deserialize(exported.serialize()).call(query, *rest), expected)


def test_gradient_of_the_reference():
    arguments = build(Geometry(lengths=(40, 20), hostile=True))
    call, (query, key, value, *rest) = operator(arguments, "reference")

    def loss(query):
        selected, window = call(query, key, value, *rest)
        return jnp.sum(selected * window)

    gradient = jax.grad(loss)(query)
    direction = jnp.ones_like(query)
    slope = (loss(query + 1e-2 * direction) - loss(query - 1e-2 * direction)) / 2e-2
    assert float(slope) == pytest.approx(float(jnp.vdot(gradient, direction)), rel=0.02, abs=1e-3)


def test_kernels_have_no_derivative():
    arguments = build(Geometry())
    call, (query, *rest) = operator(arguments, ("cpu", "reference"))
    with pytest.raises(NotImplementedError, match="nsa_select_attention_infer is an inference"):
        jax.grad(lambda q: call(q, *rest)[0].sum())(query)
