"""vmap and sharding: what a JAX user expects of any primitive."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention.examples import assert_close
from compress_attention.examples import operator_on_device as operator
from compress_attention.problems import Geometry, build
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_nsa import nsa_compress_attention_infer

ARRAYS = ("query", "key", "value", "block_table", "actual_cmp_seq_kvlen")
TOKENS = ("actual_seq_qlen", "actual_sel_seq_kvlen")
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")

GEOMETRY = Geometry(
    lengths=(60, 17, 0, 33), key_value_heads=4, group=2, head_size=16, value_size=8, hostile=False,
    spare_slots=0, return_lse=True,
)  # fmt: skip
SEVERAL_TOKENS = Geometry(
    lengths=(60, 17, 33), token_counts=(2, 0, 3), masked=True, slack=(0, 1, 2), hostile=False,
    shared_pages=True, return_lse=True,
)  # fmt: skip


@pytest.fixture(params=["cpu", "reference"])
def implementation(request):
    return request.param


class TestVmap:
    def variants(self, arrays, count=2):
        """Other legal values of each array, stacked in front."""
        rng = np.random.default_rng(1)

        def vary(array):
            if array.dtype == jnp.int32:
                # Token counts must keep their sum.
                return np.stack([np.roll(array, i, axis=0) for i in range(count)])
            return rng.standard_normal((count, *array.shape)).astype(array.dtype)

        return [jnp.asarray(vary(np.asarray(a))) for a in arrays]

    def check(self, geometry, implementation, mapped, axis):
        call, arrays = operator(geometry, implementation)
        variants = self.variants(arrays)
        arguments = [
            jnp.moveaxis(v, 0, axis) if m else a
            for v, a, m in zip(variants, arrays, mapped, strict=True)
        ]
        in_axes = [axis if m else None for m in mapped]
        results = jax.vmap(call, in_axes)(*arguments)
        for i in range(2):
            one = [v[i] if m else a for v, a, m in zip(variants, arrays, mapped, strict=True)]
            assert_close([r[i] for r in results], call(*one))
        return jax.make_jaxpr(jax.vmap(call, in_axes))(*arguments)

    @pytest.mark.parametrize(
        "mapped", [m for m in itertools.product([False, True], repeat=5) if any(m)]
    )
    def test_any_subset_of_operands(self, mapped):
        jaxpr = self.check(GEOMETRY, "reference", mapped, axis=0)
        assert str(jaxpr).count("nsa_compress_attention[") == 1

    @pytest.mark.parametrize("axis", [0, 1, -1])
    def test_any_axis(self, implementation, axis):
        self.check(GEOMETRY, implementation, [True] * 5, axis)

    @pytest.mark.parametrize("mapped", [[True] * 7, [True] * 4 + [False] * 3])
    def test_several_tokens(self, implementation, mapped):
        self.check(SEVERAL_TOKENS, implementation, mapped, axis=0)

    def test_nested(self, implementation):
        call, arrays = operator(GEOMETRY, implementation)
        queries = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 4, 8, 16)), "float32")
        tables = jnp.stack([arrays[3], jnp.roll(arrays[3], 1, axis=0)])
        inner = jax.vmap(call, in_axes=(0, None, None, 0, None))
        results = jax.vmap(inner, in_axes=(0, None, None, None, None))(
            queries, *arrays[1:3], tables, arrays[4]
        )
        for i, j in itertools.product(range(3), range(2)):
            want = call(queries[i, j], *arrays[1:3], tables[j], arrays[4])
            assert_close([r[i, j] for r in results], want)

    def test_one_custom_call(self):
        call, arrays = operator(GEOMETRY, "cpu")
        variants = self.variants(arrays)
        program = jax.jit(jax.vmap(call)).lower(*variants).as_text()
        assert program.count("custom_call @jax_nsa") == 1
        assert "while" not in program

    def test_an_illegal_id_does_not_reach_a_neighbours_pages(self):
        call, arrays = operator(GEOMETRY, "reference")
        variants = self.variants(arrays)
        num_pages = arrays[1].shape[0]
        variants[3] = variants[3].at[0, 0, 0].set(num_pages).at[1, 1, 0].set(-1)
        attention, indices, _ = jax.vmap(call)(*variants)
        for v, b in ((0, 0), (1, 1)):
            assert np.all(np.isnan(attention[v, b]))
            assert np.all(np.asarray(indices[v, b]) == -1)
        assert np.all(np.isfinite(attention[0, 1]))

    @pytest.mark.parametrize("counts", [[3, 3, 0], [9, 0, 1], [0, 6, 0], [2, -1, 2]], ids=str)
    def test_faulty_token_counts_spoil_neither_more_nor_less_than_alone(self, counts):
        call, arrays = operator(SEVERAL_TOKENS, "reference")
        variants = jnp.stack([jnp.array(counts), arrays[5], jnp.array(counts)])

        def of_counts(counts):
            return call(*arrays[:5], counts, *arrays[6:])

        results = jax.vmap(of_counts)(variants)
        assert np.all(np.isfinite(results[0][1]))
        for i in range(3):
            assert_close([r[i] for r in results], of_counts(variants[i]))

    def test_nothing_to_map(self):
        call, arrays = operator(GEOMETRY, "reference")
        none = jax.vmap(call, in_axes=(0, *[None] * 4))(arrays[0][None][:0], *arrays[1:])
        assert [r.shape for r in none] == [(0, *r.shape) for r in call(*arrays)]

    def test_static_lengths(self, implementation):
        arguments = build(GEOMETRY)
        queries = np.stack([arguments["query"], 2 * arguments["query"]])

        def call(query):
            lengths = arguments["actual_cmp_seq_kvlen"].tolist()
            return nsa_compress_attention_infer(
                **{**arguments, "query": query, "actual_cmp_seq_kvlen": lengths},
                implementation=implementation,
            )

        results = jax.vmap(call)(queries)
        for i in range(2):
            assert_close([r[i] for r in results], call(queries[i]))


@pytest.mark.parametrize("geometry", [GEOMETRY, SEVERAL_TOKENS], ids=["one token", "several"])
@pytest.mark.parametrize(
    "strictness", [lambda: jax.numpy_rank_promotion("raise"),
                   lambda: jax.numpy_dtype_promotion("strict")], ids=["ranks", "dtypes"]
)  # fmt: skip
def test_strict_promotion(implementation, geometry, strictness):
    """A user's strictness about their own code is not applied to the operator's."""
    call, arrays = operator(geometry, implementation)
    expected = call(*arrays)
    stacked = [jnp.stack([a, a]) for a in arrays]
    with strictness():
        assert_close(jax.jit(call)(*arrays), expected)
        assert_close([r[1] for r in jax.jit(jax.vmap(call))(*stacked)], expected)


class TestSharding:
    @pytest.fixture
    def mesh(self):
        return jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)

    def compile(self, mesh, call, arrays, specs):
        shardings = [NamedSharding(mesh, PartitionSpec(*s)) for s in specs]
        placed = [jax.device_put(a, s) for a, s in zip(arrays, shardings, strict=True)]
        return jax.jit(call).lower(*placed).compile(), placed

    @pytest.mark.parametrize(
        ("batch", "heads"),
        [("batch", "heads"), ("batch", None), (None, "heads"), (("batch", "heads"), None),
         (None, ("heads", "batch"))],
    )  # fmt: skip
    def test_sequences_and_heads_split_without_a_collective(
        self, implementation, mesh, batch, heads
    ):
        call, arrays = operator(GEOMETRY, implementation)
        specs = [(batch, heads), (None, None, heads), (None, None, heads), (batch,), (batch,)]
        program, placed = self.compile(mesh, call, arrays, specs)
        assert not re.findall("|".join(COLLECTIVES), program.as_text())
        results = program(*placed)
        for result in results:
            assert result.sharding.spec[:2] == PartitionSpec(batch, heads)[:2] or heads is None
        assert_close(results, call(*arrays))

    @pytest.mark.parametrize(
        "specs",
        [
            [("batch", "heads"), ("batch",), ("batch",), ("batch",), ("batch",)],
            [(None, None, "heads"), (), (), (), ()],
            [("batch",), (None, "heads"), (None, "heads"), (None, "batch"), ()],
            [(None, ("batch", "heads")), (None, None, "heads"), (None, None, "batch"), (), ()],
        ],
        ids=["pages", "head size", "rows of pages", "heads apart"],
    )
    def test_other_shardings_are_resharded(self, implementation, mesh, specs):
        call, arrays = operator(GEOMETRY, implementation)
        program, placed = self.compile(mesh, call, arrays, specs)
        assert_close(program(*placed), call(*arrays))

    def test_more_devices_than_key_value_heads(self, implementation, mesh):
        geometry = Geometry(lengths=(60, 17), key_value_heads=2, group=4, hostile=False)
        call, arrays = operator(geometry, implementation)
        specs = [(None, ("batch", "heads")), (), (), (), ()]
        program, placed = self.compile(mesh, call, arrays, specs)
        assert_close(program(*placed), call(*arrays))

    def test_several_tokens_split_by_heads(self, implementation, mesh):
        call, arrays = operator(SEVERAL_TOKENS, implementation)
        specs = [(None, "heads"), (None, None, "heads"), (None, None, "heads"), *[()] * 4]
        program, placed = self.compile(mesh, call, arrays, specs)
        assert not re.findall("|".join(COLLECTIVES), program.as_text())
        assert_close(program(*placed), call(*arrays))

    def test_kernel_sees_only_its_part(self, mesh):
        call, arrays = operator(GEOMETRY, "cpu")
        specs = [("batch", "heads"), *[(None, None, "heads")] * 2, ("batch",), ("batch",)]
        program, _ = self.compile(mesh, call, arrays, specs)
        target = "jax_nsa_compress_attention_cpu"
        kernels = [line for line in program.as_text().splitlines() if target in line]
        assert len(kernels) == 1
        assert "f32[2,1,4,8]" in kernels[0]  # 2 of 4 sequences, 4 of 8 heads

    def test_explicit_mesh(self, implementation):
        mesh = jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(AxisType.Explicit,) * 2)
        call, arrays = operator(GEOMETRY, implementation)
        pages = PartitionSpec(None, None, "heads")
        specs = [PartitionSpec("batch", "heads"), pages, pages, *[PartitionSpec("batch")] * 2]
        placed = [
            jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)
        ]
        expected = call(*arrays)
        for results in (call(*placed), jax.jit(call)(*placed)):
            assert_close(results, expected)
            for result in results:
                assert jax.typeof(result).sharding.spec[:2] == ("batch", "heads")
        # Host values are cut to fit.
        integers = [np.asarray(a) for a in arrays[3:]]
        assert_close(jax.jit(lambda *f: call(*f, *integers))(*placed[:3]), expected)
        # The pool of pages must stay whole.
        split = jax.device_put(arrays[1], NamedSharding(mesh, PartitionSpec("batch", None, None)))
        with pytest.raises(ValueError, match=r"key is sharded as .*batch.* must be"):
            jax.jit(call)(placed[0], split, *placed[2:])

    def test_several_tokens_on_an_explicit_mesh(self, implementation):
        mesh = jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(AxisType.Explicit,) * 2)
        geometry = Geometry(
            lengths=(60, 17, 5, 33), layout="BSND", tokens=3, token_counts=(2, 0, 3, 1),
            masked=True, slack=(0, 1, 0, 2), hostile=False, return_lse=True,
        )  # fmt: skip
        call, arrays = operator(geometry, implementation)
        expected = call(*arrays)

        def place(array, *spec):
            return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

        query, *pools = place(arrays[0], "batch"), *map(place, arrays[1:3])
        # Integers of the sequences may be whole, split as query is, or in no mesh.
        for specs in itertools.product(((), ("batch",)), repeat=3):
            integers = [place(a, *s) for a, s in zip(arrays[4:], specs, strict=True)]
            assert_close(call(query, *pools, arrays[3], *integers), expected)
        assert_close(jax.jit(call)(query, *pools, *arrays[3:]), expected)
        for i, name in enumerate((*ARRAYS[4:], *TOKENS)):
            integers = [place(a, *("heads",) * (i == j)) for j, a in enumerate(arrays[4:])]
            with pytest.raises(ValueError, match=rf"{name} is sharded as .*heads.* must be as"):
                jax.jit(call)(query, *pools, arrays[3], *integers)

    def test_split_token_counts_of_ragged_rows_are_refused(self):
        mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Explicit,))
        geometry = Geometry(lengths=(60, 17, 5, 33), token_counts=(2, 0, 3, 1), hostile=False)
        call, arrays = operator(geometry, "reference")
        *others, counts = (jax.device_put(a, NamedSharding(mesh, PartitionSpec())) for a in arrays)
        counts = jax.device_put(counts, NamedSharding(mesh, PartitionSpec("batch")))
        with pytest.raises(ValueError, match=r"actual_seq_qlen is sharded as .*batch.* must be as"):
            call(*others, counts)

    def test_vmap_on_an_explicit_mesh(self, implementation):
        mesh = jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(AxisType.Explicit,) * 2)
        call, arrays = operator(GEOMETRY, implementation)
        pages = PartitionSpec(None, None, "heads")
        specs = [PartitionSpec(None, "batch", "heads"), pages, pages, *[PartitionSpec("batch")] * 2]
        queries = jnp.stack([arrays[0], -arrays[0], 2 * arrays[0]])
        operands = [queries, *arrays[1:]]
        placed = [
            jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(operands, specs, strict=True)
        ]
        mapped = jax.vmap(call, in_axes=(0, *[None] * 4))
        for results in (mapped(*placed), jax.jit(mapped)(*placed)):
            for i in range(3):
                assert_close([r[i] for r in results], call(queries[i], *arrays[1:]))


class TestShardMap:
    @pytest.fixture
    def mesh(self):
        return jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)

    def shard_map(self, mesh, call, out):
        pages = PartitionSpec(None, None, "heads")
        row = PartitionSpec("batch")
        return jax.jit(
            jax.shard_map(
                call, mesh=mesh,
                in_specs=(PartitionSpec("batch", "heads"), pages, pages, row, row), out_specs=out,
            )
        )  # fmt: skip

    def test_batch_and_heads(self, implementation, mesh):
        whole, arrays = operator(GEOMETRY, implementation)
        part, _ = operator(GEOMETRY, implementation, head_num=4, key_value_head_num=2)
        split = self.shard_map(mesh, part, PartitionSpec("batch", "heads"))
        assert_close(split(*arrays), whole(*arrays))
        program = split.lower(*arrays).compile().as_text()
        assert not re.findall("|".join(COLLECTIVES), program)

    def test_manual_over_some_axes_only(self, implementation, mesh):
        call, arrays = operator(GEOMETRY, implementation)
        row, whole = PartitionSpec("batch"), PartitionSpec()
        split = jax.jit(
            jax.shard_map(
                call, mesh=mesh, in_specs=(row, whole, whole, row, row), out_specs=row,
                axis_names={"batch"},
            )
        )  # fmt: skip
        pages = PartitionSpec(None, None, "heads")
        specs = (PartitionSpec("batch", "heads"), pages, pages, row, row)
        placed = [
            jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)
        ]
        assert_close(split(*placed), call(*arrays))

    @pytest.mark.parametrize("axis", ["batch", "heads"])
    def test_wrong_out_specs_are_refused(self, mesh, axis):
        part, arrays = operator(GEOMETRY, "reference", head_num=4, key_value_head_num=2)
        out = PartitionSpec("batch") if axis == "heads" else PartitionSpec(None, "heads")
        with pytest.raises(ValueError, match="out_specs"):
            self.shard_map(mesh, part, out)(*arrays)

    def test_results_vary_as_any_operand_does(self, mesh):
        """Also where only the lengths differ between devices."""
        call, arrays = operator(GEOMETRY, "reference")
        lengths = jnp.concatenate([arrays[4], arrays[4] // 2])
        none = PartitionSpec()
        split = functools.partial(
            jax.shard_map, call, mesh=mesh, in_specs=(none,) * 4 + (PartitionSpec("batch"),)
        )
        with pytest.raises(ValueError, match="out_specs"):
            jax.jit(split(out_specs=none))(*arrays[:4], lengths)
        results = jax.jit(split(out_specs=PartitionSpec("batch")))(*arrays[:4], lengths)
        for i in range(2):
            part = slice(4 * i, 4 * i + 4)
            assert_close([r[part] for r in results], call(*arrays[:4], lengths[part]))
