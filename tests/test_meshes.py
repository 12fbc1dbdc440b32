"""Every legal shape on every mesh, and every transformation under every way to state a mesh."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention import oracle
from compress_attention.agreement import assert_agrees
from compress_attention.examples import operator_in_order as operator
from compress_attention.problems import Geometry, build
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import serialize_executable
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_nsa import nsa_compress_attention_infer

pytestmark = pytest.mark.timeout(120)

ARRAYS = ("query", "key", "value", "block_table", "actual_cmp_seq_kvlen")
TOKENS = ("actual_seq_qlen", "actual_sel_seq_kvlen")

# The tests' devices are four; a mesh may have fewer.
MESHES = ((2,), (3,), (4,), (1, 2), (2, 1), (1, 4), (4, 1), (2, 2), (1, 1, 2), (2, 1, 2), (1, 4, 1))
TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}

GEOMETRY = Geometry(
    lengths=(40, 7, 20, 33), key_value_heads=2, group=2, value_size=8, k=3, return_lse=True,
    hostile=False, spare_slots=0,
)  # fmt: skip


def make_mesh(shape, axis_type):
    names = ("x", "y", "z")[: len(shape)]
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return jax.sharding.Mesh(devices, names, axis_types=(TYPES[axis_type],) * len(shape))


def shards(mesh, axes):
    return math.prod(mesh.shape[a] for a in axes)


def divides(mesh, spec, array):
    return all(
        n % shards(mesh, axes or ()) == 0 for n, axes in zip(array.shape, spec, strict=False)
    )


def placed(mesh, arrays, specs):
    return [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)]


def assert_right(results, geometry):
    expected = oracle.compress_attention(**build(geometry))
    assert_agrees(results, expected, attention_tolerance=1e-5)


# Sizes of 1, and sizes that devices cannot share evenly.


@st.composite
def divided_calls(draw):
    """A small call, a mesh, and for each operand the mesh axes that split its dimensions."""
    pick, integers = st.sampled_from, st.integers
    sequences = draw(integers(1, 5))
    layout = draw(pick(["TND", "BSND"]))
    tokens = draw(integers(1, 2)) if layout == "BSND" else 1
    counts = None
    if draw(st.booleans()):
        counts = tuple(
            draw(integers(1, tokens if layout == "BSND" else 3)) for _ in range(sequences)
        )
    head_size = draw(pick([1, 1, 2, 16]))
    geometry = Geometry(
        lengths=tuple(draw(integers(0, 32)) for _ in range(sequences)),
        layout=layout,
        tokens=tokens,
        token_counts=counts,
        key_value_heads=draw(pick([1, 1, 2, 3, 4])),
        group=draw(pick([1, 1, 2, 4])),
        head_size=head_size,
        value_size=draw(pick(sorted({1, head_size}))),
        spare_slots=draw(integers(0, 1)),
        k=draw(integers(1, 3)),
        return_lse=draw(st.booleans()),
        hostile=False,
        seed=draw(integers(0, 99)),
    )
    shape = draw(pick(MESHES))
    splits = {name: [] for name in ("sequences", "heads", "none")}
    for axis in ("x", "y", "z")[: len(shape)]:
        splits[draw(pick(sorted(splits)))].append(axis)
    return geometry, shape, tuple(splits["sequences"]), tuple(splits["heads"])


def specs_of(geometry, sequences, heads, names):
    """Each operand's spec where sequences and heads split over these mesh axes."""
    row = sequences or None
    heads = heads or None
    packed = geometry.layout == "TND" and geometry.token_counts is not None
    query = (row, heads) if geometry.layout == "TND" else (row, None, heads)
    if packed:
        query = (None, heads)
    of = {"query": query, "key": (None, None, heads), "value": (None, None, heads)}
    return [P(*of.get(n, (None if packed else row,))) for n in names]


def compute_divided(geometry, shape, sequences, heads, implementation, axis_type="auto"):
    """Compiles and runs a call on a mesh; operands that do not divide evenly are constrained."""
    call, arrays = operator(geometry, implementation)
    names = [n for n in (*ARRAYS, *TOKENS) if n in build(geometry)]
    mesh = make_mesh(shape, axis_type)
    specs = specs_of(geometry, sequences, heads, names)
    even = [divides(mesh, s, a) for s, a in zip(specs, arrays, strict=True)]
    shardings = [NamedSharding(mesh, s) for s in specs]
    whole = NamedSharding(mesh, P())
    operands = [
        jax.device_put(a, s if e else whole)
        for a, s, e in zip(arrays, shardings, even, strict=True)
    ]

    def constrained(*arrays):
        arrays = [
            a if e else jax.lax.with_sharding_constraint(a, s)
            for a, s, e in zip(arrays, shardings, even, strict=True)
        ]
        return call(*arrays)

    return jax.jit(constrained)(*operands)


@settings(max_examples=15)
@given(case=divided_calls(), implementation=st.sampled_from(("cpu", "cpu", "reference")))
def test_any_shape_on_any_mesh(case, implementation):
    geometry, shape, sequences, heads = case
    assert_right(compute_divided(geometry, shape, sequences, heads, implementation), geometry)


ONES = {
    "MQA": {"key_value_heads": 1},
    "MHA": {"group": 1},
    "one head": {"key_value_heads": 1, "group": 1},
    "D = Dv = 1": {"head_size": 1, "value_size": 1},
    "Dv = 1": {"value_size": 1},
    "nothing but ones": {
        "key_value_heads": 1, "group": 1, "head_size": 1, "value_size": 1, "lengths": (9,), "k": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("axis_type", TYPES)
@pytest.mark.parametrize("sequences", [("x",), ("x", "y"), ()], ids=str)
@pytest.mark.parametrize("sizes", ONES)
def test_sizes_of_one(axis_type, sequences, sizes):
    """Sequences split or replicated, heads whole."""
    geometry = replace(GEOMETRY, **ONES[sizes])
    if len(geometry.lengths) == 1:
        sequences = ()
    results = compute_divided(geometry, (2, 2), sequences, (), "cpu", axis_type)
    assert_right(results, geometry)


@pytest.mark.parametrize("axis_type", TYPES)
@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (1, 1), (1, 2, 1), (2, 1, 2)], ids=str)
def test_meshes_with_axes_of_one(axis_type, shape):
    """Also where an axis of one device splits what has size 1."""
    for changes in ({"key_value_heads": 1}, {"group": 1}, {}):
        geometry = replace(GEOMETRY, **changes)
        heads = tuple(
            axis for axis, size in zip(("y", "z"), shape[1:], strict=False)
            if geometry.key_value_heads % size == 0
        )[:1]  # fmt: skip
        results = compute_divided(geometry, shape, ("x",), heads, "cpu", axis_type)
        assert_right(results, geometry)


@pytest.mark.parametrize("shape", [(4,), (2, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("key_value_heads", [1, 2])
def test_more_devices_than_key_value_heads(shape, key_value_heads):
    """What cannot split is gathered, or splits as far as it can; one mesh axis or several."""
    geometry = replace(GEOMETRY, key_value_heads=key_value_heads, group=4)
    mesh = make_mesh(shape, "auto")
    call, arrays = operator(geometry, "cpu")
    specs = [P(None, mesh.axis_names), *[P()] * 4]
    assert_right(jax.jit(call)(*placed(mesh, arrays, specs)), geometry)


# The whole matrix of how a mesh is stated, where arrays lie, and what is done with the call.

STATED = {
    "no mesh": lambda mesh: contextlib.nullcontext(),
    "set_mesh": jax.set_mesh,
    "with mesh": lambda mesh: mesh,
}
SPECS = (P("x", "y"), P(None, None, "y"), P(None, None, "y"), P("x"), P("x"))
PLACED = ("uncommitted", "made inside", "committed", "replicated", "in_shardings", "constrained")


def scanned(call):
    def program(query, *rest):
        queries = jnp.stack([-query, query])
        return jax.lax.scan(lambda carry, q: (carry, call(q, *rest)), 0, queries)[1]

    return program


def conditional(call):
    def program(query, *rest):
        return jax.lax.cond(
            jnp.sum(rest[-1]) > 0, call, lambda q, *rest: call(-q, *rest), query, *rest
        )

    return program


def mapped(call):
    def program(query, *rest):
        queries = jnp.stack([-query, query])
        return jax.vmap(call, in_axes=(0, *[None] * len(rest)))(queries, *rest)

    return program


def gradient(call):
    return jax.grad(lambda *arrays: (call(*arrays)[0] ** 2).sum(), argnums=(0, 1, 2))


def gradient_of_remat(call):
    return gradient(jax.checkpoint(call))


def called(program, operands):
    return program(*operands)


def ahead_of_time(program, operands):
    return program.lower(*operands).compile()(*operands)


def serialised(program, operands):
    compiled = program.lower(*operands).compile()
    sharding = compiled.input_shardings[0][0]
    mesh = getattr(sharding, "mesh", None)
    ids = sorted(sharding.device_set, key=lambda device: device.id)  # a set has no order
    devices = ids if mesh is None else list(mesh.devices.flat)
    loaded = serialize_executable.deserialize_and_load(
        *serialize_executable.serialize(compiled), execution_devices=devices
    )
    return loaded(*operands)


def same(call):
    return call


# Each: what becomes of the operator, the implementation, and how the jitted program is run.
TRANSFORMED = {
    "jit": (same, "cpu", called),
    "scan": (scanned, "cpu", called),
    "cond": (conditional, "cpu", called),
    "remat": (jax.checkpoint, "cpu", called),
    "vmap": (mapped, "cpu", called),
    "grad": (gradient, "reference", called),
    "grad of remat": (gradient_of_remat, "reference", called),
    "AOT": (same, "cpu", ahead_of_time),
    "serialised": (same, "cpu", serialised),
}


@functools.cache
def expected_of(name):
    """What one device gives, outside of any mesh."""
    transform, implementation, _ = TRANSFORMED[name]
    call, arrays = operator(GEOMETRY, implementation)
    return jax.tree.map(np.asarray, jax.jit(transform(call))(*map(jnp.asarray, arrays)))


def constrain(mesh, axis_type, arrays):
    place = jax.lax.with_sharding_constraint if axis_type == "auto" else jax.sharding.reshard
    return [place(a, NamedSharding(mesh, s)) for a, s in zip(arrays, SPECS, strict=True)]


def cells():
    """All of the matrix that can differ: what only places arrays is tried with less of it."""
    for stated, axis_type, placement, name in itertools.product(STATED, TYPES, PLACED, TRANSFORMED):
        if stated == "with mesh" and name not in ("jit", "vmap"):
            continue
        if placement in ("made inside", "replicated") and name not in ("jit", "AOT", "serialised"):
            continue
        if placement == "in_shardings" and name in ("scan", "cond", "remat"):
            continue
        if name == "grad of remat" and (stated, axis_type) != ("set_mesh", "explicit"):
            continue
        if name.startswith("grad") and placement not in ("uncommitted", "committed"):
            continue
        # JAX reshards within a program only under set_mesh.
        if (axis_type, placement) == ("explicit", "constrained") and stated != "set_mesh":
            continue
        yield stated, axis_type, placement, name


@pytest.mark.filterwarnings("ignore:.with mesh:DeprecationWarning")
@pytest.mark.parametrize(("stated", "axis_type", "placement", "name"), list(cells()))
def test_matrix(stated, axis_type, placement, name):
    mesh = make_mesh((2, 2), axis_type)
    transform, implementation, run = TRANSFORMED[name]
    call, arrays = operator(GEOMETRY, implementation)
    expected = expected_of(name)
    operands = [jnp.asarray(a) for a in arrays]
    program, options = transform(call), {}
    if placement == "constrained":
        inner = program

        def program(*arrays):
            return inner(*constrain(mesh, axis_type, arrays))

    if placement == "in_shardings":
        options["in_shardings"] = tuple(NamedSharding(mesh, s) for s in SPECS)
    with STATED[stated](mesh):
        if placement == "made inside":
            operands = [jnp.asarray(a) + jnp.zeros((), a.dtype) for a in arrays]
        elif placement == "committed":
            operands = placed(mesh, arrays, SPECS)
        elif placement == "replicated":
            operands = placed(mesh, arrays, [P()] * len(arrays))
        results = run(jax.jit(program, **options), operands)
    for result, want in zip(results, expected, strict=True):
        assert result.dtype == want.dtype
        np.testing.assert_allclose(np.asarray(result), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis_type", TYPES)
@pytest.mark.parametrize("shape", [(1,), (2, 1, 2)], ids=str)
def test_eager_under_set_mesh(axis_type, shape):
    call, arrays = operator(GEOMETRY, "cpu")
    with jax.set_mesh(make_mesh(shape, axis_type)):
        assert_right(call(*map(jnp.asarray, arrays)), GEOMETRY)
        assert_right(jax.jit(call)(*map(jnp.asarray, arrays)), GEOMETRY)
        assert_right(jax.jit(call)(*arrays), GEOMETRY)


def test_host_values_under_set_mesh():
    """Lengths and tables that the program holds as constants."""
    call, arrays = operator(GEOMETRY, "cpu")
    for axis_type in TYPES:
        mesh = make_mesh((2, 2), axis_type)
        with jax.set_mesh(mesh):
            floats = placed(mesh, arrays[:3], SPECS[:3])
            assert_right(jax.jit(lambda *floats: call(*floats, *arrays[3:]))(*floats), GEOMETRY)


@pytest.mark.parametrize("axis_type", TYPES)
@pytest.mark.parametrize("options", [{}, {"spmd_axis_name": "x"}], ids=["split", "spmd_axis_name"])
def test_vmap_over_what_a_mesh_splits(axis_type, options):
    """Each device has some of the mapped calls."""
    mesh = make_mesh((2, 2), axis_type)
    call, arrays = operator(GEOMETRY, "cpu")
    queries = np.stack([-arrays[0], arrays[0]])
    if axis_type == "explicit":
        options = {}  # JAX takes the axis from the array's type
    program = jax.vmap(call, in_axes=(0, *[None] * 4), **options)
    operands = placed(mesh, [queries, *arrays[1:]], [P("x"), *[P()] * 4])
    with jax.set_mesh(mesh):
        results = jax.jit(program)(*operands)
    assert_right([np.asarray(r)[1] for r in results], GEOMETRY)


def test_a_group_of_heads_that_an_explicit_mesh_splits_is_refused():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    sharding = NamedSharding(mesh, P(None, "x"))
    query = jax.device_put(np.ones((2, 4, 16), np.float32), sharding)
    pool = np.ones((2, 16, 16), np.float32)
    with pytest.raises(ValueError, match=r"query is sharded as .* 1 key/value heads"):
        nsa_compress_attention_infer(
            query, pool, pool, 1.0, 4, 1, 64, 1, 16, 32, 16,
            block_table=jnp.zeros((2, 1), jnp.int32), actual_cmp_seq_kvlen=jnp.array([3, 4]),
        )  # fmt: skip
