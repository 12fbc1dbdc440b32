"""What may be given as an array, and what is made of it on the way."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention.calls import FLOATS, INTEGERS
from compress_attention.examples import (
    BATCHED,
    LAYOUTS,
    ONE_TOKEN,
    PACKED,
    assert_right,
    assert_same,
    on_device,
    operator,
)
from compress_attention.problems import Geometry

from jax_nsa import checks, nsa_select_attention_infer, tokens

pytestmark = pytest.mark.timeout(120)

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
    # Python 3.12 tells of no instruction unless a frame has asked for them before it is traced.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    assert count, "nothing was traced"
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


@pytest.mark.parametrize(
    ("counts", "first_rows"),
    [((2, 1, 1), (0, 2, 3)), ((5, 0, 1), (0, 4, 4)), ((3, 2, 1), (0, 3, 4)), ((4, 0), (0, 4))],
)
def test_packed_rows_begin_within_the_query(counts, first_rows):
    """Sequences after a count that does not fit four rows own none of them."""
    query = jnp.zeros((4, 2, 8))
    known = checks.Integers("actual_seq_qlen", jnp.asarray(counts), rank=1)
    found = tokens.operands(query, known, sequences=len(counts), packed=True, tokens=4)
    np.testing.assert_array_equal(found["first_rows"], first_rows)
