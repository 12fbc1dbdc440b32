"""Blocks as open training codes choose them: kernels against the reference, peaks, context."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from problems import Domain, Geometry, build, geometries

from jax_nsa import native, nsa_compress_attention_infer
from jax_nsa.blocks import Blocks

GEOMETRY = Geometry(
    lengths=(61, 0, 33, 17), layout="BSND", tokens=3, token_counts=(3, 1, 2, 0), masked=True,
    slack=(3, 9, 0, 15), group=4, k=6, page=16, spare_slots=0, return_lse=True,
)  # fmt: skip
needs_cpu_kernel = pytest.mark.skipif(
    native.unavailable("cpu", "compress_attention") is not None,
    reason=f"{native.unavailable('cpu', 'compress_attention')}",
)


def aligned(geometry, init_blocks=1, local_blocks=2):
    """A legal call's arguments with the aligned rule and the original lengths that it needs."""
    arguments = build(geometry)
    blocks = Blocks(*geometry.window)
    slack = geometry.slack or (0,) * len(geometry.lengths)
    arguments["actual_sel_seq_kvlen"] = np.array(
        [
            blocks.original_length(length) + extra if length else min(extra, geometry.window[0] - 1)
            for length, extra in zip(geometry.lengths, slack, strict=True)
        ],
        np.int32,
    )
    return arguments | {
        "importance": "aligned", "init_blocks": init_blocks, "local_blocks": local_blocks,
    }  # fmt: skip


@needs_cpu_kernel
@given(
    geometry=geometries(Domain()),
    init_blocks=st.integers(0, 3),
    local_blocks=st.integers(0, 9),
)
def test_kernel_agrees_with_the_reference(geometry, init_blocks, local_blocks):
    """They share no line; of the choice, all but what is as important within rounding."""
    arguments = aligned(replace(geometry, dtype="float32"), init_blocks, local_blocks)
    one, other = (
        nsa_compress_attention_infer(**arguments, implementation=name)
        for name in ("cpu", "reference")
    )
    np.testing.assert_allclose(one[0], other[0], rtol=1e-4, atol=1e-4)
    equal = np.asarray(one[1]) == np.asarray(other[1])
    assert equal.mean() > 0.9 or equal.size < 20
    # As many blocks, and the forced ones in their places.
    np.testing.assert_array_equal(np.asarray(one[1]) >= 0, np.asarray(other[1]) >= 0)


@pytest.mark.parametrize(
    "implementation", ["reference", pytest.param("cpu", marks=needs_cpu_kernel)]
)
@pytest.mark.parametrize("forced", [(1, 2), (0, 1), (0, 0), (9, 9)])
def test_split_over_devices_as_whole(implementation, forced):
    arguments = aligned(GEOMETRY, *forced) | {"implementation": implementation}
    expected = nsa_compress_attention_infer(**arguments)
    devices, table = 4, arguments["block_table"]
    assert table.shape[1] % devices == 0
    parts = np.split(table, devices, axis=1)
    pools = [arguments[name] for name in ("key", "value")]
    mesh = jax.make_mesh((devices,), ("context",), axis_types=(AxisType.Auto,))
    static = {
        name: value for name, value in arguments.items()
        if name not in ("query", "key", "value", "block_table")
    }  # fmt: skip

    def part(query, key, value, table):
        return nsa_compress_attention_infer(
            query, key, value, block_table=table, **static, context_axis="context"
        )

    run = jax.jit(
        jax.shard_map(
            part,
            mesh=mesh,
            in_specs=(P(), P("context"), P("context"), P(None, "context")),
            out_specs=(P(),) * len(expected),
        )
    )
    # Every device has the whole pools, under the same numbers.
    everywhere = [np.concatenate([pool] * devices) for pool in pools]
    results = run(arguments["query"], *everywhere, jnp.asarray(np.concatenate(parts, axis=1)))
    np.testing.assert_array_equal(results[1], expected[1])
    np.testing.assert_allclose(results[0], expected[0], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(results[2], expected[2], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "implementation", ["reference", pytest.param("cpu", marks=needs_cpu_kernel)]
)
@pytest.mark.parametrize(
    ("window", "position", "init", "local", "block"),
    [((16, 16, 16), 20, 1, 2, 20), ((16, 16, 16), 20, 0, 1, 20), ((32, 16, 64), 22, 1, 2, 5)],
)
def test_a_planted_peak(implementation, window, position, init, local, block):
    """The block that holds it is chosen; by CANN's rule, another one."""
    geometry = Geometry(lengths=(80,), window=window, k=init + local + 1, group=1, hostile=False)
    arguments = aligned(geometry, init, local)
    arguments["query"] = np.ones_like(arguments["query"])
    key = np.zeros_like(arguments["key"])
    key[arguments["block_table"][0, position // geometry.page], position % geometry.page] = 5.0
    arguments |= {"key": key, "implementation": implementation}
    _, indices = nsa_compress_attention_infer(**arguments)
    assert np.all(np.asarray(indices)[0, :, init + local] == block)
    if window[0] == window[2]:
        _, indices = nsa_compress_attention_infer(
            **arguments
            | {
                "importance": "cann",
                "init_blocks": 1,
                "local_blocks": 2,
            }
        )
        assert block not in np.asarray(indices)[0, 0] or block - 1 in np.asarray(indices)[0, 0]


def test_original_lengths_are_required():
    arguments = aligned(replace(GEOMETRY, masked=False))
    del arguments["actual_sel_seq_kvlen"]
    with pytest.raises(ValueError, match='required with importance="aligned"'):
        nsa_compress_attention_infer(**arguments)


def test_nothing_compressed_yet():
    """The forced blocks, though there is nothing to attend to."""
    geometry = Geometry(lengths=(0, 0), slack=(20, 0), k=2)
    attention, indices = nsa_compress_attention_infer(**aligned(geometry))
    assert np.all(np.asarray(attention) == 0)
    np.testing.assert_array_equal(np.asarray(indices)[:, 0], [[0, -1], [-1, -1]])
