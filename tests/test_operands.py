"""What may be given as an array, where it may lie, and what is made of it on the way."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention import oracle
from compress_attention.agreement import assert_agrees
from compress_attention.problems import Geometry, build
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from jax_nsa import nsa_compress_attention_infer, nsa_select_attention_infer

pytestmark = pytest.mark.timeout(120)

FLOATS = ("query", "key", "value")
INTEGERS = ("block_table", "actual_cmp_seq_kvlen", "actual_seq_qlen", "actual_sel_seq_kvlen")
IMPLEMENTATIONS = ("cpu", "reference")

ONE_TOKEN = Geometry(lengths=(40, 7), hostile=False, k=3)
PACKED = Geometry(lengths=(40, 7), token_counts=(1, 3), masked=True, slack=(2, 0), hostile=False)
BATCHED = Geometry(
    lengths=(40, 7), layout="BSND", tokens=3, token_counts=(3, 1), masked=True, slack=(0, 1),
    hostile=False, return_lse=True,
)  # fmt: skip
LAYOUTS = {"one token": ONE_TOKEN, "packed": PACKED, "batched": BATCHED}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


def operator(geometry, implementation="cpu"):
    """The operator as a function of its arrays by name, and those arrays in host memory."""
    static = build(geometry)
    arrays = {n: static.pop(n) for n in (*FLOATS, *INTEGERS) if n in static}
    static["implementation"] = implementation

    def call(**arrays):
        return nsa_compress_attention_infer(**static, **arrays)

    return call, arrays


def on_device(arrays):
    return {n: jnp.asarray(a) for n, a in arrays.items()}


def assert_right(results, geometry):
    expected = oracle.compress_attention(**build(geometry))
    assert_agrees(results, expected, attention_tolerance=1e-5)


def assert_same(results, others):
    for one, other in zip(results, others, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


# Objects that hold an array and offer it to JAX.


class Holder:
    """What libraries of neural networks call a variable."""

    def __init__(self, array):
        self.array = array

    def __jax_array__(self):
        return self.array


class TestObjects:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_operand(self, layout):
        call, arrays = operator(LAYOUTS[layout])
        held = {n: Holder(jnp.asarray(a)) for n, a in arrays.items()}
        assert_right(call(**held), LAYOUTS[layout])
        program = jax.jit(lambda arrays: call(**{n: Holder(a) for n, a in arrays.items()}))
        assert_right(program(on_device(arrays)), LAYOUTS[layout])
        assert_right(jax.jit(lambda: call(**held))(), LAYOUTS[layout])

    @pytest.mark.parametrize("name", [*FLOATS, *INTEGERS])
    def test_one_operand(self, name):
        call, arrays = operator(PACKED)
        arrays[name] = Holder(jnp.asarray(arrays[name]))
        assert_right(call(**arrays), PACKED)

    def test_rules_hold_for_what_they_hold(self):
        call, arrays = operator(ONE_TOKEN)
        with pytest.raises(TypeError, match="query and key must have the same dtype, got float32"):
            call(**arrays | {"key": Holder(jnp.asarray(arrays["key"], jnp.float16))})
        with pytest.raises(TypeError, match="actual_cmp_seq_kvlen must hold integers"):
            call(**arrays | {"actual_cmp_seq_kvlen": Holder(jnp.ones(2))})

    def test_flax_variables(self):
        nnx = pytest.importorskip("flax.nnx", reason="flax is not installed; it is optional")
        call, arrays = operator(BATCHED)
        variables = {n: nnx.Variable(jnp.asarray(a)) for n, a in arrays.items()}
        assert_right(call(**variables), BATCHED)
        assert_right(nnx.jit(lambda variables: call(**variables))(variables), BATCHED)

        class Cache(nnx.Module):
            def __init__(self):
                self.key = nnx.Variable(jnp.asarray(arrays["key"]))
                self.value = nnx.Param(jnp.asarray(arrays["value"]))
                self.lengths = nnx.Variable(jnp.asarray(arrays["actual_cmp_seq_kvlen"]))

        rest = {
            n: a for n, a in on_device(arrays).items()
            if n not in ("key", "value", "actual_cmp_seq_kvlen")
        }  # fmt: skip

        @nnx.jit
        def step(cache, rest):
            return call(
                key=cache.key, value=cache.value, actual_cmp_seq_kvlen=cache.lengths, **rest
            )

        assert_right(step(Cache(), rest), BATCHED)

    def test_equinox_modules(self):
        equinox = pytest.importorskip("equinox", reason="equinox is not installed; it is optional")
        call, arrays = operator(ONE_TOKEN)

        class Cast(equinox.Module):
            """An array that is kept in another form."""

            stored: jax.Array

            def __jax_array__(self):
                return self.stored[..., 0]

        modules = {n: Cast(jnp.asarray(a)[..., None]) for n, a in arrays.items()}
        assert_right(call(**modules), ONE_TOKEN)
        assert_right(equinox.filter_jit(lambda modules: call(**modules))(modules), ONE_TOKEN)


# No sequences, and sequences without a token.


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
    for given in (arrays, on_device(arrays)):
        for program in (call, jax.jit(call)):
            results = program(**given) if given is not arrays else call(**given)
            assert_none(results, [(0, 4, 8), (0, 2, 4)])


# Memory kinds.


def in_host_memory(array):
    return jax.device_put(array, SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"))


class TestMemoryKinds:
    """As jnp, which computes with no mixture of memories; the message names the argument."""

    @pytest.mark.parametrize("name", [*FLOATS, *INTEGERS])
    def test_one_operand_on_the_host(self, name):
        call, arrays = operator(PACKED)
        arrays = on_device(arrays)
        arrays[name] = in_host_memory(arrays[name])
        kept, moved = {n: a for n, a in arrays.items() if n != name}, arrays[name]
        stacked = {n: np.stack([a, a]) for n, a in kept.items()}
        programs = {
            "eager": lambda: call(**arrays),
            "jit": lambda: jax.jit(lambda arrays: call(**arrays))(arrays),
            "captured": lambda: jax.jit(lambda kept: call(**kept, **{name: moved}))(kept),
            "vmap": lambda: jax.vmap(lambda kept: call(**kept, **{name: moved}))(stacked),
        }
        for way, program in programs.items():
            with pytest.raises(ValueError, match=rf"{name} must .*[Hh]ost"):
                print(way, program())

    def test_moved_within_the_program(self, implementation):
        call, arrays = operator(ONE_TOKEN, implementation)

        @jax.jit
        def program(arrays):
            return call(**arrays | {"key": jax.device_put(arrays["key"], jax.memory.Space.Host)})

        with pytest.raises(ValueError, match=r"key must .*[Hh]ost"):
            program(on_device(arrays))

    def test_all_operands_on_the_host(self, implementation):
        call, arrays = operator(ONE_TOKEN, implementation)
        arrays = {n: in_host_memory(a) for n, a in arrays.items()}
        for program in (call, jax.jit(call)):
            with pytest.raises(ValueError, match=r"query must .*[Hh]ost"):
                program(**arrays)

    def test_moved_back_within_the_program(self, implementation):
        call, arrays = operator(ONE_TOKEN, implementation)
        arrays = on_device(arrays)
        key = in_host_memory(arrays.pop("key"))

        @jax.jit
        def program(key, arrays):
            return call(key=jax.device_put(key, jax.memory.Space.Device), **arrays)

        assert_right(program(key, arrays), ONE_TOKEN)


# Checks of host values.


def steps_taken(function):
    """Runs a function, and counts the instructions that Python executes for it."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


class TestWork:
    """Checks are NumPy's work, whatever the size: Python's does not grow with it."""

    def steps(self, sequences, columns, **changes):
        """Python's steps for an eager call with so large a table, in host memory."""
        geometry = replace(
            Geometry(
                lengths=(16 * columns,) * sequences, shared_pages=True, spare_slots=0, group=1,
                key_value_heads=1, head_size=1, value_size=1, k=1,
                hostile=False,
            ),
            **changes,
        )  # fmt: skip
        call, arrays = operator(replace(geometry, lengths=geometry.lengths[:1],
            **({"token_counts": (1,)} if geometry.token_counts else {}),
            **({"slack": (0,)} if geometry.slack else {})))  # fmt: skip
        table = np.tile(arrays["block_table"], (sequences, 1))
        arrays = {
            n: a if n in ("key", "value") else np.repeat(a, sequences, axis=0)
            for n, a in arrays.items()
        } | {"block_table": table}
        # Page ids and lengths differ from one sequence to the next, as they do in service.
        arrays["actual_cmp_seq_kvlen"] = (
            arrays["actual_cmp_seq_kvlen"] - np.arange(sequences) % 3
        ).astype(np.int32)
        if "actual_sel_seq_kvlen" in arrays:
            arrays["actual_sel_seq_kvlen"] = (arrays["actual_cmp_seq_kvlen"] - 1) * 16 + 32
        jax.block_until_ready(call(**arrays))  # compiles
        jax.block_until_ready(call(**arrays))
        return steps_taken(lambda: call(**arrays))

    @pytest.mark.parametrize(
        "changes",
        [{}, {"token_counts": (1,)}, {"token_counts": (1,), "masked": True, "slack": (0,)}],
        ids=["one token", "ragged", "masked"],
    )
    def test_grows_with_neither_sequences_nor_columns(self, changes):
        small = self.steps(4, 2, **changes)
        assert self.steps(256, 512, **changes) <= small + 200
        assert self.steps(2048, 8, **changes) <= small + 200

    def test_finds_a_bad_id_at_the_end(self):
        call, arrays = operator(ONE_TOKEN)
        table = np.tile(np.arange(4, dtype=np.int32), (256, 128))
        arrays = arrays | {
            "query": np.tile(arrays["query"][:1], (256, 1, 1)),
            "actual_cmp_seq_kvlen": np.full(256, 512 * 16),
        }
        table[255, 511] = 5

        def refused():
            with pytest.raises(ValueError, match=r"block_table\[255, 511\] must be in \[0, 5\)"):
                call(**arrays, block_table=table)

        arrays.pop("block_table")
        refused()
        assert steps_taken(refused) < 20_000


# Arrays that their owner changes.


@functools.partial(jax.jit, static_argnums=1)
def slowly(array, rounds):
    """The same array, some time later."""
    work = jnp.full((256, 256), 1 / 256)
    work = jax.lax.fori_loop(0, rounds, lambda _, w: jnp.tanh(w @ work), work)
    return array + 0 * work[0, 0]


def aligned(array):
    """A copy that begins where JAX's CPU arrays do, so that JAX may take it as it is."""
    memory = np.zeros(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class TestChangesByTheCaller:
    """What was checked is what is used."""

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("name", INTEGERS)
    def test_while_a_step_is_in_flight(self, layout, name):
        call, arrays = operator(LAYOUTS[layout])
        if name not in arrays:
            pytest.skip("the call has no such argument")
        expected = jax.block_until_ready(call(**arrays))
        given = arrays | {n: aligned(arrays[n]) for n in INTEGERS if n in arrays}
        jax.block_until_ready(slowly(jnp.asarray(arrays["query"]), 300))  # compiles
        query = slowly(jnp.asarray(arrays["query"]), 300)
        results = call(**given | {"query": query})
        given[name][...] = -12345
        assert_same(results, expected)

    @pytest.mark.parametrize("name", INTEGERS)
    def test_of_what_a_program_captured(self, name):
        call, arrays = operator(replace(PACKED, lengths=(24, 9)))
        expected = jax.jit(lambda query: call(**arrays | {"query": query}))(arrays["query"])
        given = arrays | {n: aligned(arrays[n]) for n in INTEGERS}
        program = jax.jit(lambda query: call(**given | {"query": query}))
        traced = program.trace(arrays["query"])
        before = given[name].copy()
        given[name][...] = -12345
        lowered = traced.lower()
        given[name][...] = -54321
        compiled = lowered.compile()
        assert_same(compiled(arrays["query"]), expected)
        # The same of a program that has run before.
        given[name][...] = before
        assert_same(program(arrays["query"]), expected)
        given[name][...] = -12345
        assert_same(program(arrays["query"]), expected)


# Transfers between host and device.


class TestTransfers:
    """With everything on the device, an eager call moves nothing between it and the host."""

    @pytest.mark.parametrize("layout", [*LAYOUTS, "counts alone", "mask alone", "lse"])
    def test_eager(self, implementation, layout):
        geometry = (LAYOUTS | {
            "counts alone": replace(PACKED, masked=False, slack=None),
            "mask alone": replace(BATCHED, token_counts=None, lengths=(40, 37)),
            "lse": replace(PACKED, return_lse=True),
        })[layout]  # fmt: skip
        call, arrays = operator(geometry, implementation)
        arrays = on_device(arrays)
        with jax.transfer_guard("disallow"):
            results = call(**arrays)
        assert_right(results, geometry)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("mapped", ["all", "query", "all but pools"])
    def test_vmap(self, layout, mapped):
        geometry = LAYOUTS[layout]
        call, arrays = operator(geometry)
        arrays = on_device(arrays)
        axes = {
            n: 0 if mapped == "all" or n == mapped or (mapped != "query" and n not in FLOATS[1:])
            else None for n in arrays
        }  # fmt: skip
        stacked = {n: a if axes[n] is None else jnp.stack([a, a]) for n, a in arrays.items()}
        with jax.transfer_guard("disallow"):
            results = jax.vmap(lambda arrays: call(**arrays), in_axes=(axes,))(stacked)
        for i in range(2):
            assert_right([np.asarray(r)[i] for r in results], geometry)

    def test_nested_vmap(self, implementation):
        call, arrays = operator(PACKED, implementation)
        stacked = {n: jnp.stack([jnp.stack([a, a])] * 2) for n, a in on_device(arrays).items()}
        with jax.transfer_guard("disallow"):
            results = jax.vmap(jax.vmap(lambda arrays: call(**arrays)))(stacked)
        assert_right([np.asarray(r)[1, 0] for r in results], PACKED)

    def test_pools_with_an_axis_of_heads(self, implementation):
        call, arrays = operator(BATCHED, implementation)
        arrays = on_device(arrays)
        for name in ("key", "value"):
            arrays[name] = arrays[name].reshape(*arrays[name].shape[:2], 2, -1)
        with jax.transfer_guard("disallow"):
            results = call(**arrays)
        assert_right(results, BATCHED)

    def test_gradient(self):
        call, arrays = operator(PACKED, "reference")
        arrays = on_device(arrays)
        query = arrays.pop("query")
        with jax.transfer_guard("disallow"):
            gradient = jax.jit(jax.grad(lambda query: call(query=query, **arrays)[0].sum()))(query)
        assert np.all(np.isfinite(np.asarray(gradient)))

    def test_other_integers(self, implementation):
        call, arrays = operator(PACKED, implementation)
        arrays = on_device(arrays)
        small = {n: arrays[n].astype(jnp.int16) for n in INTEGERS}
        with jax.transfer_guard("disallow"):
            results = call(**arrays | small)
        assert_right(results, PACKED)


SELECT = {
    "key": np.ones((4, 16, 2 * 16), np.float32),
    "value": np.ones((4, 16, 2 * 16), np.float32),
    "scale_value": 0.25, "head_num": 4, "key_value_head_num": 2, "select_block_size": 16,
    "select_block_count": 2, "page_block_size": 16, "layout": "TND",
    "block_table": np.array([[0, 1], [2, 3]], np.int32), "actual_seq_kvlen": [20, 30],
}  # fmt: skip
IDS = np.array([[[0, 1], [1, -1]]] * 2, np.int32)


def test_indices_that_an_object_holds():
    query = np.ones((2, 4, 16), np.float32)
    expected = nsa_select_attention_infer(query, topk_indices=IDS, **SELECT)
    held = nsa_select_attention_infer(query, topk_indices=Holder(jnp.array(IDS)), **SELECT)
    np.testing.assert_array_equal(held, expected)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[[1, 2], [1]], [[0], [0]]], "topk_indices must be .* all rows of one length"),
        ([[0, 1], [1, 0]], "topk_indices must have rank 3, got shape"),
    ],
)
def test_lists_of_indices_are_told_what_is_wrong(ids, message):
    with pytest.raises((TypeError, ValueError), match=message):
        nsa_select_attention_infer(np.ones((2, 4, 16), np.float32), topk_indices=ids, **SELECT)


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
