"""A step under an Ascend plugin as one custom call: the same step, with one wait."""

from __future__ import annotations

import contextlib
import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ascend.device_route import DeviceRoute
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from step.agreement import assert_is_the_sum
from step.calls import step_of
from step.problems import arguments_of
from test_ascend_step import DEVICE

from jax_nsa import PagedKV, export_disabled_checks
from jax_nsa.backends import ascend, decode_step

pytest_plugins = ("ascend.fixtures",)

USUAL = DEVICE["one token"]
HARNESS_WAITS = 1  # for each handler that it runs


@pytest.fixture
def apart(monkeypatch):
    """A context in which a step is composed of its operators' calls."""

    @contextlib.contextmanager
    def composed():
        with monkeypatch.context() as patch:
            patch.setattr(DeviceRoute, "joins_here", lambda _: False)
            yield

    return composed


class Counts:
    """What a warm program costs: waits for the stream, bytes that come to the host, handlers."""

    def __init__(self, standin, harness, program, *arrays):
        jax.block_until_ready(program(*arrays))
        handlers = []
        harness.on_entry = lambda: handlers.append(None)
        before = [standin.counter(n) for n in ("aclrtSynchronizeStream", "bytes to host")]
        self.results = jax.block_until_ready(program(*arrays))
        harness.on_entry = None
        waits, self.fetched = (
            standin.counter(n) - b
            for n, b in zip(("aclrtSynchronizeStream", "bytes to host"), before, strict=True)
        )
        self.handlers = len(handlers)
        self.waits = waits - HARNESS_WAITS * self.handlers


def assert_same(results, expected):
    for one, other in zip(results, expected, strict=True):
        one, other = (np.asarray(x).astype(np.float64) for x in (one, other))  # has NaN equal
        np.testing.assert_array_equal(one, other)


def lengths_known(run, arguments, *arrays):
    """The step with lengths that are constants of the program."""
    query, gates, *caches = arrays
    names = ("compressed", "selected", "window")
    known = [
        replace(cache, lengths=arguments[name].lengths)
        for name, cache in zip(names, caches, strict=False)
    ]
    return run(query, gates, *known)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", DEVICE)
def test_the_same_step_with_one_wait(standin, harness, apart, name, known):
    """To the bit. Of the chosen blocks none comes to the host, only what CANN wants there."""
    arguments = arguments_of(DEVICE[name])
    run, arrays = step_of(arguments, DeviceRoute.NAME)
    step = functools.partial(lengths_known, run, arguments) if known else run
    together = Counts(standin, harness, jax.jit(step), *arrays)
    with apart():
        one_by_one = Counts(standin, harness, jax.jit(lambda *a: step(*a)), *arrays)
    assert_same(together.results, one_by_one.results)
    assert_is_the_sum(*together.results, DEVICE[name], arguments)
    assert (together.handlers, one_by_one.handlers) == (1, 3)
    one_token = arguments.get("actual_seq_qlen") is None and arguments["query"].ndim == 3
    assert one_by_one.waits == 3 or known
    assert together.waits == min(one_by_one.waits, 1) == (not (known and one_token))
    assert together.fetched <= one_by_one.fetched
    if one_token:
        table, lengths = arguments["compressed"].block_table, arguments["compressed"].lengths
        assert together.fetched == (0 if known else 4 * (np.size(table) + 3 * len(lengths)))


class TestFaults:
    def changed(self, **changes):
        arguments = arguments_of(USUAL)
        for name, fields in changes.items():
            arguments[name] = replace(arguments[name], **fields)
        run, arrays = step_of(arguments, DeviceRoute.NAME)
        return jax.jit(run), arrays

    @pytest.mark.parametrize("lengths", [(300, 1), (300, -1), (130, 200), (300, 10**6)])
    def test_original_lengths_that_are_wrong(self, standin, harness, apart, lengths):
        """NaN for their sequence, as where the operators run one by one."""
        step, arrays = self.changed(selected={"lengths": np.array(lengths, np.int32)})
        attention, indices = step(*arrays)
        with apart():
            step, arrays = self.changed(selected={"lengths": np.array(lengths, np.int32)})
            assert_same((attention, indices), step(*arrays))
        bad = np.isnan(np.asarray(attention, np.float32)).all(axis=(1, 2))
        assert bad.tolist() == [lengths[0] != 300, lengths[1] != 200]

    def test_too_short_for_its_compressed_length_but_not_for_its_blocks(self, standin, harness):
        """The last block that it may choose begins at 256, past the end; it chose 0 and 3."""
        step, arrays = self.changed(selected={"lengths": np.array([250, 200], np.int32)})
        attention, indices = step(*arrays)
        assert indices[0].tolist() == [[0, 3]]
        bad = np.isnan(np.asarray(attention, np.float32)).all(axis=(1, 2))
        assert bad.tolist() == [True, False]

    def test_pages_that_are_wrong(self, standin, harness, apart):
        table = arguments_of(USUAL)["selected"].block_table.copy()
        table[1, 0] = 10**6
        step, arrays = self.changed(selected={"block_table": table})
        results = step(*arrays)
        with apart():
            step, arrays = self.changed(selected={"block_table": table})
            assert_same(results, step(*arrays))
        assert np.isnan(np.asarray(results[0], np.float32)).all(axis=(1, 2)).tolist() == [
            False,
            True,
        ]

    def test_no_room_for_the_blocks(self, standin, harness):
        """More compressed positions than the table of original tokens has pages for."""
        table = arguments_of(USUAL)["selected"].block_table[:, :2]
        step, arrays = self.changed(
            selected={"block_table": table, "lengths": np.array([100, 100], np.int32)}
        )
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"room for 128 tokens"):
            jax.block_until_ready(step(*arrays))

    def test_compressed_lengths_that_cann_cannot_serve(self, standin, harness):
        step, arrays = self.changed(compressed={"lengths": np.array([17, 0], np.int32)})
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"actual_cmp_seq_kvlen\[1\] = 0"):
            jax.block_until_ready(step(*arrays))


class TestTransformations:
    def many(self, count):
        every = [replace(USUAL, original=replace(USUAL.original, seed=i)) for i in range(count)]
        runs = [step_of(arguments_of(each), DeviceRoute.NAME) for each in every]
        return runs[0][0], jax.tree.map(lambda *x: jnp.stack(x), *(arrays for _, arrays in runs))

    def test_vmap(self, standin, harness):
        """All mapped steps are one call."""
        run, stacked = self.many(3)
        mapped = Counts(standin, harness, jax.jit(jax.vmap(run)), *stacked)
        assert (mapped.handlers, mapped.waits) == (1, 1)
        for i in range(3):
            alone = jax.jit(run)(*jax.tree.map(lambda x, i=i: x[i], stacked))
            assert_same([result[i] for result in mapped.results], alone)

    def test_vmap_of_what_blocks_are_not_chosen_by(self, standin, harness):
        """The same blocks for all mapped calls, chosen once: the calls stay apart."""
        run, stacked = self.many(2)
        query, gates, compressed, _ = jax.tree.map(lambda x: x[0], stacked)
        step = jax.jit(jax.vmap(run, in_axes=(None, None, None, 0)))
        mapped = Counts(standin, harness, step, query, gates, compressed, stacked[3])
        assert (mapped.handlers, mapped.waits) == (3, 3)
        for i in range(2):
            selected = jax.tree.map(lambda x, i=i: x[i], stacked[3])
            alone = jax.jit(run)(query, gates, compressed, selected)
            assert_same([result[i] for result in mapped.results], alone)

    def test_scan(self, standin, harness):
        run, stacked = self.many(2)
        scanned = jax.jit(lambda *a: jax.lax.scan(lambda c, x: (c, run(*x)), None, a)[1])
        counts = Counts(standin, harness, scanned, *stacked)
        assert (counts.handlers, counts.waits) == (2, 2)
        for i in range(2):
            alone = jax.jit(run)(*jax.tree.map(lambda x, i=i: x[i], stacked))
            assert_same([result[i] for result in counts.results], alone)

    def test_eager_and_differentiated(self, standin, harness):
        run, arrays = step_of(arguments_of(USUAL), DeviceRoute.NAME)
        assert_same(run(*arrays), jax.jit(run)(*arrays))
        with pytest.raises(NotImplementedError, match="no derivative"):
            jax.grad(lambda q: run(q, *arrays[1:])[0].sum().astype(jnp.float32))(arrays[0])
        with pytest.raises(NotImplementedError, match="no derivative"):
            jax.jit(jax.grad(lambda q: run(q, *arrays[1:])[0].sum().astype(jnp.float32)))(arrays[0])

    @pytest.mark.parametrize("check", [False, True])
    def test_shard_map(self, standin, harness, check):
        """Each device has its own call, and its own wait."""
        run, arrays = step_of(arguments_of(USUAL), DeviceRoute.NAME)
        mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
        cache = PagedKV(P(), P(), P("x"), P("x"))
        program = jax.jit(
            jax.shard_map(
                run, mesh=mesh, in_specs=(P("x"), P("x"), cache, cache),
                out_specs=(P("x"), P("x")), check_vma=check,
            )
        )  # fmt: skip
        counts = Counts(standin, harness, program, *arrays)
        assert (counts.handlers, counts.waits) == (2, 2)
        assert_same(counts.results, jax.jit(run)(*arrays))


class TestProgram:
    """The program for an Ascend platform, which need not be there."""

    @pytest.fixture(autouse=True)
    def _plugin(self, standin, monkeypatch):
        monkeypatch.setattr(ascend, "joins_here", lambda: True)

    def step(self):
        return step_of(arguments_of(USUAL), "ascend")

    def test_one_custom_call(self):
        run, arrays = self.step()
        text = jax.jit(run).trace(*arrays).lower(lowering_platforms=("ascend",)).as_text()
        assert text.count("stablehlo.custom_call @jax_nsa") == 1
        assert "@jax_nsa_step_ascend(" in text
        for branch in decode_step.BRANCHES:
            assert f"{branch}_host_lengths = dense<> : tensor<0xi64>" in text
            assert f"{branch}_release" in text

    def test_constant_lengths(self):
        arguments = arguments_of(USUAL)
        run, arrays = self.step()
        step = functools.partial(lengths_known, run, arguments)
        text = jax.jit(step).trace(*arrays).lower(lowering_platforms=("ascend",)).as_text()
        assert "compressed_host_lengths = dense<[17, 11]> : tensor<2xi64>" in text
        assert "chosen_host_lengths = dense<[300, 200]> : tensor<2xi64>" in text

    def test_on_the_host_the_operators_stay(self):
        run, arrays = self.step()
        text = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cpu",)).as_text()
        assert "@jax_nsa_select_attention_ascend_host(" in text
        assert "@jax_nsa_step" not in text

    def test_what_cannot_be_one_call_falls_apart(self):
        """CANN gives no aligned blocks; the reference does, and has no joint call."""
        arguments = arguments_of(replace(USUAL, importance="aligned"))
        run, arrays = step_of(arguments, ("ascend", "reference"))
        text = jax.jit(run).trace(*arrays).lower(lowering_platforms=("ascend",)).as_text()
        assert "@jax_nsa_select_attention_ascend(" in text
        assert "@jax_nsa_step" not in text

    @pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
    def test_what_xla_splits_falls_apart(self, axis):
        """On several devices XLA splits the operators, each by itself."""
        run, arrays = self.step()
        mesh = jax.make_mesh((2,), ("x",), axis_types=(axis,), devices=jax.devices()[:2])
        cache = PagedKV(P(), P(), P("x"), P("x"))
        placed = jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
            tuple(arrays), (P("x"), P("x"), cache, cache),
        )  # fmt: skip
        with jax.set_mesh(mesh):
            lowered = jax.jit(run).trace(*placed).lower(lowering_platforms=("ascend",))
        assert lowered.as_text().count("@CustomSPMDPartitioning(") == 2
        assert "@jax_nsa_step" not in lowered.as_text()

    def test_export(self):
        run, arrays = self.step()
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
        exported = jax.export.export(
            jax.jit(run), platforms=["ascend"], disabled_checks=export_disabled_checks()
        )(*shapes)
        assert "@jax_nsa_step_ascend(" in exported.mlir_module()

    def test_without_a_plugin_the_step_is_as_everywhere(self, monkeypatch):
        run, arrays = self.step()
        assert "jax_nsa_chain" in str(jax.make_jaxpr(run)(*arrays))
        monkeypatch.undo()
        assert not ascend.joins_here()
        run, arrays = self.step()
        assert "jax_nsa_chain" not in str(jax.make_jaxpr(run)(*arrays))


def test_blocks_are_ordered_once(standin, harness):
    """Those that the trace has before any are chosen are none that the call reads."""
    run, arrays = step_of(arguments_of(USUAL), DeviceRoute.NAME)
    program = jax.jit(run).lower(*arrays).compile().as_text()
    assert len(re.findall(r" sort\(", program)) == 1


def test_frames_that_lie(standin, harness, monkeypatch):
    """The handler holds the calls that it is made of to each other."""
    frames = []
    run_joint = harness.run_joint

    def keep(target, parts):
        frames.append((target, parts))
        return run_joint(target, parts)

    monkeypatch.setattr(harness, "run_joint", keep)
    run, arrays = step_of(arguments_of(USUAL), DeviceRoute.NAME)
    jax.block_until_ready(jax.jit(run)(*arrays))
    ((target, parts),) = frames

    def of(name, change):
        call, operands = parts[name]
        changed = [change(n, x) for n, x in zip(call.names, operands, strict=True)]
        return {**parts, name: (replace(call, operands=tuple(changed)), changed)}

    def one_block_more(name, operand):
        wider = [(0, 0)] * (operand.ndim - 1) + [(0, 1)]
        return np.pad(operand, wider) if name == "topk_indices" else operand

    def no_tokens(name, operand):
        return np.zeros_like(operand) if name == "lengths" else operand

    def few_tokens(name, operand):
        return np.ones_like(operand) if name == "lengths" else operand

    for changed, message in (
        (of("chosen_", one_block_more), "blocks are chosen for"),
        (of("chosen_", no_tokens), "lengths must be in"),
        (of("window_", no_tokens), "lengths must be in"),
        (of("chosen_", few_tokens), "may choose block 4"),
        ({**parts, "further_": parts["window_"]}, "belong to none"),
        ({n: p for n, p in parts.items() if n != "window_"}, "has no attribute"),
    ):
        with pytest.raises(Exception, match=message):
            run_joint(target, changed)
    run_joint(target, parts)
