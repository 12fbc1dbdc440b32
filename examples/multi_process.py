"""Several hosts: sequences and heads over all devices, then sequences split along their pages.

Start it once on each host, here two, the first of them reachable as HOST:

    python multi_process.py --coordinator HOST:1234 --processes 2 --process 0
    python multi_process.py --coordinator HOST:1234 --processes 2 --process 1

or try it on one machine, with `--coordinator 127.0.0.1:1234 --cpu-devices 2` in two terminals.
"""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from jax_nsa import nsa_compress_attention_infer

SEQUENCES, HEADS, KEY_VALUE_HEADS, HEAD_SIZE, VALUE_SIZE = 8, 16, 4, 64, 32
PAGE, PAGES_PER_SEQUENCE = 32, 8

attend = functools.partial(
    nsa_compress_attention_infer,
    scale_value=HEAD_SIZE**-0.5,
    select_block_size=64,
    select_block_count=6,
    page_block_size=PAGE,
    compress_block_size=32,
    compress_stride=16,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--coordinator", required=True, help="host:port of process 0")
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--process", type=int, required=True)
    parser.add_argument("--cpu-devices", type=int, help="run on that many CPU devices")
    arguments = parser.parse_args()
    if arguments.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", arguments.cpu_devices)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        arguments.coordinator, arguments.processes, arguments.process, initialization_timeout=60
    )
    print(f"process {jax.process_index()} of {jax.process_count()}: {jax.device_count()} devices")

    # Every process draws the same sequences; each of its devices gets its part of them.
    rng = np.random.default_rng(0)
    pool = SEQUENCES * PAGES_PER_SEQUENCE
    query = rng.standard_normal((SEQUENCES, HEADS, HEAD_SIZE), np.float32)
    key = rng.standard_normal((pool, PAGE, KEY_VALUE_HEADS * HEAD_SIZE), np.float32)
    value = rng.standard_normal((pool, PAGE, KEY_VALUE_HEADS * VALUE_SIZE), np.float32)
    table = rng.permutation(pool).reshape(SEQUENCES, PAGES_PER_SEQUENCE).astype(np.int32)
    lengths = rng.integers(100, PAGES_PER_SEQUENCE * PAGE + 1, SEQUENCES).astype(np.int32)
    with jax.default_device(jax.local_devices()[0]):
        expected = attend(
            *map(jnp.asarray, (query, key, value)),
            block_table=table, actual_cmp_seq_kvlen=lengths,
            head_num=HEADS, key_value_head_num=KEY_VALUE_HEADS,
        )  # fmt: skip

    # Sequences over one axis, heads over the other: no communication at all.
    devices = np.asarray(jax.devices())
    heads = 2 if len(devices) % 2 == 0 else 1
    mesh = Mesh(devices.reshape(-1, heads), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
    pages, rows = PartitionSpec(None, None, "heads"), PartitionSpec("batch")
    check("batch and heads", expected, jax.shard_map(
        lambda query, key, value, table, lengths: attend(
            query, key, value, block_table=table, actual_cmp_seq_kvlen=lengths,
            head_num=HEADS // heads, key_value_head_num=KEY_VALUE_HEADS // heads,
        ),
        mesh=mesh,
        in_specs=(PartitionSpec("batch", "heads"), pages, pages, rows, rows),
        out_specs=PartitionSpec("batch", "heads"),
    ), query, key, value, table, lengths)  # fmt: skip

    # Each sequence's pages over all devices. A device names its own pages from 0, so the pool is
    # laid out device by device.
    columns = PAGES_PER_SEQUENCE // len(devices)
    by_device = table.reshape(SEQUENCES, len(devices), columns).swapaxes(0, 1)
    local = np.arange(SEQUENCES * columns, dtype=np.int32).reshape(SEQUENCES, columns)
    mesh = Mesh(devices, ("context",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("context"), PartitionSpec()
    check("context", expected, jax.shard_map(
        lambda query, key, value, table, lengths: attend(
            query, key, value, block_table=table, actual_cmp_seq_kvlen=lengths,
            head_num=HEADS, key_value_head_num=KEY_VALUE_HEADS, context_axis="context",
        ),
        mesh=mesh,
        in_specs=(whole, split, split, PartitionSpec(None, "context"), whole),
        out_specs=whole,
    ), query, key[by_device.ravel()], value[by_device.ravel()],
       np.tile(local, len(devices)), lengths)  # fmt: skip


def check(road, expected, operator, *operands) -> None:
    """Runs a sharded operator and compares this process's part of its results."""
    mesh_operator = jax.jit(operator)
    results = mesh_operator(*operands)
    for result, whole in zip(results, expected, strict=True):
        for shard in result.addressable_shards:
            want = np.asarray(whole)[shard.index]
            np.testing.assert_allclose(np.asarray(shard.data), want, rtol=1e-5, atol=1e-5)
    print(f"{road}: agrees with one device")


if __name__ == "__main__":
    main()
