"""What bad run-time values do, on one device and on several, and how messages name them."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention import oracle
from compress_attention.agreement import assert_agrees
from compress_attention.problems import Geometry, build
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_nsa import nsa_compress_attention_infer

pytestmark = pytest.mark.timeout(120)

REPOSITORY = pathlib.Path(__file__).parent.parent
FLOATS = ("query", "key", "value")
INTEGERS = ("block_table", "actual_cmp_seq_kvlen", "actual_seq_qlen", "actual_sel_seq_kvlen")
FAILURES = (ValueError, jax.errors.JaxRuntimeError)  # JAX raises InvalidArgument as one or other

GEOMETRY = Geometry(
    lengths=(40, 17, 9, 33), k=3, return_lse=True, hostile=False, spare_slots=0,
)  # fmt: skip
PACKED = replace(GEOMETRY, token_counts=(1, 2, 0, 3), masked=True, slack=(0, 1, 2, 3))
BATCHED = replace(PACKED, layout="BSND", tokens=3)
NAMES = {id(GEOMETRY): "TND", id(PACKED): "packed", id(BATCHED): "BSND"}


def operator(geometry, implementation="cpu", **options):
    """The operator as a function of its arrays by name, and those arrays in host memory."""
    static = build(geometry)
    arrays = {n: static.pop(n) for n in (*FLOATS, *INTEGERS) if n in static}
    static |= {"implementation": implementation} | options

    def call(**arrays):
        return nsa_compress_attention_infer(**static, **arrays)

    return call, arrays


def on_device(arrays):
    return {n: jnp.asarray(a) for n, a in arrays.items()}


def message_of(function, *arguments):
    """What a call that must fail says."""
    with pytest.raises(FAILURES) as failure:
        jax.block_until_ready(function(*arguments))
    return str(failure.value)


def assert_spoilt(results, geometry, rows):
    """Asserts that these rows are NaN and -1, and that the others are right."""
    rows = list(rows)
    for result in map(np.asarray, results):
        blank = result[rows] == -1 if result.dtype == np.int32 else np.isnan(result[rows])
        assert np.all(blank)
    others = [row for row in range(len(results[0])) if row not in rows]
    if not others:
        return
    expected = oracle.compress_attention(**build(geometry))
    assert_agrees(tuple(results), expected, attention_tolerance=1e-5, rows=others)


# Several devices. The tests run processes of their own: before a device that fails, the others
# wait, and XLA ends the process that waits too long.


FAULTS = {
    "page": ("block_table", (3, 0), 77),
    "negative page": ("block_table", (2, 0), -5),
    "length": ("actual_cmp_seq_kvlen", (3,), 1000),
    "all pages": ("block_table", ..., 2**31 - 1),
}
MESHES = ("automatic", "explicit", "shard_map", "set_mesh")


# What is called, what is wrong, whether a sum follows, and the options of the call.
CASES = {
    **{how: (how, "page", True, {}) for how in MESHES},
    "length": ("automatic", "length", True, {}),
    "all pages": ("automatic", "all pages", True, {}),
    "on demand": ("shard_map", "page", True, {"on_fault": "nan"}),
    "failing": ("automatic", "negative page", False, {"on_fault": "fail"}),
}


def several_devices(case):
    """Runs a call with a bad value on two devices; prints what came of it, as JSON."""
    how, fault, followed, options = CASES[case]
    call, arrays = operator(GEOMETRY, **options)
    name, index, value = FAULTS[fault]
    arrays[name][index] = value
    axis_type = AxisType.Explicit if how == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2,), ("x",), axis_types=(axis_type,))
    row, whole = PartitionSpec("x"), PartitionSpec()
    specs = {n: whole if n in ("key", "value") else row for n in arrays}
    placed = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in arrays.items()}

    def program(arrays):
        results = call(**arrays)
        total = results[0].sum() if followed else 0.0
        if how == "shard_map" and followed:
            total = jax.lax.psum(total, "x")
        return results, total

    if how == "shard_map":
        program = jax.shard_map(
            program, mesh=mesh, in_specs=(specs,), out_specs=((row, row, row), whole)
        )
    stated = jax.set_mesh(mesh) if how == "set_mesh" else contextlib.nullcontext()
    try:
        with stated:
            results, total = jax.block_until_ready(jax.jit(program)(placed))
        outcome = {"results": [np.asarray(r).tolist() for r in results], "total": float(total)}
    except FAILURES as failure:
        outcome = {"failure": str(failure)}
    print("OUTCOME", json.dumps({case: outcome}), flush=True)


def main():
    """Runs all cases, the failing one last."""
    jax.config.update("jax_num_cpu_devices", 2)
    for case in CASES:
        several_devices(case)
    os._exit(0)  # whatever a device that failed has left behind


@pytest.fixture(scope="module")
def outcomes():
    """What came of each case, for as long as the process lived."""
    path = os.pathsep.join([str(REPOSITORY / "tests"), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-c", "import test_fault_messages as t; t.main()"], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
    found = {}
    for line in output.splitlines():
        if line.startswith("OUTCOME "):
            found |= json.loads(line.removeprefix("OUTCOME "))
    for outcome in found.values():
        if "results" in outcome:
            pairs = zip(outcome["results"], (np.float32, np.int32, np.float32), strict=True)
            outcome["results"] = [np.array(r, d) for r, d in pairs]
    return {case: found.get(case, {"never came": errors[-2000:]}) for case in CASES}


class TestSeveralDevices:
    @pytest.mark.parametrize("case", [case for case in CASES if case != "failing"])
    def test_collectives_are_reached(self, outcomes, case):
        """A following sum needs all devices; the bad sequence is NaN, the others are right."""
        assert "results" in outcomes[case], outcomes[case]
        rows = range(4) if case == "all pages" else [3]
        assert_spoilt(outcomes[case]["results"], GEOMETRY, rows)
        assert np.isnan(outcomes[case]["total"])

    def test_failing_on_demand(self, outcomes):
        """With nothing that waits for all devices; the message's row is the user's."""
        assert "failure" in outcomes["failing"], outcomes["failing"]
        message = outcomes["failing"]["failure"]
        named = re.search(r"block_table\[(\d), 0\] (.*)", message)
        # A device knows its own part; it must not pass for the whole.
        assert named[1] == "2" or "device" in named[2] or "part" in named[2], message
        assert "got -5" in named[2]


# One device.


class TestOneDevice:
    @pytest.mark.parametrize("geometry", [GEOMETRY, PACKED, BATCHED], ids=["TND", "packed", "BSND"])
    @pytest.mark.parametrize("on_fault", [None, "fail"])
    def test_fails(self, geometry, on_fault):
        call, arrays = operator(geometry, on_fault=on_fault)
        arrays["block_table"][1, 0] = 77
        arrays = on_device(arrays)
        for program in (call, jax.jit(call)):
            assert "block_table[1, 0] must be in" in message_of(lambda p=program: p(**arrays))

    def test_fails_by_default_wherever_one_device_is_stated(self):
        call, arrays = operator(GEOMETRY)
        arrays["block_table"][1, 0] = 77
        for axis_type in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((1,), ("x",), axis_types=(axis_type,))
            sharding = NamedSharding(mesh, PartitionSpec("x"))
            placed = {
                n: jax.device_put(a, NamedSharding(mesh, PartitionSpec())
                                  if n in ("key", "value") else sharding)
                for n, a in arrays.items()
            }  # fmt: skip
            with jax.set_mesh(mesh):
                assert "block_table[1, 0]" in message_of(lambda p=placed: jax.jit(call)(**p))

    @pytest.mark.parametrize(
        ("geometry", "name", "index", "value", "rows"),
        [
            (GEOMETRY, "block_table", (1, 1), 77, [1]),
            (GEOMETRY, "block_table", (1, 1), -1, [1]),
            (GEOMETRY, "actual_cmp_seq_kvlen", 0, -1, [0]),
            (GEOMETRY, "actual_cmp_seq_kvlen", 2, 2**31 - 1, [2]),
            (PACKED, "block_table", (1, 0), 77, [1, 2]),
            (PACKED, "actual_cmp_seq_kvlen", 3, 1000, [3, 4, 5]),
            (PACKED, "actual_sel_seq_kvlen", 1, 5000, [1, 2]),
            (PACKED, "actual_seq_qlen", 1, -1, [1, 2, 3, 4, 5]),
            (BATCHED, "actual_seq_qlen", 1, 4, [1]),
            (BATCHED, "block_table", (3, 2), -(2**31), [3]),
        ],
        ids=lambda value: NAMES.get(id(value)),
    )
    def test_gives_nan_on_demand(self, geometry, name, index, value, rows):
        call, arrays = operator(geometry, on_fault="nan")
        arrays[name][index] = value
        arrays = on_device(arrays)
        for program in (call, jax.jit(call)):
            assert_spoilt(program(**arrays), geometry, rows)

    @pytest.mark.parametrize("on_fault", [None, "fail", "nan"])
    def test_reference_never_fails(self, on_fault):
        call, arrays = operator(PACKED, "reference", on_fault=on_fault)
        arrays["block_table"][1, 0] = 77
        assert_spoilt(call(**on_device(arrays)), PACKED, [1, 2])

    def test_gives_nan_on_demand_in_transformations(self):
        call, arrays = operator(GEOMETRY, on_fault="nan")
        arrays = on_device(arrays)
        tables = jnp.stack([arrays["block_table"]] * 3).at[1, 2, 0].set(77)
        rest = {n: a for n, a in arrays.items() if n != "block_table"}

        def step(table):
            return call(block_table=table, **rest)

        mapped = jax.vmap(step)(tables)
        scanned = jax.lax.scan(lambda c, t: (c, step(t)), 0, tables)[1]
        for results in (mapped, scanned):
            for i in range(3):
                rows = [2] if i == 1 else []
                assert_spoilt([np.asarray(r)[i] for r in results], GEOMETRY, rows)

    def test_known_values_are_refused_all_the_same(self):
        call, arrays = operator(GEOMETRY, on_fault="nan")
        arrays["block_table"][1, 0] = 77
        with pytest.raises(ValueError, match=r"block_table\[1, 0\] must be in .* got 77"):
            call(**arrays)

    @pytest.mark.parametrize("value", ["", "Fail", "raise", 1, True, ("nan",)], ids=repr)
    def test_other_wishes_are_refused(self, value):
        call, arrays = operator(GEOMETRY, on_fault=value)
        with pytest.raises((TypeError, ValueError), match=r"on_fault must .*fail.*nan.*got "):
            call(**arrays)


# Messages name what the user passed.


def stacked(arrays, names, axis=0, count=3):
    """These arrays `count` times along a new axis, in host memory; and in_axes."""
    axes = {n: axis if n in names else None for n in arrays}
    return {
        n: np.stack([a] * count, axis=axis) if n in names else a for n, a in arrays.items()
    }, axes


EVERYTHING = (*FLOATS, *INTEGERS)


class TestMessages:
    @pytest.mark.parametrize(
        "mapped",
        [("block_table",), ("key", "value", "block_table"), EVERYTHING],
        ids=["table", "pools and table", "all"],
    )
    @pytest.mark.parametrize("geometry", [GEOMETRY, PACKED, BATCHED], ids=["TND", "packed", "BSND"])
    @pytest.mark.parametrize("value", [77, -3])
    def test_page_under_vmap(self, geometry, mapped, value):
        call, arrays = operator(geometry)
        pages = len(arrays["key"])
        many, axes = stacked(arrays, mapped)
        many["block_table"][2, 1, 0] = value
        many = on_device(many)
        program = jax.vmap(lambda arrays: call(**arrays), in_axes=(axes,))
        for function in (program, jax.jit(program)):
            message = message_of(function, many)
            assert (
                f"block_table[1, 0] at index 2 of jax.vmap must be in [0, {pages}), the pages of "
                f"key and value, got {value}" in message
            ), message

    def test_pool_that_is_mapped_beside_a_whole_table(self):
        call, arrays = operator(GEOMETRY)
        arrays["block_table"][1, 0] = 77
        many, axes = stacked(arrays, ("key", "value"))
        program = jax.vmap(lambda arrays: call(**arrays), in_axes=(axes,))
        message = message_of(program, on_device(many))
        assert re.search(
            r"block_table\[1, 0\] at index \d of jax.vmap must be in \[0, \d+\), .*, got 77",
            message,
        ), message
        assert f"[0, {len(arrays['key'])})" in message

    def test_first_page_past_a_mapped_pool(self):
        """Nor does it reach into a neighbour's."""
        call, arrays = operator(GEOMETRY)
        pages = len(arrays["key"])
        many, axes = stacked(arrays, EVERYTHING)
        many["block_table"][0, 3, 1] = pages
        program = jax.vmap(lambda arrays: call(**arrays), in_axes=(axes,))
        message = message_of(program, on_device(many))
        assert f"block_table[3, 1] at index 0 of jax.vmap must be in [0, {pages})" in message
        assert f"got {pages}" in message

    @pytest.mark.parametrize("axis", [1, -1])
    def test_other_axes(self, axis):
        call, arrays = operator(GEOMETRY)
        many, axes = stacked(arrays, ("block_table",), axis=axis)
        table = np.moveaxis(many["block_table"], axis, 0)
        table[1, 2, 0] = 77
        program = jax.vmap(lambda arrays: call(**arrays), in_axes=(axes,))
        message = message_of(program, on_device(many))
        assert "block_table[2, 0] at index 1 of jax.vmap must" in message

    @pytest.mark.parametrize(
        ("geometry", "name", "at", "value"),
        [
            (GEOMETRY, "actual_cmp_seq_kvlen", (1, 2), -7),
            (GEOMETRY, "actual_cmp_seq_kvlen", (2, 3), 1000),
            (PACKED, "actual_cmp_seq_kvlen", (2, 1), 1000),
            (PACKED, "actual_sel_seq_kvlen", (1, 3), 3),
            (BATCHED, "actual_sel_seq_kvlen", (0, 1), 3),
            (BATCHED, "actual_seq_qlen", (2, 1), 4),
            (PACKED, "actual_seq_qlen", (1, 3), 9),
            (PACKED, "actual_seq_qlen", (1, 0), -1),
        ],
        ids=lambda value: NAMES.get(id(value)),
    )
    def test_integers_of_sequences_under_vmap(self, geometry, name, at, value):
        call, arrays = operator(geometry)
        for mapped in ((name,), EVERYTHING):
            many, axes = stacked(arrays, mapped)
            many[name][at] = value
            program = jax.vmap(lambda arrays: call(**arrays), in_axes=(axes,))
            message = message_of(program, on_device(many))
            assert f"{name}[{at[1]}] at index {at[0]} of jax.vmap must be in" in message, message
            if name in ("actual_cmp_seq_kvlen", "block_table"):  # others are combined first
                assert f"got {value}" in message

    @pytest.mark.parametrize("geometry", [GEOMETRY, PACKED, BATCHED], ids=["TND", "packed", "BSND"])
    @pytest.mark.parametrize("mapped", [("block_table",), EVERYTHING], ids=["table", "all"])
    def test_nested_vmap(self, geometry, mapped):
        """The outermost index first."""
        call, arrays = operator(geometry)
        many, axes = stacked(arrays, mapped, count=4)
        many, outer = stacked(many, mapped, count=3)
        many["block_table"][1, 2, 3, 0] = 77
        program = jax.vmap(
            jax.vmap(lambda arrays: call(**arrays), in_axes=(axes,)), in_axes=(outer,)
        )
        message = message_of(program, on_device(many))
        assert "block_table[3, 0] at indices (1, 2) of jax.vmap must be in [0, " in message, message
        assert f"[0, {len(arrays['key'])}), the pages of key and value, got 77" in message

    def test_levels_that_map_different_arrays(self):
        call, arrays = operator(GEOMETRY)
        pools, inner = stacked(arrays, ("key", "value"), count=2)
        many, outer = stacked(pools, ("block_table",), count=3)
        many["block_table"][2, 1, 0] = 77
        program = jax.vmap(
            jax.vmap(lambda arrays: call(**arrays), in_axes=(inner,)), in_axes=(outer,)
        )
        message = message_of(program, on_device(many))
        assert re.search(r"block_table\[1, 0\] at indices \(2, \d\) of jax.vmap", message), message
        assert f"[0, {len(arrays['key'])})" in message
        assert "got 77" in message

    def test_without_vmap(self):
        call, arrays = operator(GEOMETRY)
        arrays["block_table"][1, 0] = 77
        message = message_of(lambda: call(**on_device(arrays)))
        assert "block_table[1, 0] must be in" in message
        assert "vmap" not in message

    def test_scan_is_not_vmap(self):
        call, arrays = operator(GEOMETRY)
        tables = np.stack([arrays.pop("block_table")] * 3)
        tables[2, 1, 0] = 77
        arrays = on_device(arrays)
        message = message_of(
            lambda: jax.lax.scan(
                lambda c, table: (c, call(block_table=table, **arrays)), 0, jnp.asarray(tables)
            )
        )
        assert "block_table[1, 0] must be in" in message


def test_maps_are_told_from_the_part_of_one_device():
    """Sequences stay outermost where maps fold into them, so a part still knows its maps."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    table = np.zeros((3, 4, 2), np.int32)
    table[2, 3, 0] = 77
    query = np.ones((3, 4, 4, 16), np.float32)
    pool = np.ones((3, 16, 32), np.float32)

    def call(query, table):
        return nsa_compress_attention_infer(
            query, pool, pool, 0.25, 4, 2, 64, 1, 16, 32, 16, block_table=table,
            actual_cmp_seq_kvlen=jnp.full(4, 20), on_fault="fail", implementation="cpu",
        )  # fmt: skip

    placed = [
        jax.device_put(
            array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
        )
        for array in (query, table)
    ]
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(jax.jit(jax.vmap(call))(*placed))
    message = str(caught.value)
    assert (
        "block_table[1, 0] of one device's part at index 2 of jax.vmap must be in [0, 3)" in message
    )
    assert "got 77" in message
