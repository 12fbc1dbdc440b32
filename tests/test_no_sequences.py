"""Calls without sequences, and sequences without a token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention.calls import FLOATS, INTEGERS
from compress_attention.examples import (
    LAYOUTS,
    PACKED,
    on_device,
    operator,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_nsa import nsa_compress_attention_infer

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(params=["cpu", "reference"])
def implementation(request):
    return request.param


def none_of(geometry):
    """A call without sequences: the arrays, and the shapes that the results have."""
    _, arrays = operator(geometry)
    batched = geometry.layout == "BSND"
    pools = {n: arrays.pop(n) for n in ("key", "value")}
    arrays = {n: a[:0] for n, a in arrays.items()}
    heads = geometry.group * geometry.key_value_heads
    rows = (0, geometry.tokens) if batched else (0,)
    shapes = [
        (*rows, heads, geometry.value_size),
        (*rows, geometry.key_value_heads, geometry.k),
        (*rows, heads),
    ]
    return pools | arrays, shapes[: 2 + geometry.return_lse]


def assert_none(results, shapes, leading=()):
    assert [r.shape for r in results] == [(*leading, *s) for s in shapes]
    assert [r.dtype.name for r in results] == ["float32", "int32", "float32"][: len(shapes)]


@pytest.mark.parametrize("layout", LAYOUTS)
class TestNoSequences:
    def case(self, layout, implementation):
        geometry = LAYOUTS[layout]
        call, _ = operator(geometry, implementation)
        return call, *none_of(geometry)

    @pytest.mark.parametrize("known", [True, False], ids=["host values", "arrays"])
    def test_eager_and_jit(self, implementation, layout, known):
        call, arrays, shapes = self.case(layout, implementation)
        arrays = arrays if known else on_device(arrays)
        assert_none(call(**arrays), shapes)
        floats = {n: arrays.pop(n) for n in FLOATS}
        if known:
            program = jax.jit(lambda floats: call(**floats, **arrays))
            assert_none(program(floats), shapes)
        else:
            assert_none(jax.jit(lambda arrays: call(**arrays))(floats | arrays), shapes)

    def test_empty_lists(self, implementation, layout):
        call, arrays, shapes = self.case(layout, implementation)
        names = [n for n in INTEGERS[1:] if n in arrays]
        assert_none(call(**arrays | {n: [] for n in names}), shapes)

    def test_vmap(self, implementation, layout):
        call, arrays, shapes = self.case(layout, implementation)
        stacked = {n: jnp.stack([a, a, a]) for n, a in on_device(arrays).items()}
        mapped = jax.vmap(lambda arrays: call(**arrays))
        assert_none(mapped(stacked), shapes, leading=(3,))
        assert_none(jax.jit(mapped)(stacked), shapes, leading=(3,))

    def test_vmap_over_nothing(self, implementation, layout):
        call, arrays = operator(LAYOUTS[layout], implementation)
        of_one = jax.eval_shape(lambda arrays: call(**arrays), arrays)
        stacked = {n: jnp.stack([a])[:0] for n, a in on_device(arrays).items()}
        mapped = jax.vmap(lambda arrays: call(**arrays))
        for program in (mapped, jax.jit(mapped)):
            assert_none(program(stacked), [r.shape for r in of_one], leading=(0,))

    def test_vmap_over_nothing_of_nothing(self, implementation, layout):
        call, arrays, shapes = self.case(layout, implementation)
        stacked = {n: jnp.stack([a])[:0] for n, a in on_device(arrays).items()}
        assert_none(jax.vmap(lambda arrays: call(**arrays))(stacked), shapes, leading=(0,))

    def test_gradient(self, layout):
        call, arrays, _ = self.case(layout, "reference")
        floats = {n: jnp.asarray(arrays.pop(n)) for n in FLOATS}
        gradients = jax.grad(lambda floats: call(**floats, **arrays)[0].sum())(floats)
        for name, gradient in gradients.items():
            assert gradient.shape == floats[name].shape
            assert np.all(np.asarray(gradient) == 0)

    @pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
    def test_several_devices(self, implementation, layout, axis_type):
        call, arrays, shapes = self.case(layout, implementation)
        mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)
        heads = PartitionSpec(None, None, "y")
        specs = dict.fromkeys(("key", "value"), heads)
        specs["query"] = PartitionSpec(*[None] * (len(arrays["query"].shape) - 2), "y")
        if layout == "one token":
            specs |= dict.fromkeys(("block_table", "actual_cmp_seq_kvlen"), PartitionSpec("x"))
            specs["query"] = PartitionSpec("x", "y")
        placed = {
            n: jax.device_put(a, NamedSharding(mesh, specs.get(n, PartitionSpec())))
            for n, a in arrays.items()
        }
        assert_none(jax.jit(lambda arrays: call(**arrays))(placed), shapes)

    def test_shard_map(self, implementation, layout):
        call, arrays, shapes = self.case(layout, implementation)
        if layout != "one token":
            pytest.skip("packed rows do not split, and one test of the kind is enough")
        mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
        row = PartitionSpec("x")
        specs = {n: PartitionSpec() if n in ("key", "value") else row for n in arrays}
        split = jax.shard_map(
            lambda arrays: call(**arrays), mesh=mesh, in_specs=(specs,), out_specs=row
        )
        assert_none(jax.jit(split)(on_device(arrays)), shapes)


def test_sequences_without_a_token(implementation):
    """A rank's sequences may all have nothing new."""
    call, arrays = operator(PACKED, implementation)
    arrays["query"] = arrays["query"][:0]
    arrays["actual_seq_qlen"][:] = 0
    for program, given in (
        (call, arrays), (call, on_device(arrays)), (jax.jit(call), on_device(arrays)),
    ):  # fmt: skip
        assert_none(program(**given), [(0, 4, 8), (0, 2, 4)])


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_packed_rows_of_no_sequence(implementation):
    """As a data-parallel rank without work has them: padding alone."""
    none = jnp.zeros(0, jnp.int32)
    pools = [np.ones((4, 16, 2 * 16), np.float32)] * 2

    def call(query):
        return nsa_compress_attention_infer(
            query, *pools, 0.25, 4, 2, 64, 2, 16, 32, 16, block_table=jnp.zeros((0, 4), jnp.int32),
            actual_seq_qlen=none, actual_cmp_seq_kvlen=none, return_lse=True,
            implementation=implementation,
        )  # fmt: skip

    query = jnp.ones((2, 4, 16))
    for attention, indices, lse in (call(query), jax.jit(call)(query)):
        np.testing.assert_array_equal(attention, np.zeros((2, 4, 16)))
        np.testing.assert_array_equal(indices, np.full((2, 2, 2), -1))
        np.testing.assert_array_equal(lse, np.full((2, 4), -np.inf))
    if implementation == "reference":
        gradient = jax.grad(lambda q: call(q)[0].sum())(query)
        np.testing.assert_array_equal(gradient, 0)
