"""What a call with faulty values does, on one device and on several."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention import oracle
from compress_attention.agreement import assert_agrees
from compress_attention.examples import (
    FAILURES,
    FOUR,
    FOUR_BATCHED,
    FOUR_PACKED,
    layout_of,
    message_of,
    on_device,
    operator,
)
from compress_attention.problems import build
from jax.sharding import AxisType, NamedSharding, PartitionSpec

REPOSITORY = pathlib.Path(__file__).parent.parent


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
    call, arrays = operator(FOUR, **options)
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
        [sys.executable, "-c", "import test_on_fault as t; t.main()"], env=environment,
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
        assert_spoilt(outcomes[case]["results"], FOUR, rows)
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
    @pytest.mark.parametrize(
        "geometry", [FOUR, FOUR_PACKED, FOUR_BATCHED], ids=["TND", "packed", "BSND"]
    )
    @pytest.mark.parametrize("on_fault", [None, "fail"])
    def test_fails(self, geometry, on_fault):
        call, arrays = operator(geometry, on_fault=on_fault)
        arrays["block_table"][1, 0] = 77
        arrays = on_device(arrays)
        for program in (call, jax.jit(call)):
            assert "block_table[1, 0] must be in" in message_of(lambda p=program: p(**arrays))

    def test_fails_by_default_wherever_one_device_is_stated(self):
        call, arrays = operator(FOUR)
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
            (FOUR, "block_table", (1, 1), 77, [1]),
            (FOUR, "block_table", (1, 1), -1, [1]),
            (FOUR, "actual_cmp_seq_kvlen", 0, -1, [0]),
            (FOUR, "actual_cmp_seq_kvlen", 2, 2**31 - 1, [2]),
            (FOUR_PACKED, "block_table", (1, 0), 77, [1, 2]),
            (FOUR_PACKED, "actual_cmp_seq_kvlen", 3, 1000, [3, 4, 5]),
            (FOUR_PACKED, "actual_sel_seq_kvlen", 1, 5000, [1, 2]),
            (FOUR_PACKED, "actual_seq_qlen", 1, -1, [1, 2, 3, 4, 5]),
            (FOUR_BATCHED, "actual_seq_qlen", 1, 4, [1]),
            (FOUR_BATCHED, "block_table", (3, 2), -(2**31), [3]),
        ],
        ids=layout_of,
    )
    def test_gives_nan_on_demand(self, geometry, name, index, value, rows):
        call, arrays = operator(geometry, on_fault="nan")
        arrays[name][index] = value
        arrays = on_device(arrays)
        for program in (call, jax.jit(call)):
            assert_spoilt(program(**arrays), geometry, rows)

    @pytest.mark.parametrize("on_fault", [None, "fail", "nan"])
    def test_reference_never_fails(self, on_fault):
        call, arrays = operator(FOUR_PACKED, "reference", on_fault=on_fault)
        arrays["block_table"][1, 0] = 77
        assert_spoilt(call(**on_device(arrays)), FOUR_PACKED, [1, 2])

    def test_gives_nan_on_demand_in_transformations(self):
        call, arrays = operator(FOUR, on_fault="nan")
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
                assert_spoilt([np.asarray(r)[i] for r in results], FOUR, rows)

    def test_known_values_are_refused_all_the_same(self):
        call, arrays = operator(FOUR, on_fault="nan")
        arrays["block_table"][1, 0] = 77
        with pytest.raises(ValueError, match=r"block_table\[1, 0\] must be in .* got 77"):
            call(**arrays)

    @pytest.mark.parametrize("value", ["", "Fail", "raise", 1, True, ("nan",)], ids=repr)
    def test_other_wishes_are_refused(self, value):
        call, arrays = operator(FOUR, on_fault=value)
        with pytest.raises((TypeError, ValueError), match=r"on_fault must .*fail.*nan.*got "):
            call(**arrays)
