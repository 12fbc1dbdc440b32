"""The whole decode step: each implementation against the operators' oracles, one after another."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from kernels import need_cpu
from step.agreement import assert_is_the_sum
from step.calls import PACKED, TOKENS, USUAL, step_of
from step.problems import Step, arguments_of, steps

from jax_nsa import (
    nsa_compress_attention_infer,
    nsa_decode_step,
    nsa_select_attention_infer,
)
from jax_nsa import step as step_module

# The last window ends with its sequence, so that a token before does not see it.
# Many blocks compete.
LONG = replace(USUAL.original, lengths=(480, 1024, 672), k=5)
STEPS = {
    "one token": USUAL,
    "tokens and rows without one": TOKENS,
    "packed": PACKED,
    "a window of its own": replace(TOKENS, window_page=48),
    "shorter than a window": Step(replace(TOKENS.original, lengths=(20, 3))),
    "two tokens of every sequence": Step(replace(LONG, layout="BSND", tokens=2)),
    "packed, the first tokens see less": Step(replace(LONG, token_counts=(2, 1, 2))),
    "aligned": Step(LONG, importance="aligned"),
    "other blocks forced": Step(LONG, init_blocks=0, local_blocks=1),
    "most blocks forced": Step(LONG, init_blocks=2, local_blocks=3),
}


# JAX raises XLA's InvalidArgument as one or the other.
FAILURES = (jax.errors.JaxRuntimeError, ValueError)


class StepContract:
    """What the step does by every implementation."""

    implementation: str
    fails_on_faults = False

    def check(self, step, **options):
        arguments = arguments_of(step)
        run, arrays = step_of(arguments, self.implementation, **options)
        assert_is_the_sum(*jax.jit(run)(*arrays), step, arguments)

    @pytest.mark.parametrize("name", STEPS)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_gated_sum(self, name, dtype):
        step = STEPS[name]
        self.check(replace(step, original=replace(step.original, dtype=dtype)))

    @pytest.mark.parametrize("gates", ["bfloat16", "float32"])
    def test_gates_of_either_dtype(self, gates):
        self.check(Step(replace(TOKENS.original, dtype="bfloat16"), gates=gates))

    def test_eager_with_host_integers(self):
        arguments = arguments_of(PACKED)
        results = nsa_decode_step(**arguments, implementation=self.implementation)
        assert_is_the_sum(*results, PACKED, arguments)

    @given(steps())
    def test_any_step(self, step):
        self.check(step)

    def test_is_the_operators_one_after_another(self):
        arguments = arguments_of(USUAL)
        attention, indices = nsa_decode_step(**arguments, implementation=self.implementation)
        compressed, selected = arguments["compressed"], arguments["selected"]
        common = {
            n: arguments[n]
            for n in ("query", "scale_value", "head_num", "key_value_head_num", "layout",
                      "select_block_size", "select_block_count")
        } | {"implementation": self.implementation}  # fmt: skip
        first, same_indices = nsa_compress_attention_infer(
            key=compressed.key, value=compressed.value, page_block_size=compressed.key.shape[1],
            block_table=compressed.block_table, actual_cmp_seq_kvlen=compressed.lengths,
            compress_block_size=32, compress_stride=16, **common,
        )  # fmt: skip
        others = nsa_select_attention_infer(
            key=selected.key, value=selected.value, page_block_size=selected.key.shape[1],
            block_table=selected.block_table, actual_seq_kvlen=selected.lengths,
            topk_indices=indices, window_size=arguments["window_size"], **common,
        )  # fmt: skip
        np.testing.assert_array_equal(indices, same_indices)
        branches = np.stack([first, *others], axis=-1)
        expected = (branches * arguments["gates"][:, :, None]).sum(axis=-1)
        np.testing.assert_allclose(attention, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("layout", "x64"), [("TND", False), ("BSND", False), ("TND", True)])
    def test_vmap(self, layout, x64):
        original = replace(USUAL.original, layout=layout, tokens=2, token_counts=(2, 1))
        problems = [Step(replace(original, seed=seed)) for seed in (0, 9)]
        every = [arguments_of(problem) for problem in problems]
        run, arrays = step_of(every[0], self.implementation)
        _, others = step_of(every[1], self.implementation)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), arrays, others)
        with jax.enable_x64(x64):
            attention, indices = jax.jit(jax.vmap(run))(*stacked)
        for i, (problem, arguments) in enumerate(zip(problems, every, strict=True)):
            assert_is_the_sum(attention[i], indices[i], problem, arguments)

    def test_vmap_over_gates_alone(self):
        arguments = arguments_of(TOKENS)
        run, (query, gates, *caches) = step_of(arguments, self.implementation)
        scaled = jax.vmap(lambda g: run(query, g, *caches)[0])(jnp.stack([gates, 2 * gates]))
        np.testing.assert_allclose(scaled[1], 2 * scaled[0], rtol=1e-5, atol=1e-6)

    def test_scan_that_keeps_and_uses_results(self):
        arguments = arguments_of(USUAL)
        run, (query, *arrays) = step_of(arguments, self.implementation)

        def body(carry, factor):
            attention, indices = run(query * factor, *arrays)
            return carry + indices.sum(), (attention, indices)

        total, kept = jax.jit(lambda q: jax.lax.scan(body, jnp.int32(0), q))(jnp.array([1.0, -0.5]))
        assert total == kept[1].sum()
        for i, factor in enumerate((1.0, -0.5)):
            attention, indices = run(query * factor, *arrays)
            np.testing.assert_array_equal(kept[1][i], indices)
            np.testing.assert_allclose(kept[0][i], attention, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("separate", [False, True])
    def test_a_bad_length_spoils_its_sequence_alone(self, separate):
        step = replace(USUAL, window_page=16 if separate else None)
        arguments = arguments_of(step)
        truth = nsa_decode_step(**arguments, implementation=self.implementation)
        selected = arguments["selected"]
        bad = replace(selected, lengths=np.array([100, 1000], np.int32))
        run, arrays = step_of(arguments | {"selected": bad}, self.implementation)
        if self.fails_on_faults:
            with pytest.raises(FAILURES, match=r"selected\.lengths\[1\] must be in \[0, .* 1000"):
                jax.block_until_ready(jax.jit(run)(*arrays))
        run, arrays = step_of(arguments | {"selected": bad}, self.implementation, on_fault="nan")
        attention, _ = jax.jit(run)(*arrays)
        np.testing.assert_allclose(attention[0], truth[0][0], rtol=1e-5, atol=1e-6)
        assert np.all(np.isnan(np.asarray(attention)[1]))


class TestReference(StepContract):
    implementation = "reference"


@need_cpu("compress_attention", "select_attention")
class TestCpu(StepContract):
    implementation = "cpu"
    fails_on_faults = True

    @pytest.mark.parametrize("cache", ["compressed", "selected", "window"])
    @pytest.mark.parametrize("layers", [None, 2])
    def test_faults_name_the_cache(self, cache, layers):
        arguments = arguments_of(replace(USUAL, window_page=48))
        for field, value, told in (
            ("lengths", 9999, r"lengths\[1\]"), ("block_table", -7, r"block_table\[1, 0\]")
        ):  # fmt: skip
            bad = np.array(getattr(arguments[cache], field), np.int32)
            bad[1] = value
            changed = {cache: replace(arguments[cache], **{field: bad})}
            run, (query, *arrays) = step_of(arguments | changed, "cpu")
            if layers is not None:  # a step under another transformation knows its caches, too
                run = jax.vmap(run, (0, *[None] * len(arrays)))
                query = jnp.stack([query] * layers)
            with pytest.raises(FAILURES, match=rf" {cache}\.{told}.* must be in .*got {value}"):
                jax.block_until_ready(jax.jit(run)(query, *arrays))


@pytest.mark.cuda
class TestCuda(StepContract):
    implementation = "cuda"

    def test_a_scan_that_keeps_results_has_one_call(self):
        run, (query, *arrays) = step_of(arguments_of(USUAL), "cuda")
        queries = jnp.stack([query, -query])
        scan = jax.jit(lambda q: jax.lax.scan(lambda _, q: (None, run(q, *arrays)), None, q))
        text = scan.lower(queries).compile().as_text()
        assert re.findall(r'custom_call_target="(jax_nsa_\w+)"', text) == ["jax_nsa_step_cuda"]


# The contract can fail: each wrong sum turns it red.

RIGHT = step_module.gated_sum


def without_zeros(gates, *branches, dtype):
    terms = (gates[..., i, None].astype(jnp.float32) * b for i, b in enumerate(branches))
    return jnp.asarray(sum(terms), dtype)


WRONG_SUMS = {
    "gates in another order": lambda g, c, s, w, **d: RIGHT(g[..., ::-1], c, s, w, **d),
    "gates of another head": lambda g, c, s, w, **d: RIGHT(jnp.roll(g, 1, -2), c, s, w, **d),
    "no window": lambda g, c, s, w, **d: RIGHT(g, c, s, 0 * w, **d),
    "selected for compressed": lambda g, c, s, w, **d: RIGHT(g, s, s, w, **d),
    "rows without a token by their gates": without_zeros,
}


@pytest.mark.parametrize("wrong", WRONG_SUMS)
def test_wrong_sum_is_caught(monkeypatch, wrong):
    monkeypatch.setattr(step_module, "gated_sum", WRONG_SUMS[wrong])
    with pytest.raises(AssertionError):
        TestReference().check(TOKENS)


# What is refused.


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gates": np.ones((2, 4, 2), np.float32)}, ValueError, r"gates must have shape \(2, 4, 3"),
        ({"gates": np.ones((2, 4, 3), np.float16)}, TypeError, "gates must have query's dtype"),
        ({"compressed": None}, TypeError, "compressed must be a PagedKV"),
        ({"selected": None}, TypeError, "selected must be a PagedKV"),
        ({"window": ()}, TypeError, "window must be a PagedKV"),
        ({"window_size": 0}, ValueError, "window_size must be"),
        ({"window_size": None}, TypeError, "window_size must be a Python integer, got None"),
        ({"window_size": True}, TypeError, "window_size must be a Python integer, got True"),
        ({"layout": "BSH"}, ValueError, "layout must be one of"),
        ({"query": np.ones((2, 4, 24), np.float16)}, TypeError, "query and compressed.key must"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        nsa_decode_step(**arguments_of(USUAL) | changes)


@pytest.mark.parametrize(
    ("cache", "field", "value", "message"),
    [
        ("compressed", "lengths", [9999, 1], r"compressed.lengths\[0\] must be in .* got 9999$"),
        ("selected", "lengths", [0.5, 1.0], r"selected.lengths must hold .*: \[0.5, 1.0\]$"),
        ("compressed", "block_table", None, "compressed.block_table is required, got None$"),
        ("selected", "block_table", None, "selected.block_table is required, got None$"),
        ("window", "block_table", None, "window.block_table is required, got None$"),
        ("window", "lengths", [9999, 1], r"window.lengths\[0\] must be in \[0, .* got 9999$"),
        (
            "selected", "value", np.zeros((32, 48, 16), np.float32),
            r"selected.value's second axis must be the second size of selected.key \(16\), got",
        ),
        (
            "compressed", "lengths", [1, 2, 3],
            r"compressed.lengths must have .* the 2 rows of compressed.block_table, got",
        ),
    ],
)  # fmt: skip
def test_refusals_tell_which_cache(cache, field, value, message):
    arguments = arguments_of(replace(USUAL, window_page=48))
    arguments[cache] = replace(arguments[cache], **{field: value})
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        nsa_decode_step(**arguments)


@pytest.mark.parametrize(
    "told",
    [
        "selected.block_table[1, 0] must be in [0, 8), the pages, got 99",  # named by a kernel
        "scale_value must be a real number, got 'value must' of type str",
        "importance must be one of ('cann', 'aligned'), got 'key'",
        "query's head size must be at most 128, where a value is as large as a key, got 160",
        "there are 2 key/value heads to go with them: these must be a multiple",
    ],
)
def test_what_names_no_argument_of_an_operator_stays(told):
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"), step_module._told_of("selected"):
        raise ValueError(told)


def test_what_an_argument_raises_itself_comes_through_whole():
    class Loaded:
        def __jax_array__(self):
            raise ValueError("cannot be read") from OSError("disk")

    with pytest.raises(ValueError, match=r"^cannot be read$") as raised:
        nsa_decode_step(**arguments_of(USUAL) | {"query": Loaded()})
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.traceback[-1].name == "__jax_array__"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 320, 2, 16), "multiple of 16 rows up to 256, got .*a dense .* reshape"),
        ((2, 4, 16, 3, 16), "got .*; .* reshape\\(-1, \\*shape\\[2:\\]\\)"),
        ((8, 2, 16, 16), "got .*; where heads come before rows, jnp.swapaxes"),
        ((8, 20, 16, 16), r"got \(8, 20, 16, 16\)$"),  # no axis is that of two heads
        ((4, 4096, 32), "got .*; a dense .*sequences, tokens, heads \\* size.* reshape"),
        # Two heads, or two sequences.
        ((2, 4096, 16), r"got .*; .*heads, tokens, size.* jnp.swapaxes.*dense \[sequences, tokens"),
        ((16, 24), "size\\], where a page has a multiple of 16 rows up to 256, got \\(16, 24\\)$"),
    ],
)
def test_caches_of_another_layout_are_told_how_they_become_pages(shape, message):
    arguments = arguments_of(USUAL)
    key = np.zeros(shape, arguments["selected"].key.dtype)
    arguments["selected"] = replace(arguments["selected"], key=key)
    with pytest.raises(ValueError, match=rf"selected.key must have shape \[pages, .*{message}"):
        nsa_decode_step(**arguments)


def test_more_tokens_than_stay_causal_are_refused():
    """Beyond them, a token would see compressed positions of tokens after it."""
    arguments = arguments_of(Step(replace(USUAL.original, layout="BSND", tokens=17)))
    with pytest.raises(ValueError, match=r"second axis must be at most compress_stride = 16.* 17"):
        nsa_decode_step(**arguments)
    counts = {"actual_seq_qlen": np.array([16, 17])}
    with pytest.raises(ValueError, match=r"actual_seq_qlen\[1\] must be at most .* got 17"):
        nsa_decode_step(**arguments | counts)
    nsa_decode_step(**arguments | {"actual_seq_qlen": np.array([3, 16])})


@pytest.mark.parametrize("legal", [{"layout": "BSND", "tokens": 16}, {"group": 16}])
def test_as_many_tokens_as_stay_causal_and_more_heads_are_not_refused(legal):
    nsa_decode_step(**arguments_of(Step(replace(USUAL.original, **legal))))


def test_refusals_of_what_is_in_no_cache_are_the_operators():
    with pytest.raises(ValueError, match=r"^scale_value must be finite in float32, got inf$"):
        nsa_decode_step(**arguments_of(USUAL) | {"scale_value": np.inf})
    special = UnicodeDecodeError("utf-8", b"", 0, 1, "key")
    with pytest.raises(UnicodeDecodeError) as caught, step_module._told_of("selected"):
        raise special
    assert caught.value is special


# What keeps a scan on a GPU from computing the compressed branch twice.


def test_indices_are_kept_and_read_behind_a_barrier():
    """XLA clones a custom call into the fusion that keeps its result, if others read it, too.

    On a GPU, `test_a_scan_that_keeps_results_has_one_call` counts the calls; this needs
    none.
    """
    run, arrays = step_of(arguments_of(USUAL), "reference")
    jaxpr = jax.make_jaxpr(run)(*arrays).jaxpr
    calls = {e.primitive.name: e for e in jaxpr.eqns}
    indices = calls["jax_nsa_compress_attention"].outvars[1]
    read = set(calls["jax_nsa_select_attention"].invars)

    def reached(start, *, stop):
        """What is computed from `start`, not going on behind the primitive `stop`."""
        found = {start}
        for equation in jaxpr.eqns:
            if equation.primitive.name != stop and found & set(equation.invars):
                found |= set(equation.outvars)
        return found

    everything = reached(indices, stop="jax_nsa_select_attention")
    assert jaxpr.outvars[1] in everything
    assert read & everything
    in_front = reached(indices, stop="optimization_barrier")
    assert jaxpr.outvars[1] not in in_front
    assert not read & in_front
