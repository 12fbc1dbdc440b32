"""A repository of what a Python environment holds: its interpreter and the headers to build on.

The environment is that of the interpreter which the variable PYTHON_BIN_PATH names (by default
python3 on PATH); it needs the packages pybind11 and jaxlib.
"""

_FIND = """
import importlib.util, pathlib, sysconfig

def package(name):
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit("package " + name + " is not installed")
    return pathlib.Path(spec.origin).parent

print(sysconfig.get_path("include"))
print(package("pybind11") / "include")
print(package("jaxlib") / "include")
print(sysconfig.get_config_var("EXT_SUFFIX"))
"""

_BUILD = """
load("@bazel_tools//tools/python:toolchain.bzl", "py_runtime_pair")
load("@rules_cc//cc:defs.bzl", "cc_library")

package(default_visibility = ["//visibility:public"])

cc_library(
    name = "pybind11",
    hdrs = glob(["python/**/*.h", "pybind11/pybind11/**/*.h"]),
    includes = ["python", "pybind11"],
)

cc_library(
    name = "xla_ffi",
    hdrs = glob(["jaxlib/xla/ffi/**/*.h"]),
    includes = ["jaxlib"],
)

py_runtime(
    name = "runtime",
    interpreter_path = "%s",
    python_version = "PY3",
)

py_runtime_pair(
    name = "runtime_pair",
    py3_runtime = ":runtime",
)

toolchain(
    name = "toolchain",
    toolchain = ":runtime_pair",
    toolchain_type = "@bazel_tools//tools/python:toolchain_type",
)
"""

def _python_env_impl(ctx):
    python = ctx.os.environ.get("PYTHON_BIN_PATH") or str(ctx.which("python3"))
    found = ctx.execute([python, "-c", _FIND])
    if found.return_code:
        fail("{} cannot build jax_nsa: {}".format(python, found.stderr))
    python_headers, pybind11_headers, jaxlib_headers, suffix = found.stdout.strip().split("\n")
    ctx.symlink(python_headers, "python")
    ctx.symlink(pybind11_headers, "pybind11")
    ctx.symlink(jaxlib_headers, "jaxlib")
    ctx.file("BUILD", _BUILD % python)
    ctx.file("defs.bzl", "EXTENSION_SUFFIX = {}\n".format(repr(suffix)))

python_env = repository_rule(
    implementation = _python_env_impl,
    environ = ["PYTHON_BIN_PATH"],
    local = True,
)
