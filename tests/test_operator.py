"""A new operator is a record: forty lines, in no other operator's file, and it has everything."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_nsa import backends, checks, operator, paged, partition
from jax_nsa.operator import Array, Operator

# ---- The operator: the largest product of each query with the keys of its sequence. -------------


@dataclasses.dataclass(frozen=True)
class Problem:
    key_value_heads: int

    def with_heads(self, heads):
        return Problem(heads)

    def scalars(self):
        return {"key_value_heads": self.key_value_heads}


def reference(operands, problem):
    query, key, table, lengths = operands.values()
    keys = key[table].reshape(len(table), -1, problem.key_value_heads, query.shape[-1])
    grouped = query.reshape(*query.shape[:2], problem.key_value_heads, -1, query.shape[-1])
    products = jnp.einsum("bthgd,bihd->bthgi", grouped, keys)
    seen = jnp.arange(keys.shape[1]) < lengths[:, None, None, None, None]
    return {"peak": jnp.where(seen, products, -jnp.inf).max(-1).reshape(query.shape[:-1])}


OPERATOR = Operator(
    name="toy_peak", target="toy_peak",
    operands=(
        Array("query", "* (h g) d"), Array("key", "p r (h d)"),
        Array("block_table", "b c", points_into="p"), Array("lengths", "b"),
    ),
    results=lambda problem: (Array("peak", "* (h g)", absent=-np.inf),),
    sizes=lambda problem, sizes: {}, reference=reference,
)  # fmt: skip
del operator.ALL[OPERATOR.target]  # other tests go over all operators


def toy_peak(query, key, block_table, lengths, *, key_value_heads, implementation=None):
    table = checks.Integers("block_table", block_table, rank=2)
    lengths = paged.per_sequence("lengths", lengths, table.shape[0])
    lengths.check_range(table.shape[1] * key.shape[1])
    operands = {"query": checks.floats("query", query), "key": checks.floats("key", key)}
    operands |= {"block_table": table.array(), "lengths": lengths.array()}
    names = backends.parse(implementation)
    return OPERATOR.bind(operands, problem=Problem(key_value_heads), implementation=names)["peak"]


# ---- What it has. -------------------------------------------------------------------------------

HEADS, GROUP, SIZE, PAGE, PAGES = 2, 3, 8, 4, 6
TABLE = np.array([[0, 3], [5, 1], [2, 4], [1, 0]], np.int32)
LENGTHS = np.array([8, 5, 1, 7], np.int32)
RNG = np.random.default_rng(3)
QUERY = RNG.standard_normal((4, 2, HEADS * GROUP, SIZE)).astype(np.float32)
KEY = RNG.standard_normal((PAGES, PAGE, HEADS * SIZE)).astype(np.float32)


def call(*arrays):
    return toy_peak(*arrays, key_value_heads=HEADS)


def expected(query, key, table, lengths):
    """In a loop over rows, in double precision."""
    result = np.empty(query.shape[:-1])
    for b, t, n in np.ndindex(result.shape):
        keys = np.concatenate([key[page] for page in table[b]]).reshape(-1, HEADS, SIZE)
        result[b, t, n] = max(
            float(query[b, t, n].astype(np.float64) @ keys[i, n // GROUP])
            for i in range(lengths[b])
        )
    return result


def assert_right(result, *arrays):
    np.testing.assert_allclose(result, expected(*arrays), rtol=1e-5)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_computes(transform):
    assert_right(transform(call)(QUERY, KEY, TABLE, LENGTHS), QUERY, KEY, TABLE, LENGTHS)


def test_abstract_evaluation():
    shape = jax.eval_shape(call, QUERY, KEY, TABLE, LENGTHS)
    assert (shape.shape, shape.dtype) == ((4, 2, HEADS * GROUP), jnp.float32)


@pytest.mark.parametrize("mapped", ["query", "pools too", "one of them twice"])
def test_vmap_is_one_call(mapped):
    axes = (0, 0, 0, 0) if mapped == "pools too" else (1, None, None, None)
    if mapped == "pools too":
        arrays = tuple(np.stack([a, a[::-1]]) for a in (QUERY, KEY, TABLE, LENGTHS))
    else:
        arrays = (np.stack([QUERY, -QUERY], 1), KEY, TABLE, LENGTHS)
    function = jax.vmap(call, axes)
    if mapped == "one of them twice":
        arrays = (np.stack([arrays[0], 2 * arrays[0]]), *arrays[1:])
        function = jax.vmap(function, (0, None, None, None))
    results = np.asarray(jax.jit(function)(*arrays))
    assert str(jax.make_jaxpr(function)(*arrays)).count("toy_peak") == 1
    for at in np.ndindex(*results.shape[:-3]):
        if mapped == "pools too":
            one = tuple(a[at] for a in arrays)
        else:
            index = (slice(None), *at) if len(at) == 1 else (at[0], slice(None), at[1])
            one = (arrays[0][index], *arrays[1:])
        assert_right(results[at], *one)


def test_derivative():
    def total(query, key):
        return toy_peak(
            query, key, TABLE, LENGTHS, key_value_heads=HEADS, implementation="reference"
        ).sum()

    step = 1e-2
    gradient = jax.grad(total)(QUERY, KEY)
    moved = QUERY.copy()
    moved[1, 0, 4, 5] += step
    rise = float(total(moved, KEY) - total(QUERY, KEY)) / step
    np.testing.assert_allclose(rise, gradient[1, 0, 4, 5], rtol=1e-2, atol=1e-3)
    with pytest.raises(NotImplementedError, match="toy_peak is an inference operator"):
        jax.grad(lambda q: call(q, KEY, TABLE, LENGTHS).sum())(QUERY)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("split", ["sequences", "heads", "both"])
def test_splits_over_devices_without_a_collective(axis_type, split):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    b, h = {"sequences": ("x", None), "heads": (None, "y"), "both": ("x", "y")}[split]
    specs = [PartitionSpec(b, None, h), PartitionSpec(None, None, h), PartitionSpec(b)]
    placed = [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip((QUERY, KEY, TABLE, LENGTHS), [*specs, specs[-1]], strict=True)
    ]
    with jax.set_mesh(mesh):
        program = jax.jit(call).lower(*placed).compile()
    assert not any(word in program.as_text() for word in ("all-gather", "all-reduce", "permute"))
    result = program(*placed)
    assert result.sharding.is_equivalent_to(NamedSharding(mesh, specs[0]), result.ndim)
    assert_right(result, QUERY, KEY, TABLE, LENGTHS)


def test_refuses_a_sharding_that_needs_a_collective():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    pool = jax.device_put(KEY, NamedSharding(mesh, PartitionSpec("x")))
    query = jax.device_put(QUERY, NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="key is sharded as"):
        jax.jit(call)(query, pool, TABLE, LENGTHS)


def test_shard_map():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("x")
    function = jax.shard_map(
        call, mesh=mesh, in_specs=(spec, PartitionSpec(), spec, spec), out_specs=spec
    )
    assert_right(jax.jit(function)(QUERY, KEY, TABLE, LENGTHS), QUERY, KEY, TABLE, LENGTHS)


def test_export():
    exported = jax.export.export(jax.jit(call))(QUERY, KEY, TABLE, LENGTHS)
    again = jax.export.deserialize(exported.serialize())
    assert_right(again.call(QUERY, KEY, TABLE, LENGTHS), QUERY, KEY, TABLE, LENGTHS)


def test_no_sequences():
    assert call(QUERY[:0], KEY, TABLE[:0], LENGTHS[:0]).shape == (0, 2, HEADS * GROUP)


def test_messages_name_its_arguments():
    with pytest.raises(ValueError, match=r"lengths\[2\] must be in \[0, 8\], got 9"):
        call(QUERY, KEY, TABLE, [8, 5, 9, 7])


def test_says_why_a_backend_does_not_have_it():
    with pytest.raises(NotImplementedError, match="compiled without its cpu kernel of toy_peak"):
        toy_peak(QUERY, KEY, TABLE, LENGTHS, key_value_heads=HEADS, implementation="cpu")


def test_counts_of_tokens_are_cut_as_the_sequences_are():
    """On a mesh with explicit axes, from whole ones or those of the same devices; else refused."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)

    def put(shape, *spec):
        return jax.device_put(jnp.ones(shape, jnp.int32), NamedSharding(mesh, PartitionSpec(*spec)))

    batched, packed = put((4, 2, 2, 8), "x", "y"), put((4, 2, 8), "x")
    for counts in (put(4), put(4, "x")):
        cut = partition.cut_as_sequences("counts", counts, batched, packed=False)
        assert jax.typeof(cut).sharding.spec == PartitionSpec("x")
    whole = partition.cut_as_sequences("counts", put(4), packed, packed=True)
    assert not any(jax.typeof(whole).sharding.spec)
    for query, is_packed, axis in ((batched, False, "y"), (packed, True, "x")):
        with pytest.raises(ValueError, match=r"counts is sharded as .*must be as .* query's"):
            partition.cut_as_sequences("counts", put(4, axis), query, is_packed)
