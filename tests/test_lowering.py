"""What a compiled program holds: which kernel, its operands as they are, and nothing beside it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention.calls import FLOATS, INTEGERS
from compress_attention.problems import Geometry, build

from jax_nsa import backends, native, nsa_compress_attention_infer

GEOMETRY = Geometry(lengths=(40, 7), hostile=False)
SEVERAL_TOKENS = dataclasses.replace(GEOMETRY, token_counts=(1, 3), masked=True)
CPU, CUDA = "jax_nsa_compress_attention_cpu", "jax_nsa_compress_attention_cuda"


def bound(geometry=GEOMETRY, *, host=(), **options):
    """The operator as a function of its arrays, and these; `host` names those fixed instead."""
    arguments = build(geometry)
    traced = {n: jnp.asarray(arguments[n]) for n in (*FLOATS, *INTEGERS) if n in arguments}
    static = {n: v for n, v in arguments.items() if n not in traced or n in host}
    traced = {n: v for n, v in traced.items() if n not in host}
    return lambda *values: nsa_compress_attention_infer(
        **dict(zip(traced, values, strict=True)), **static, **options
    ), tuple(traced.values())


def lowered(platforms, geometry=GEOMETRY, **options):
    function, arrays = bound(geometry, **options)
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=platforms).as_text()


def custom_calls(text):
    return re.findall(r"custom_call @(\w+)", text)


def operations(text):
    return set(re.findall(r"(?:stablehlo|chlo|sdy)\.(\w+)", text))


def compiled_for(backend):
    return native.unavailable(backend, "compress_attention") is None


needs_cpu_kernel = pytest.mark.skipif(
    not compiled_for("cpu"), reason=f"{native.unavailable('cpu', 'compress_attention')}"
)


@needs_cpu_kernel
@pytest.mark.parametrize("implementation", [None, "cpu", ("cuda", "cpu", "reference")])
def test_cpu_program_calls_the_cpu_kernel(implementation):
    assert custom_calls(lowered(("cpu",), implementation=implementation)) == [CPU]


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_reference_needs_no_kernel(platform):
    assert custom_calls(lowered((platform,), implementation="reference")) == []


def test_cuda_program_calls_the_cuda_kernel_if_compiled():
    """This machine needs no GPU to compile for one."""
    expected = [CUDA] if compiled_for("cuda") else []
    assert custom_calls(lowered(("cuda",))) == expected


@pytest.mark.parametrize("platform", ["rocm", "tpu"])
def test_platforms_without_a_kernel_get_the_reference(platform):
    assert custom_calls(lowered((platform,))) == []


@needs_cpu_kernel
def test_one_program_for_several_platforms():
    calls = custom_calls(lowered(("cpu", "cuda")))
    assert calls == ([CPU, CUDA] if compiled_for("cuda") else [CPU])


def test_forced_kernel_of_another_platform_is_an_error():
    with pytest.raises(NotImplementedError, match=r"it runs on platform cpu, .* compiled for cuda"):
        lowered(("cuda",), implementation="cpu")


@needs_cpu_kernel
def test_nothing_stands_beside_the_kernel():
    """One token for each sequence: the query gets an axis, the results lose it."""
    text = lowered(("cpu",))
    assert operations(text) == {"broadcast_in_dim", "reshape", "custom_call"}
    # Keys, values, block table and lengths go in as they came.
    assert re.search(r"custom_call @\w+\(%\d+, %arg1, %arg2, %arg3, %arg4\)", text)


@needs_cpu_kernel
@pytest.mark.parametrize("layout", ["TND", "BSND"])
def test_several_tokens_add_arithmetic_on_integers_alone(layout):
    geometry = dataclasses.replace(SEVERAL_TOKENS, layout=layout, tokens=3)
    text = lowered(("cpu",), geometry)
    assert custom_calls(text) == [CPU]
    assert re.search(r"custom_call @\w+\(%arg0, %arg1, %arg2, ", text)
    unwanted = {"gather", "dynamic_gather", "scatter", "dot_general", "while", "sort", "transpose"}
    assert not operations(text) & unwanted


@needs_cpu_kernel
def test_attributes_reach_the_kernel():
    text = lowered(("cpu",))
    for attribute in (
        "scale = 2.500000e-01 : f32",
        "key_value_heads = 2 : i64",
        "compress_block_size = 32 : i64",
        "compress_stride = 16 : i64",
        "select_block_size = 64 : i64",
    ):
        assert attribute in text


@pytest.mark.parametrize("geometry", [GEOMETRY, SEVERAL_TOKENS], ids=["one token", "several"])
def test_one_primitive(geometry):
    function, arrays = bound(geometry, implementation="reference")
    assert [eqn.primitive.name for eqn in primitives(function, arrays)] == [
        "jax_nsa_compress_attention"
    ]


def primitives(function, arrays):
    """The operator's equations in the traced function."""
    equations = jax.make_jaxpr(function)(*arrays).jaxpr.eqns
    return [eqn for eqn in equations if eqn.primitive.name.startswith("jax_nsa")]


def test_host_lengths_are_constants_of_a_traced_program():
    """Which a kernel may need: CANN's takes lengths on the host."""
    names = ("actual_cmp_seq_kvlen",)
    [static] = primitives(*bound(host=names, implementation="reference"))
    [traced] = primitives(*bound(implementation="reference"))
    assert static.params["constants"] == (("lengths", (40, 7)),)
    assert traced.params["constants"] == ()


@pytest.mark.parametrize(
    ("geometry", "expected"),
    [(GEOMETRY, (40, 40, 40, 7, 7, 7)), (SEVERAL_TOKENS, (40, 7, 40, 7, 40, 7))],
    ids=["sequences outermost", "packed rows in their query's order"],
)
def test_host_lengths_of_mapped_calls_are_constants(geometry, expected):
    """In the order in which `jax.vmap` folds what they belong to."""
    host = ("actual_cmp_seq_kvlen",)
    function, (query, *rest) = bound(geometry, host=host, implementation="reference")
    mapped = jax.vmap(lambda query: function(query, *rest))
    [call] = primitives(mapped, (jnp.stack([query] * 3),))
    assert call.params["constants"] == (("lengths", expected),)


def test_growing_host_lengths_share_one_eager_program(monkeypatch):
    """A decode loop that passes lists must not compile at each step."""
    arguments = build(dataclasses.replace(GEOMETRY, lengths=(40, 8), k=5))
    arrays = {n: jnp.asarray(arguments[n]) for n in FLOATS}

    def step(length):
        changes = {"actual_cmp_seq_kvlen": [length, 8], "implementation": "reference"}
        return nsa_compress_attention_infer(**arguments | arrays | changes)

    lowerings = []
    choose = backends.choose
    monkeypatch.setattr(backends, "choose", lambda *a: lowerings.append(a) or choose(*a))
    for length in (38, 39, 40):
        step(length)
    assert len(lowerings) == 1


@needs_cpu_kernel
def test_differentiating_a_kernel_is_refused():
    function, (query, *arrays) = bound()

    def loss(query):
        return jnp.sum(function(query, *arrays)[0])

    with pytest.raises(
        NotImplementedError,
        match=r'inference operator.* nsa_attention .*implementation="reference"',
    ):
        jax.grad(loss)(query)


def test_results_have_no_weak_type():
    function, arrays = bound(implementation="reference")
    attention, indices = jax.eval_shape(function, *arrays)
    assert (attention.dtype, indices.dtype) == (np.float32, np.int32)
    assert not attention.weak_type
    assert not indices.weak_type
