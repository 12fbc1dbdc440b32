"""CANN is absent, in odd places, old or partial: how it is found, and what is said if it is not."""

from __future__ import annotations

import os
import textwrap

import pytest
from ascend.processes import run_alone
from ascend.standin import OPERATORS, build_operators

pytest_plugins = ("ascend.fixtures",)


@pytest.fixture(scope="module")
def variants(standin_libraries, tmp_path_factory):
    """Directories of libraries, for other installs of CANN."""

    def directory(name, *libraries):
        path = tmp_path_factory.mktemp(name)
        for library in libraries:
            os.symlink(standin_libraries.directory / library, path / library)
        return path

    runtime = "libascendcl.so", "libnnopbase.so"
    variants = {
        "none": directory("none"),
        "half": directory("half", "libascendcl.so"),
        "no operators": directory("no_operators", *runtime),
        "old": directory("old", *runtime),
        "partial": directory("partial", *runtime),
        "custom": directory("custom", *runtime, "libopapi.so"),
        "split": directory("split", *runtime),
        "home": directory("home"),
    }
    build_operators(variants["old"], "libopapi.so", ())
    build_operators(variants["partial"], "libopapi.so", ("compress_attention",))
    build_operators(variants["custom"], "libcust_opapi.so", OPERATORS)
    build_operators(variants["split"], "libopapi.so", ())
    build_operators(variants["split"], "libopapi_math.so", ())
    build_operators(variants["split"], "libopapi_transformer.so", OPERATORS)
    os.symlink(variants["split"], variants["home"] / "lib64")
    return variants


class TestLoading:
    """How CANN is found, each time in a process of its own."""

    QUESTION = 'print(native.module().ascend_unavailable("compress_attention"))'
    CALL = """
        from compress_attention.problems import Geometry, build
        import jax.numpy as jnp
        from jax_nsa import nsa_compress_attention_infer
        arguments = build(Geometry(dtype="bfloat16", k=1))
        query = jnp.asarray(arguments.pop("query"))
        def call(): nsa_compress_attention_infer(query, **arguments, implementation="ascend")
        """

    def test_available(self, standin):
        result = run_alone(standin, self.QUESTION, JAX_NSA_CANN_LIBRARY_PATH=standin.directory)
        assert result.stdout == "None\n"

    @pytest.mark.parametrize(
        ("variant", "sentences"),
        [
            ("none", ["libascendcl.so cannot be loaded", "install the CANN toolkit",
                      "source its set_env.sh"]),
            ("half", ["libnnopbase.so cannot be loaded", "set_env.sh"]),
            ("no operators", ["libopapi.so cannot be loaded"]),
            ("old", ["has no function aclnnNsaCompressAttentionInfer", "/libopapi.so",
                     "8.2 or newer"]),
        ],
    )  # fmt: skip
    def test_unavailable(self, standin, variants, variant, sentences):
        path = variants[variant]
        result = run_alone(standin, self.QUESTION, JAX_NSA_CANN_LIBRARY_PATH=path)
        assert result.returncode == 0, result.stderr
        for sentence in sentences:
            assert sentence in result.stdout

    def test_one_operator_alone(self, standin, variants):
        """A CANN that lacks the others serves it."""
        script = """
            for target in ("compress_attention", "select_attention", "compress"):
                print(native.module().ascend_unavailable(target))
            """
        result = run_alone(standin, script, JAX_NSA_CANN_LIBRARY_PATH=variants["partial"])
        there, *absent = result.stdout.splitlines()
        assert there == "None", result.stderr
        assert "has no function aclnnNsaSelectedAttentionInfer" in absent[0]
        assert "has no function aclnnNsaCompressWithCache" in absent[1]

    def test_no_cann_at_all(self, standin):
        result = run_alone(standin, self.QUESTION)
        assert "libascendcl.so cannot be loaded" in result.stdout

    def test_no_device(self, standin):
        result = run_alone(
            standin, self.QUESTION,
            JAX_NSA_CANN_LIBRARY_PATH=standin.directory, STANDIN_CANN_DEVICES="0",
        )  # fmt: skip
        assert "finds no NPU" in result.stdout
        assert "ASCEND_RT_VISIBLE_DEVICES" in result.stdout

    def test_without_cann_the_call_says_so(self, standin):
        result = run_alone(standin, textwrap.dedent(self.CALL) + "call()\n")
        assert "NotImplementedError" in result.stderr
        assert 'implementation="ascend": CANN\'s library libascendcl.so cannot' in result.stderr

    @pytest.mark.parametrize(
        ("variables", "library"),
        [
            ({"JAX_NSA_CANN_LIBRARY_PATH": ["custom"]}, "libcust_opapi.so"),
            ({"JAX_NSA_CANN_LIBRARY_PATH": ["split"]}, "libopapi_transformer.so"),
            ({"JAX_NSA_CANN_LIBRARY_PATH": ["none", "split"]}, "libopapi_transformer.so"),
            ({"ASCEND_HOME_PATH": ["home"]}, "libopapi_transformer.so"),
            ({"LD_LIBRARY_PATH": ["custom"]}, "libcust_opapi.so"),
            ({"LD_LIBRARY_PATH": ["custom"], "ASCEND_HOME_PATH": ["home"]}, "libcust_opapi.so"),
            ({"LD_LIBRARY_PATH": ["custom"], "JAX_NSA_CANN_LIBRARY_PATH": ["split"]},
             "libopapi_transformer.so"),
        ],
    )  # fmt: skip
    def test_search_order(self, standin, variants, variables, library):
        environment = {
            name: ":".join(str(variants[v]) for v in values) for name, values in variables.items()
        }
        script = textwrap.dedent(self.CALL) + textwrap.dedent(
            f"""
            call()
            print(standin.counter("launches {library}"))
            """
        )
        result = run_alone(standin, script, **environment)
        assert result.stdout == "1\n", result.stderr

    def test_initialization_is_tried_again(self, standin):
        script = textwrap.dedent(self.CALL) + textwrap.dedent(
            """
            standin.plan_fault("aclInit", 100042)
            print(native.module().ascend_unavailable("compress_attention"))
            call(); call()
            print(standin.counter("aclInit"))
            """
        )
        result = run_alone(standin, script, JAX_NSA_CANN_LIBRARY_PATH=standin.directory)
        said, count = result.stdout.splitlines()
        assert said == "aclInit failed with status 100042: E19999: injected fault in aclInit"
        assert count == "2", result.stderr

    def test_initialized_by_somebody_else(self, standin):
        script = textwrap.dedent(self.CALL) + "standin.runtime.aclInit(None); call()\n"
        result = run_alone(standin, script, JAX_NSA_CANN_LIBRARY_PATH=standin.directory)
        assert result.returncode == 0, result.stderr

    def test_the_device_count_fails(self, standin):
        script = 'standin.plan_fault("aclrtGetDeviceCount", 507033)\n' + self.QUESTION
        result = run_alone(standin, script, JAX_NSA_CANN_LIBRARY_PATH=standin.directory)
        assert "aclrtGetDeviceCount failed with status 507033" in result.stdout

    def test_nothing_is_left_at_exit(self, standin):
        """Not even what is kept for further calls."""
        script = textwrap.dedent(self.CALL) + "call()\n"
        result = run_alone(standin, script, JAX_NSA_CANN_LIBRARY_PATH=standin.directory)
        assert (result.returncode, result.stderr) == (0, "")
