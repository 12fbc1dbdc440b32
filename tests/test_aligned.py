"""importance="aligned" of split sequences, and what it refuses; choices.py has the rest."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention.problems import Geometry, build
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from kernels import cpu_or_reference

from jax_nsa import nsa_compress_attention_infer

GEOMETRY = Geometry(
    lengths=(61, 0, 33, 17), layout="BSND", tokens=3, token_counts=(3, 1, 2, 0), masked=True,
    slack=(3, 9, 0, 15), group=4, k=6, page=16, spare_slots=0, return_lse=True,
    importance="aligned",
)  # fmt: skip


@pytest.mark.parametrize("implementation", cpu_or_reference("compress_attention"))
@pytest.mark.parametrize("forced", [(1, 2), (0, 1), (0, 0), (9, 9)])
def test_split_over_devices_as_whole(implementation, forced):
    geometry = replace(GEOMETRY, init_blocks=forced[0], local_blocks=forced[1])
    arguments = build(geometry) | {"implementation": implementation}
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


def test_original_lengths_are_required():
    arguments = build(replace(GEOMETRY, masked=False))
    del arguments["actual_sel_seq_kvlen"]
    with pytest.raises(ValueError, match='required with importance="aligned"'):
        nsa_compress_attention_infer(**arguments)
