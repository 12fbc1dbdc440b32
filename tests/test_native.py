"""The compiled library: how it is found and refused, and what it answers to lying callers."""

import ast
import atexit
import functools
import importlib
import inspect
import itertools
import pathlib
import subprocess
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest

import jax_nsa
from jax_nsa import backends, native, nsa_window_attention_infer
from jax_nsa.compress_attention.door import OPERATOR

TARGET = "jax_nsa_compress_attention_cpu"
RUNTIME = (0, 3)  # (major, minor) of the XLA FFI API that the tests of versions pretend to run on


@pytest.fixture
def reload():
    """Returns a function that makes `native` find `module` (None: nothing) on a jaxlib."""
    with pytest.MonkeyPatch.context() as patch:

        def reload(module, runtime=RUNTIME):
            patch.setitem(sys.modules, "jax_nsa._native", module)
            patch.setattr(native, "_runtime_ffi_api_version", lambda: runtime)
            native._load.cache_clear()

        yield reload
    native._load.cache_clear()


def library(version, **registrations):
    """A stand-in for the compiled module."""
    return types.SimpleNamespace(
        ffi_api_version=lambda: version, registrations=lambda: registrations
    )


@pytest.mark.parametrize("version", [(0, 3), (0, 2), (0, 0)])
def test_library_for_this_or_an_older_api_is_taken(reload, version):
    built = library(version, cpu={"jax_nsa_target_cpu": ("cpu", object())})
    reload(built)
    assert native.module() is built
    assert native.unavailable("cpu", "target") is None


@pytest.mark.parametrize("version", [(0, 4), (1, 0), (1, 3)])
def test_library_for_another_api_is_refused_with_the_remedy(reload, monkeypatch, version):
    registered = []
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *a, **k: registered.append(a))
    reload(library(version, cpu={"jax_nsa_target_cpu": ("cpu", object())}))
    native.register()
    assert registered == []
    reason = native.unavailable("cpu", "target")
    for part in (
        "built for XLA FFI API {}.{}".format(*version),
        f"jaxlib {jaxlib.version.__version__} offers 0.3",
        "upgrade jaxlib",
        "pip install --no-build-isolation .",
    ):
        assert part in reason
    with pytest.raises(ImportError, match="XLA FFI API"):
        native.module()


def test_missing_library_says_what_to_install(reload):
    reload(None)  # what makes an import fail
    native.register()
    assert "jax_nsa._native cannot be loaded" in native.unavailable("cpu", "target")
    assert "pip install ." in native.unavailable("cpu", "target")


def test_a_platform_without_its_kernels_is_warned_of_once(reload):
    reload(None)
    backends._warn_of.cache_clear()
    pool = np.ones((1, 16, 16), np.float32)
    call = functools.partial(
        nsa_window_attention_infer, np.ones((1, 1, 16), np.float32), pool, pool, 1.0, 1, 1, 5, 16,
        layout="TND", block_table=[[0]], actual_seq_kvlen=[5],
    )  # fmt: skip
    with pytest.warns(RuntimeWarning, match=r"on cpu without its kernels, .* \(cpu: "):
        jax.jit(call).lower()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(lambda: call()).lower()
        jax.jit(functools.partial(call, implementation="reference")).lower()
    backends._warn_of.cache_clear()


def test_missing_kernel_is_told_from_a_missing_library(reload):
    reload(library(RUNTIME, cpu={"jax_nsa_target_cpu": ("cpu", object())}))
    assert native.unavailable("cuda", "other") == (
        "the installed library was compiled without its cuda kernel"
    )


def test_missing_kernel_of_one_operator_is_told_from_missing_kernels(reload):
    reload(library(RUNTIME, cpu={"jax_nsa_target_cpu": ("cpu", object())}))
    assert native.unavailable("cpu", "other") == (
        "the installed library was compiled without its cpu kernel of other"
    )


def test_what_ascend_holds_is_released_at_exit(reload, monkeypatch):
    """Before CANN's own static objects go."""
    kept = []
    monkeypatch.setattr(atexit, "register", kept.append)
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *_, **__: None)
    built = library(RUNTIME, cpu={"a": ("cpu", 1)}, ascend={"b": ("cpu", 2)}, cuda={})
    built.ascend_release = object()
    reload(built)
    native.register()
    assert kept == [built.ascend_release]


def test_register_hands_each_target_to_jax_with_its_platform(reload, monkeypatch):
    registered = []
    monkeypatch.setattr(
        jax.ffi,
        "register_ffi_target",
        lambda name, handler, platform: registered.append((name, handler, platform)),
    )
    reload(library(RUNTIME, cpu={"a": ("cpu", 1), "b": ("cpu", 2)}, cuda={"c": ("CUDA", 3)}))
    native.register()
    assert registered == [("a", 1, "cpu"), ("b", 2, "cpu"), ("c", 3, "CUDA")]


def test_call_that_no_kernel_serves_repeats_the_reason(reload):
    reload(None)
    call = backends.Call(OPERATOR, operands=(), names=(), problem=None)
    with pytest.raises(NotImplementedError, match=r'"cpu": the compiled library .*pip install'):
        backends.choose("cpu", ("cpu",), call)


def test_runtime_version_is_that_of_the_installed_header():
    names = ("XLA_FFI_API_MAJOR", "XLA_FFI_API_MINOR")
    header = pathlib.Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text().split()
    defined = tuple(int(header[header.index(name) + 1]) for name in names)
    assert native._runtime_ffi_api_version() == defined


@pytest.mark.parametrize("header", [None, "", "#define XLA_FFI_API_MAJOR 0\n"], ids=repr)
def test_headers_that_tell_no_version_make_the_library_unusable(
    reload, monkeypatch, tmp_path, header
):
    find = native._runtime_ffi_api_version
    reload(library(RUNTIME, cpu={"jax_nsa_target_cpu": ("cpu", object())}))
    monkeypatch.setattr(native, "_runtime_ffi_api_version", find)
    if header is not None:
        (tmp_path / "xla/ffi/api").mkdir(parents=True)
        (tmp_path / "xla/ffi/api/c_api.h").write_text(header)
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    reason = native.unavailable("cpu", "target")
    assert f"jaxlib {jaxlib.version.__version__} do not tell its XLA FFI API version" in reason
    assert "upgrade jax_nsa" in reason


def test_installed_library_loads_and_has_the_cpu_kernel():
    module = importlib.import_module("jax_nsa._native")
    assert native.module() is module
    built, running = module.ffi_api_version(), native._runtime_ffi_api_version()
    assert built[0] == running[0]
    assert built[1] <= running[1]
    assert module.registrations()["cpu"][TARGET][0] == "cpu"


def legal_windows():
    sizes = range(16, 129, 16)
    for block, stride, select in itertools.product(sizes, (16, 32, 48, 64), sizes):
        if stride <= block <= select and select % stride == 0:
            yield block, stride, select


def test_num_blocks_counts_select_blocks_begun():
    num_blocks = native.module().num_blocks
    for block, stride, select in legal_windows():
        for length in [0, *range(1, 70), 1023, 1024, 8192, 2**31 - 1]:
            tokens = (length - 1) * stride + block if length else 0
            whole, rest = divmod(tokens, select)
            assert num_blocks(block, stride, select, length) == whole + bool(rest)


# The kernels trust what cc/ffi_call.cc and paged_call.cc let through, so they are called here
# without the front door.

ARRAYS = {
    "query": np.zeros((2, 3, 4, 8), np.float32),
    "key": np.zeros((5, 16, 2 * 8), np.float32),
    "value": np.zeros((5, 16, 2 * 6), np.float32),
    "block_table": np.zeros((2, 2), np.int32),
    "lengths": np.zeros(2, np.int32),
}
RESULTS = {
    "attention": jax.ShapeDtypeStruct((2, 3, 4, 6), np.float32),
    "topk_indices": jax.ShapeDtypeStruct((2, 3, 2, 1), np.int32),
    "lse": jax.ShapeDtypeStruct((2, 3, 4), np.float32),
    "block_scores": jax.ShapeDtypeStruct((2, 3, 4, 9), np.float32),
}
ATTRIBUTES = {
    "scale": np.float32(1.0),
    "key_value_heads": np.int64(2),
    "compress_block_size": np.int64(32),
    "compress_stride": np.int64(16),
    "select_block_size": np.int64(64),
    "aligned": np.int64(0),
    "init_blocks": np.int64(1),
    "local_blocks": np.int64(2),
    "causal": np.int64(0),
    "interleaved": np.int64(0),
}
# Operands that a good call may have too.
FURTHER = ("select_lengths", "first_rows", "surprise")
TOKENS = {"token_counts": np.full(2, 3, np.int32), "early_counts": np.zeros(2, np.int32)}


def call_kernel(*, operands=None, results=None, **changes):
    """Calls the CPU kernel with some arrays and attributes other than the good ones.

    Args:
        operands: names of the operands, where they are not those of the arrays.
        results: likewise.
        **changes: arrays and attributes by name; None leaves one out.
    """
    arrays, outputs, attributes = (
        {name: value for name, value in (part | changes).items() if value is not None}
        for part in (ARRAYS | TOKENS, RESULTS, ATTRIBUTES)
    )
    known = {*ARRAYS, *TOKENS, *FURTHER}
    arrays = {name: arrays[name] for name in arrays if name in known}
    outputs = {name: outputs[name] for name in outputs if name in {*RESULTS, "more"}}
    attributes = {name: attributes[name] for name in attributes if name in ATTRIBUTES}
    call = jax.ffi.ffi_call(TARGET, list(outputs.values()))
    return jax.block_until_ready(
        call(
            *map(jnp.asarray, arrays.values()),
            operands=" ".join(arrays) if operands is None else operands,
            results=" ".join(outputs) if results is None else results,
            problem=attributes,
        )
    )


def f32(*shape):
    return np.zeros(shape, np.float32)


def i32(*shape):
    return np.zeros(shape, np.int32)


def result(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


HUGE = 2**63 - 1
LIES = {
    "query_rank": ({"query": f32(6, 4, 8)}, "query must have rank 4"),
    "query_dtype": ({"query": i32(2, 3, 4, 8)}, "query must be bfloat16"),
    "query_without_heads": ({"query": f32(2, 3, 0, 8)}, "query must not be empty"),
    "query_without_rows": ({"query": f32(2, 0, 4, 8)}, "query must not be empty"),
    "query_of_other_sequences": ({"query": f32(4, 3, 4, 8)}, "as many sequences"),
    "key_heads": ({"key": f32(5, 16, 3 * 8)}, "key must have shape [5, 16, 16], got [5, 16, 24]"),
    "key_dtype": ({"key": np.zeros((5, 16, 16), np.float16)}, "key has an unexpected element"),
    "page_of_8_rows": (
        {"key": f32(5, 8, 16), "value": f32(5, 8, 12)},
        "page size must be a multiple of 16 up to 256, got 8",
    ),
    "large_heads": (
        {"query": f32(2, 3, 4, 193), "key": f32(5, 16, 2 * 193)},
        "query's head size must be at most 192, got 193",
    ),
    "large_values": (
        {"value": f32(5, 16, 2 * 129), "attention": result(2, 3, 4, 129)},
        "value's head size must be at most 128, got 129",
    ),
    "large_group": (
        {"query": f32(2, 3, 258, 8), "attention": result(2, 3, 258, 6)},
        "heads for each of key's must divide 128, got 129",
    ),
    "group_of_3": (
        {
            "query": f32(2, 3, 6, 8),
            "attention": result(2, 3, 6, 6),
            "lse": result(2, 3, 6),
            "block_scores": result(2, 3, 6, 9),
        },
        "heads for each of key's must divide 128, got 3",
    ),
    "key_without_rows": ({"key": f32(5, 0, 16), "value": f32(5, 0, 12)}, "key must not be empty"),
    "key_without_pages": ({"key": f32(0, 16, 16), "value": f32(0, 16, 12)}, "key must not be"),
    "value_pages": ({"value": f32(4, 16, 12)}, "value must have shape [5, 16, 12]"),
    "value_page": ({"value": f32(5, 32, 12)}, "value must have shape [5, 16, 12]"),
    "value_heads": ({"value": f32(5, 16, 13)}, "value must have shape"),
    "value_less_than_heads": ({"value": f32(5, 16, 1)}, "value must have shape"),
    "table_without_pages": ({"block_table": i32(2, 0)}, "block_table must not be empty"),
    "table_dtype": ({"block_table": f32(2, 2)}, "block_table has an unexpected element"),
    "table_past_int32": (
        {
            "block_table": i32(2, 2**15),
            "key": f32(1, 2**16, 2 * 8),
            "value": f32(1, 2**16, 2 * 6),
        },
        "block_table names more positions",
    ),
    "lengths_shape": ({"lengths": i32(3)}, "lengths must have shape [2]"),
    "no_lengths": ({"lengths": None}, "needs lengths"),
    "no_query": ({"query": None}, "needs query"),
    "no_attention": ({"attention": None}, "needs attention"),
    "no_scale": ({"scale": None}, "needs the float scale"),
    "scale_of_another_type": ({"scale": np.int64(3)}, "needs the float scale"),
    "no_stride": ({"compress_stride": None}, "needs the integer compress_stride"),
    "packed_without_counts": (
        {
            "query": f32(6, 4, 8),
            "first_rows": i32(2),
            "token_counts": None,
            "attention": result(6, 4, 6),
            "topk_indices": result(6, 2, 1, dtype=np.int32),
            "lse": None,
            "block_scores": None,
        },
        "needs token_counts beside first_rows",
    ),
    "unknown_operand": ({"surprise": i32(2)}, 'does not know "surprise" among its operands'),
    "operand_twice": (
        {"operands": "query key value block_table lengths lengths token_counts"},
        'has "lengths" twice among its operands',
    ),
    "too_few_names": ({"operands": "query key value block_table lengths"}, "names 5 operands and"),
    "too_many_names": (
        {"operands": f"{' '.join(ARRAYS | TOKENS)} select_lengths"},
        "names 8 operands and has 7",
    ),
    "too_many_results": (
        {"more": result(1)},
        'does not know "more" among its results',
    ),
    "too_few_results": ({"results": "attention topk_indices"}, "names 2 results and has 4"),
    "too_many_names_of_results": (
        {"block_scores": None, "results": " ".join(RESULTS)},
        "names 4 results and has 3",
    ),
    "scores_without_lse": ({"lse": None}, "gives block_scores beside lse only"),
    "value_dtype": ({"value": np.zeros((5, 16, 12), np.float16)}, "value has an unexpected"),
    "page_of_272_rows": (
        {"key": f32(5, 272, 16), "value": f32(5, 272, 12)},
        "page size must be a multiple of 16 up to 256, got 272",
    ),
    "token_counts_shape": ({"token_counts": i32(3)}, "token_counts must have shape [2], got [3]"),
    "early_counts_dtype": ({"early_counts": f32(2)}, "early_counts has an unexpected element"),
    "first_rows_shape": ({"first_rows": i32(3)}, "query must have rank 3"),
    "aligned_without_lengths": ({"aligned": np.int64(1)}, "needs select_lengths where blocks"),
    "negative_init_blocks": ({"init_blocks": np.int64(-1)}, "must be at least 0"),
    "attention_shape": ({"attention": result(2, 3, 4, 7)}, "attention must have shape [2, 3, 4, 6"),
    "attention_dtype": (
        {"attention": result(2, 3, 4, 6, dtype=np.float16)},
        "attention has an unexpected element type",
    ),
    "indices_heads": (
        {"topk_indices": result(2, 3, 4, 1, dtype=np.int32)},
        "topk_indices must have shape [2, 3, 2, 1], got [2, 3, 4, 1]",
    ),
    "indices_of_no_block": (
        {"topk_indices": result(2, 3, 2, 0, dtype=np.int32)},
        "topk_indices must not be empty",
    ),
    "lse_shape": ({"lse": result(2, 4, 3)}, "lse must have shape [2, 3, 4], got [2, 4, 3]"),
    "lse_dtype": ({"lse": result(2, 3, 4, dtype=np.int32)}, "lse has an unexpected element type"),
    "block_scores_shape": (
        {"block_scores": result(2, 3, 4, 8)},
        "block_scores must have shape [2, 3, 4, 9], got [2, 3, 4, 8]",
    ),
    "no_heads": ({"key_value_heads": np.int64(0)}, "multiple of key_value_heads, got 4 and 0"),
    "negative_heads": (
        {"key_value_heads": np.int64(-2)},
        "multiple of key_value_heads, got 4 and -2",
    ),
    "too_many_heads": ({"key_value_heads": np.int64(HUGE)}, "multiple of key_value_heads"),
    "not_said_whether_interleaved": ({"interleaved": None}, "needs the integer interleaved"),
    "interleaved_without_values": (
        {"interleaved": np.int64(1), "value": f32(5, 16, 2 * 8)},
        "value's head size must be positive, got 0",
    ),
    "interleaved_in_other_pools": (
        {"interleaved": np.int64(1), "key": f32(5, 16, 2 * 14), "value": f32(5, 16, 2 * 13)},
        "key must have shape [5, 16, 26], got [5, 16, 28]",
    ),
    "stride_0": ({"compress_stride": np.int64(0)}, "sizes do not fit"),
    "stride_negative": ({"compress_stride": np.int64(-16)}, "sizes do not fit"),
    "window_huge": (
        {"compress_block_size": np.int64(HUGE), "select_block_size": np.int64(HUGE)},
        "sizes do not fit",
    ),
    "select_less_than_compress": ({"select_block_size": np.int64(16)}, "sizes do not fit"),
    "select_not_of_strides": ({"select_block_size": np.int64(72)}, "sizes do not fit"),
}


@pytest.mark.parametrize(("changes", "message"), LIES.values(), ids=LIES)
def test_kernel_refuses_operands_that_do_not_fit(changes, message):
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        call_kernel(**changes)
    assert "INVALID_ARGUMENT" in str(caught.value)
    assert message in str(caught.value)


def test_kernel_takes_the_same_call_unchanged():
    attention, indices, lse, scores = call_kernel()
    np.testing.assert_array_equal(attention, 0)
    np.testing.assert_array_equal(indices, -1)
    np.testing.assert_array_equal(lse, -np.inf)
    np.testing.assert_array_equal(scores, 0)


def loaded_by(code):
    """The modules that some code loads beyond jax."""
    program = (
        f"import jax, sys; before = set(sys.modules); {code}; print(*set(sys.modules) - before)"
    )
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()


def test_import_is_light():
    """What is exported is loaded when it is first named; all of Pallas would cost more."""
    assert set(loaded_by("import jax_nsa")) <= {
        "jax_nsa", "jax_nsa.native", "jax_nsa._native", "jax_nsa.axes", "atexit", "pkgutil",
    }  # fmt: skip
    everything = loaded_by("from jax_nsa import *")
    assert {"jax_nsa.step", "jax_nsa.training"} <= set(everything)
    assert not [name for name in everything if "pallas" in name]


def test_exports_are_found_where_type_checkers_find_them():
    [lazily] = [n for n in ast.parse(inspect.getsource(jax_nsa)).body if isinstance(n, ast.If)]
    told = {name.name: node.module for node in lazily.body for name in node.names}
    assert told == {name: f"jax_nsa.{home}" for name, home in jax_nsa._HOMES.items()}
    assert {*told, "export_disabled_checks"} == set(jax_nsa.__all__) <= set(dir(jax_nsa))
    for name, home in told.items():
        assert getattr(jax_nsa, name) is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match="no attribute 'nsa_decode'"):
        jax_nsa.nsa_decode  # noqa: B018
    assert not hasattr(jax_nsa, "no.module")


def test_modules_are_attributes_though_nobody_imported_them():
    told = subprocess.run(
        [sys.executable, "-c", "import jax_nsa; print(jax_nsa.blocks.__name__)"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert told.stdout.strip() == "jax_nsa.blocks"


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-p", "no:cacheprovider"]))
