"""A step on CUDA as one custom call: what the program holds; on a GPU, the same step to the bit."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kernels import need_cpu
from step.calls import PACKED, TOKENS, USUAL, step_of
from step.problems import arguments_of, steps

from jax_nsa import PagedKV, chain, export_disabled_checks, native, nsa_decode_step
from jax_nsa import step as step_module
from jax_nsa.backends import cuda

STEPS = {
    "one token": USUAL,
    "several tokens": TOKENS,
    "packed": PACKED,
    "aligned": replace(USUAL, importance="aligned"),
    "a window of its own": replace(USUAL, window_page=48),
}
STEP = "jax_nsa_step_cuda"
APART = ["jax_nsa_compress_attention_cuda", "jax_nsa_select_attention_cuda"]
CACHE = PagedKV(P(), P(), P("x"), P("x"))


def calls_in(text):
    return re.findall(r"custom_call @(\w+)", text)


def lowered(run, arrays, *platforms):
    return jax.jit(run).trace(*arrays).lower(lowering_platforms=platforms or ("cuda",)).as_text()


class TestProgram:
    """The program for a GPU, which need not be there, nor its kernels."""

    @pytest.fixture(autouse=True)
    def _compiled(self, monkeypatch):
        unavailable = native.unavailable
        monkeypatch.setattr(
            native, "unavailable", lambda b, o: None if b == cuda.NAME else unavailable(b, o)
        )
        monkeypatch.setattr(native, "needs_workspace", lambda _: True)
        monkeypatch.setattr(native, "workspace_bytes", lambda _: 256)

    @pytest.mark.parametrize("x64", [False, True])
    @pytest.mark.parametrize("name", STEPS)
    def test_one_call(self, name, x64):
        with jax.enable_x64(x64):
            run, arrays = step_of(arguments_of(STEPS[name]), None)
            assert calls_in(lowered(run, arrays)) == [STEP]

    def test_chosen_blocks_are_no_operand(self):
        """The kernel has them as its own result; zeros in their place would be written for none."""
        run, arrays = step_of(arguments_of(USUAL), None)
        [call] = re.findall(rf"@{STEP}\((.*?)\) {{(.*)}} : \((.*?)\) ->", lowered(run, arrays))
        operands, attributes, types = call
        assert operands.count("%") == types.count("tensor") == 10
        assert 'chosen_operands = "query key value block_table lengths topk_indices"' in attributes
        assert 'compressed_results = "attention topk_indices workspace"' in attributes
        assert 'chosen_results = "attention window_attention workspace"' in attributes
        assert "xi32" in types
        assert "x3xi32" not in types  # [2, 1, 2, 3], the blocks

    @pytest.mark.parametrize("name", STEPS)
    def test_export(self, name):
        run, arrays = step_of(arguments_of(STEPS[name]), None)
        export = jax.export.export(
            jax.jit(run), platforms=["cuda"],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(STEP)],
        )  # fmt: skip
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
        assert calls_in(export(*shapes).mlir_module()) == [STEP]

    @need_cpu("compress_attention", "select_attention")
    def test_each_platform_has_its_own(self):
        run, arrays = step_of(arguments_of(USUAL), None)
        operators = ["jax_nsa_compress_attention_cpu", "jax_nsa_select_attention_cpu"]
        assert calls_in(lowered(run, arrays, "cpu")) == operators
        assert calls_in(lowered(run, arrays, "cpu", "cuda")) == [*operators, STEP]

    def test_scan_and_vmap(self):
        run, arrays = step_of(arguments_of(USUAL), None)
        stacked = jax.tree.map(lambda x: jnp.stack([x, x]), arrays)
        assert calls_in(lowered(jax.vmap(run), stacked)) == [STEP]
        scan = functools.partial(jax.lax.scan, lambda _, x: (None, run(*x)), None)
        assert calls_in(lowered(lambda *x: scan(x), stacked)) == [STEP]

    def test_vmap_of_what_blocks_are_not_chosen_by(self):
        """They are chosen once for all mapped calls, and so are not theirs as they lie."""
        run, (query, gates, compressed, selected) = step_of(arguments_of(USUAL), None)
        stacked = jax.tree.map(lambda x: jnp.stack([x, x]), selected)
        mapped = jax.vmap(run, (None, None, None, 0))
        assert calls_in(lowered(mapped, (query, gates, compressed, stacked))) == APART

    @pytest.mark.parametrize("other", ["query", "blocks"])
    def test_what_is_not_handed_on(self, monkeypatch, other):
        """A query computed from the first call would be computed from zeros; or other blocks."""
        select = step_module.nsa_select_attention_infer

        def later(query, key, value, indices, **options):
            if other == "query":
                query = query + indices.sum().astype(query.dtype)
            else:
                indices = jnp.zeros_like(indices)
            return select(query, key, value, indices, **options)

        monkeypatch.setattr(step_module, "nsa_select_attention_infer", later)
        run, arrays = step_of(arguments_of(USUAL), None)
        assert calls_in(lowered(run, arrays)) == APART

    def test_one_call_alone(self, monkeypatch):
        """Without chosen blocks and a window there is nothing to make one."""
        none = lambda query, *_, **__: jnp.zeros((2, *query.shape[:-1], 1), query.dtype)  # noqa: E731
        monkeypatch.setattr(step_module, "nsa_select_attention_infer", none)
        run, arrays = step_of(arguments_of(USUAL), None)
        assert calls_in(lowered(run, arrays)) == APART[:1]

    @pytest.mark.parametrize("implementation", ["reference", ("reference", "cuda")])
    def test_another_implementation(self, implementation):
        run, arrays = step_of(arguments_of(USUAL), implementation)
        assert calls_in(lowered(run, arrays)) == []

    @pytest.mark.parametrize("refused", ["compress_attention", "select_attention"])
    def test_where_an_operator_has_another_implementation(self, monkeypatch, refused):
        refuses = cuda.refuses
        monkeypatch.setattr(
            cuda, "refuses",
            lambda call, p: "for once" if call.operator.target == refused else refuses(call, p),
        )  # fmt: skip
        run, arrays = step_of(arguments_of(USUAL), None)
        assert calls_in(lowered(run, arrays)) == [c for c in APART if refused not in c]

    def test_no_sequences(self):
        """Rows without a sequence have no kernel."""
        arguments = arguments_of(PACKED)
        none = {
            name: replace(arguments[name], block_table=arguments[name].block_table[:0],
                          lengths=arguments[name].lengths[:0])
            for name in ("compressed", "selected")
        }  # fmt: skip
        _, arrays = step_of(arguments | none, None)

        def run(counts, *arrays):
            return step_of(arguments | {"actual_seq_qlen": counts}, None)[0](*arrays)

        assert calls_in(lowered(run, [jnp.zeros(0, jnp.int32), *arrays])) == []

    @pytest.mark.parametrize("check", [False, True])
    def test_shard_map(self, check):
        run, arrays = step_of(arguments_of(USUAL), None)
        mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
        mapped = jax.shard_map(
            run, mesh=mesh, in_specs=(P("x"), P("x"), CACHE, CACHE), out_specs=(P("x"), P("x")),
            check_vma=check,
        )  # fmt: skip
        assert [c for c in calls_in(lowered(mapped, arrays)) if "nsa" in c] == [STEP]

    @pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
    def test_what_xla_splits_stays_apart(self, axis):
        run, arrays = step_of(arguments_of(USUAL), None)
        mesh = jax.make_mesh((2,), ("x",), axis_types=(axis,), devices=jax.devices()[:2])
        placed = jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
            tuple(arrays), (P("x"), P("x"), CACHE, CACHE),
        )  # fmt: skip
        with jax.set_mesh(mesh):
            text = lowered(run, placed)
        assert text.count("@CustomSPMDPartitioning(") == 2
        assert STEP not in text

    @pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
    def test_a_mesh_of_one_device(self, axis):
        run, arrays = step_of(arguments_of(USUAL), None)
        mesh = jax.make_mesh((1,), ("x",), axis_types=(axis,), devices=jax.devices()[:1])
        placed = jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
            tuple(arrays), (P("x"), P("x"), CACHE, CACHE),
        )  # fmt: skip
        with jax.set_mesh(mesh):
            assert [c for c in calls_in(lowered(run, placed)) if "nsa" in c] == [STEP]

    def test_derivative(self):
        def loss(implementation):
            run, arrays = step_of(arguments_of(USUAL), implementation)
            return jax.grad(lambda q: run(q, *arrays[1:])[0].sum()), arrays[:1]

        assert calls_in(lowered(*loss("reference"))) == []
        with pytest.raises(NotImplementedError, match="no derivative"):
            lowered(*loss(None))

    def test_outside_jit_nothing_is_traced(self, monkeypatch):
        monkeypatch.setattr(chain, "_bind", None)
        nsa_decode_step(**arguments_of(USUAL))


@pytest.fixture
def apart(monkeypatch):
    """A step as a program of its operators' calls."""

    def program(run):
        def composed(*arrays):
            with monkeypatch.context() as patch:
                patch.setattr(cuda, "joins_here", lambda: False)
                return run(*arrays)

        return jax.jit(composed)

    return program


def assert_same(results, expected):
    for one, other in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


STEPS_OF_SCAN = 5
SHORT, LONG = 4000, 60000  # tokens of each of its sequences


def scan_over_a_batch(length, tokens):
    """A scan over steps that keeps their results, and what each step has of its own."""
    sequences, heads, size, page, pages = 24, 4, 128, 128, 64
    compressed_length = (length - 32) // 16 + 1
    random = np.random.default_rng(length)

    def cache(rows):
        shape = STEPS_OF_SCAN, sequences, -(-rows // page)
        table = random.integers(0, pages, shape, np.int32)
        pool = random.standard_normal((2, pages, page, heads * size)).astype("bfloat16")
        lengths = jnp.full(sequences, rows, jnp.int32)
        return jnp.asarray(pool), jnp.asarray(table), lengths

    original, compressed = cache(length), cache(compressed_length)
    rows = STEPS_OF_SCAN, sequences * tokens, 64
    query = jnp.asarray(random.standard_normal((*rows, size)), "bfloat16")
    gates = jnp.asarray(random.uniform(0, 1, (*rows, 3)), jnp.float32)

    def step(_, own):
        query, gates, *tables = own
        caches = [
            PagedKV(pool[0], pool[1], table, lengths)
            for (pool, _, lengths), table in zip((compressed, original), tables, strict=True)
        ]
        return None, nsa_decode_step(
            query, gates, *caches, scale_value=size**-0.5, head_num=64,
            key_value_head_num=heads, select_block_size=64, select_block_count=16,
            compress_block_size=32, compress_stride=16, window_size=512,
            actual_seq_qlen=None if tokens == 1 else [tokens] * sequences,
        )  # fmt: skip

    own = query, gates, compressed[1], original[1]
    return (lambda *own: jax.lax.scan(step, None, own)[1]), own


@pytest.mark.cuda
class TestOnGpu:
    """The bits of the composed step."""

    def check(self, apart, run, arrays):
        assert_same(jax.jit(run)(*arrays), apart(run)(*arrays))

    @pytest.mark.parametrize("name", STEPS)
    def test_examples(self, apart, name):
        self.check(apart, *step_of(arguments_of(STEPS[name]), "cuda"))

    def test_any_step(self, apart):
        @given(steps())
        def holds(step):
            self.check(apart, *step_of(arguments_of(step), "cuda"))

        holds()

    def test_faults(self, apart):
        """Lengths that disagree, and pages that are not there."""
        arguments = arguments_of(USUAL)
        for cache, field, value in (
            ("selected", "lengths", 1), ("selected", "lengths", -1), ("compressed", "lengths", 99),
            ("selected", "block_table", 10**6), ("compressed", "block_table", -5),
        ):  # fmt: skip
            bad = np.array(getattr(arguments[cache], field), np.int32)
            bad[0] = value
            changed = {cache: replace(arguments[cache], **{field: bad})}
            run, arrays = step_of(arguments | changed, "cuda")
            results = jax.jit(run)(*arrays)
            assert np.isnan(np.asarray(results[0], np.float32)[0]).any(), (cache, field, value)
            assert_same(results, apart(run)(*arrays))

    @pytest.mark.parametrize("tokens", [1, 3])
    @pytest.mark.parametrize("length", [SHORT, LONG])
    def test_scan_over_a_batch(self, apart, length, tokens):
        """In a command buffer; of the longer sequences the second kernel begins early."""
        scan, own = scan_over_a_batch(length, tokens)
        program, expected = jax.jit(scan), apart(scan)(*own)
        for _ in range(20):
            assert_same(program(*own), expected)
        moved = jax.tree.map(jnp.array, own)  # other buffers
        assert_same(program(*moved), expected)

    @pytest.mark.parametrize("length", [SHORT, LONG])
    def test_what_the_profiler_sees_of_it(self, tmp_path, length):
        """Both kernels in command buffers, and the second one before the first is through."""
        scan, own = scan_over_a_batch(length, tokens=1)
        program = jax.jit(scan)
        jax.block_until_ready(program(*own))
        with jax.profiler.trace(tmp_path):
            jax.block_until_ready(program(*own))
        [profile] = tmp_path.glob("**/*.xplane.pb")
        kernels = {"CompressAttention": [], "SelectAttention": []}
        for plane in jax.profiler.ProfileData.from_file(str(profile)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for event in (event for line in plane.lines for event in line.events):
                for name in kernels:
                    if re.search(rf"\b{name}\b", event.name):
                        kernels[name].append((event.start_ns, event.end_ns, dict(event.stats)))
        if not any(kernels.values()):
            pytest.skip("the profiler sees no kernels, as without CUPTI")
        first, second = (sorted(found, key=lambda kernel: kernel[0]) for found in kernels.values())
        assert len(first) == len(second) == STEPS_OF_SCAN
        assert all("cuda_graph_id" in stats for *_, stats in (*first, *second))
        can = float(jax.devices()[0].compute_capability) >= 9
        early = [start < end for (_, end, _), (start, _, _) in zip(first, second, strict=True)]
        assert early == [can and length == LONG] * STEPS_OF_SCAN

    def test_split_over_two_gpus(self, apart):
        if len(jax.devices()) < 2:
            pytest.skip("one GPU only")
        run, arrays = step_of(arguments_of(USUAL), "cuda")
        mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
        mapped = jax.shard_map(
            run, mesh=mesh, in_specs=(P("x"), P("x"), CACHE, CACHE), out_specs=(P("x"), P("x"))
        )
        self.check(apart, mapped, arrays)

    def test_export(self, apart):
        run, arrays = step_of(arguments_of(USUAL), "cuda")
        export = jax.export.export(jax.jit(run), disabled_checks=export_disabled_checks())
        assert_same(export(*arrays).call(*arrays), apart(run)(*arrays))
