"""The compiled library: how it is found, refused and registered."""

import atexit
import functools
import importlib
import itertools
import pathlib
import sys
import types
import warnings

import jax
import jaxlib.version
import numpy as np
import pytest

from jax_nsa import backends, native, nsa_window_attention_infer
from jax_nsa.compress_attention.door import OPERATOR

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


def attend_to_window(**options):
    pool = np.ones((1, 16, 16), np.float32)
    return nsa_window_attention_infer(
        np.ones((1, 1, 16), np.float32), pool, pool, 1.0, 1, 1, 5, 16, layout="TND",
        block_table=[[0]], actual_seq_kvlen=[5], **options,
    )  # fmt: skip


def test_a_platform_without_its_kernels_is_warned_of_once(reload):
    reload(None)
    backends._warned_of.clear()
    with pytest.warns(
        RuntimeWarning, match=r"^jax_nsa runs on cpu without its kernels, .* \(cpu: "
    ):
        jax.jit(functools.partial(attend_to_window)).lower()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(lambda: attend_to_window()).lower()
        jax.jit(functools.partial(attend_to_window, implementation="reference")).lower()
    backends._warned_of.clear()


def test_a_call_that_the_kernels_refuse_is_warned_of_once(reload, monkeypatch):
    """As those for GPUs refuse symbolic shapes."""
    reload(library(RUNTIME, cpu={"jax_nsa_select_attention_cpu": ("cpu", object())}))
    monkeypatch.setattr(backends.cpu, "refuses", lambda call, platform: "it is symbolic")
    told = (
        r"^nsa_select_attention_infer runs on cpu without its kernels, .* \(cpu: it is symbolic\)"
    )
    with pytest.warns(RuntimeWarning, match=told):
        jax.jit(functools.partial(attend_to_window)).lower()
    monkeypatch.setattr(backends.cpu, "refuses", lambda call, platform: "so is this one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(lambda: attend_to_window()).lower()
    backends._warned_of.clear()


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
    assert module.registrations()["cpu"]["jax_nsa_compress_attention_cpu"][0] == "cpu"


def legal_blocks():
    sizes = range(16, 129, 16)
    for block, stride, select in itertools.product(sizes, (16, 32, 48, 64), sizes):
        if stride <= block <= select and select % stride == 0:
            yield block, stride, select


def test_num_blocks_counts_select_blocks_begun():
    num_blocks = native.module().num_blocks
    for block, stride, select in legal_blocks():
        for length in [0, *range(1, 70), 1023, 1024, 8192, 2**31 - 1]:
            tokens = (length - 1) * stride + block if length else 0
            whole, rest = divmod(tokens, select)
            assert num_blocks(block, stride, select, length) == whole + bool(rest)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-p", "no:cacheprovider"]))
