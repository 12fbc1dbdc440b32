"""JAX's persistent cache of compiled programs never gives a call another call's program.

The cache knows a program by its text. So what decides the results must be in the text, on one
device and on several, and nothing else that differs from one process to the next may.

Each test runs processes of its own, as JAX opens its cache once in a process.
"""

from __future__ import annotations

import gc
import json
import os
import pathlib
import re
import subprocess
import sys
from dataclasses import replace

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention import oracle
from compress_attention.agreement import assert_agrees
from compress_attention.problems import Geometry, build
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_nsa
from jax_nsa import native, nsa_compress_attention_infer

pytestmark = pytest.mark.timeout(180)

REPOSITORY = pathlib.Path(__file__).parent.parent
TARGET = "jax_nsa_compress_attention_cpu"
ARRAYS = ("query", "key", "value", "block_table", "actual_cmp_seq_kvlen")
GEOMETRY = Geometry(lengths=(40, 17), key_value_heads=2, group=2, k=8, hostile=False)
ISAS = native.module().cpu_kernels()

# What decides a call's results, and nothing of the operands' shapes.
CALLS = {
    "usual": {},
    "scale": {"scale_value": 0.75},
    "compress block": {"compress_block_size": 64},
    "stride": {"compress_stride": 32},
    "select block": {"select_block_size": 96},
    "selected blocks": {"select_block_count": 3},
    "implementation": {"implementation": "reference"},
    "lse": {"return_lse": True},
}


def operator(changes):
    """A call as a function of its arrays, those arrays, and the true results."""
    arguments = build(GEOMETRY) | changes
    truth = {n: v for n, v in arguments.items() if n != "implementation"}
    expected = oracle.compress_attention(**truth)
    arguments = {"implementation": "cpu"} | arguments
    arrays = [arguments.pop(n) for n in ARRAYS]

    def call(*arrays):
        return nsa_compress_attention_infer(**arguments, **dict(zip(ARRAYS, arrays, strict=True)))

    return call, arrays, expected


def place(arrays, devices):
    """The arrays, sequences split over so many devices."""
    if devices == 1:
        return [jnp.asarray(a) for a in arrays]
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,))
    row, whole = PartitionSpec("x"), PartitionSpec()
    specs = (row, whole, whole, row, row)
    return [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)]


def is_right(results, expected):
    try:
        assert_agrees(tuple(results), expected, attention_tolerance=1e-5)
    except AssertionError:
        return False
    return True


# In processes of their own.


def start(cache, *, strip_pointers=False, address=None):
    """Opens the cache; returns a list to which the names of JAX's events will be added.

    Args:
        cache: its directory.
        strip_pointers: whether the cache is to leave pointers out of what it knows a program by.
        address: if given, the address that every object seems to have where JAX asks for it to
            name a partitioned function, as happens by chance.
    """
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", strip_pointers)
    if address is not None:
        sys.modules["jax._src.custom_partitioning"].id = lambda _: address
    events = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
    return events


def run_calls(cache, calls, strip_pointers, address):
    """Compiles and runs calls on one and on two devices; prints what came of each, as JSON."""
    events = start(cache, strip_pointers=strip_pointers, address=address)
    for name, isa in calls:
        os.environ["JAX_NSA_CPU_ISA"] = isa
        for devices in (1, 2):
            call, arrays, expected = operator(CALLS[name])
            placed = place(arrays, devices)
            lowered = jax.jit(call).lower(*placed)
            events.clear()
            compiled = lowered.compile()
            outcome = {
                "name": name,
                "isa": isa,
                "devices": devices,
                "hits": events.count("/jax/compilation_cache/cache_hits"),
                "misses": events.count("/jax/compilation_cache/cache_misses"),
                "right": is_right(compiled(*placed), expected),
                "kernel": TARGET in compiled.as_text(),
                "isas": re.findall(r'isa = "(\w*)"', compiled.as_text()),
            }
            print("OUTCOME", json.dumps(outcome))
            del call, compiled, lowered
            gc.collect()


def run_loop(cache, rounds):
    """Programs one after another, each deleted before the next; prints the wrong ones."""
    start(cache)
    wrong = {1: [], 2: []}
    for i in range(rounds):
        for devices in (1, 2):
            call, arrays, expected = operator({"scale_value": 0.1 * i})
            program = jax.jit(call)
            if not is_right(program(*place(arrays, devices)), expected):
                wrong[devices].append(i)
            del program, call
            gc.collect()
    print("OUTCOME", json.dumps(wrong))


def outcomes(function, *arguments):
    """What a function of this file prints in a fresh process."""
    path = os.pathsep.join([str(REPOSITORY / "tests"), *filter(None, sys.path)])
    code = f"import test_program_cache as t; t.{function}(*{arguments!r})"
    environment = {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, check=False,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("OUTCOME ")]
    return [json.loads(line.removeprefix("OUTCOME ")) for line in lines]


def check(outcome):
    """Whether a program is that of its own call."""
    assert outcome["right"], outcome
    kernel = outcome["name"] != "implementation"
    assert outcome["kernel"] == kernel, outcome
    assert set(outcome["isas"]) == ({outcome["isa"]} if kernel else set()), outcome


# The tests.


def test_new_scales_in_one_process(tmp_path):
    """Each program may lie where the one before it lay in memory."""
    assert outcomes("run_loop", str(tmp_path), 25) == [{"1": [], "2": []}]


@pytest.mark.parametrize(
    ("strip_pointers", "address"), [(False, 4096), (True, None)],
    ids=["equal addresses", "pointers stripped"],
)  # fmt: skip
def test_another_process_shares_programs_with_the_same_call_alone(
    tmp_path, strip_pointers, address
):
    def run(*calls):
        return outcomes("run_calls", str(tmp_path), calls, strip_pointers, address)

    usual = "usual", ISAS[0]
    for outcome in run(usual):
        check(outcome)
        assert (outcome["hits"], outcome["misses"]) == (0, 1), outcome
    others = [(name, ISAS[0]) for name in CALLS if name != "usual"]
    if len(ISAS) > 1:
        others.append(("usual", ISAS[-1]))
    for outcome in run(*others, usual):
        check(outcome)
        again = (outcome["name"], outcome["isa"]) == usual
        assert (outcome["hits"], outcome["misses"]) == (again, not again), outcome


def test_processes_without_options_are_right(tmp_path):
    usual, other = ("usual", ISAS[0]), ("scale", ISAS[0])
    for calls in ((usual,), (usual, other)):
        for outcome in outcomes("run_calls", str(tmp_path), calls, False, None):
            check(outcome)
            if outcome["devices"] == 1 and len(calls) == 2:
                assert outcome["hits"] == (outcome["name"] == "usual")


# What the cache sees: the text of a program.


def text(changes, devices, geometry=GEOMETRY):
    arguments = build(geometry) | {"implementation": "cpu"} | changes
    arrays = [arguments.pop(n) for n in ARRAYS]

    def call(*arrays):
        return nsa_compress_attention_infer(**arguments, **dict(zip(ARRAYS, arrays, strict=True)))

    lowered = jax.jit(call).lower(*place(arrays, devices)).as_text()
    # As JAX's option does; an address is the decimal number that names a partitioned function.
    return re.sub(r'"\d+"', '""', lowered)


@pytest.mark.parametrize("devices", [1, 2])
class TestText:
    def test_differs_where_results_may(self, devices, monkeypatch):
        texts = {name: text(changes, devices) for name, changes in CALLS.items()}
        monkeypatch.setenv("JAX_NSA_CPU_ISA", ISAS[-1])
        texts["instruction set"] = text({}, devices)
        assert len(set(texts.values())) == len(texts)

    def test_tells_what_a_fault_does(self, devices):
        assert text({"on_fault": "fail"}, devices) != text({"on_fault": "nan"}, devices)

    def test_nearly_equal_scales_differ(self, devices):
        near = float(np.nextafter(np.float32(0.25), np.float32(1)))
        assert text({"scale_value": 0.25}, devices) != text({"scale_value": near}, devices)

    @pytest.mark.parametrize("implementation", ["cpu", "reference"])
    def test_is_the_same_each_time(self, devices, implementation):
        changes = {"implementation": implementation}
        first = text(changes, devices)
        kept = [text({"scale_value": 0.1 * i}, devices) for i in range(3)]
        jax.clear_caches()
        assert text(changes, devices) == first
        assert len(set(kept)) == 3

    @pytest.mark.parametrize("implementation", ["cpu", "reference"])
    def test_names_the_release(self, devices, implementation):
        if devices == 1 and implementation == "reference":
            pytest.skip("the reference's whole computation is in the text")
        assert jax_nsa.__version__ in text({"implementation": implementation}, devices)

    def test_tells_ragged_tokens(self, devices):
        """Two ways to count tokens on the same shapes."""
        packed = replace(GEOMETRY, token_counts=(1, 1))
        masked = replace(packed, masked=True)
        assert text({}, devices, packed) != text({}, devices, masked)
