"""A decode step on all devices of this process: sequences over some, key/value heads over others.

    python sharded.py                    on this machine's devices
    python sharded.py --cpu-devices 8    on as many devices as its processor pretends to be

Each (sequence, key/value head) is a computation of its own, so that the compiled step has no
collective, and the same bits as on one device.
"""

from __future__ import annotations

import argparse
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_nsa import PagedKV, nsa_decode_step

SEQUENCES, HEADS, KEY_VALUE_HEADS, HEAD_SIZE, VALUE_SIZE = 8, 16, 4, 64, 32
PAGE, TOKENS, COMPRESS_BLOCK, STRIDE = 32, 512, 32, 16


def step(
    query: jax.Array, gates: jax.Array, compressed: PagedKV, selected: PagedKV
) -> tuple[jax.Array, jax.Array]:
    return nsa_decode_step(
        query, gates, compressed, selected, scale_value=HEAD_SIZE**-0.5, head_num=HEADS,
        key_value_head_num=KEY_VALUE_HEADS, select_block_size=64, select_block_count=4,
        compress_block_size=COMPRESS_BLOCK, compress_stride=STRIDE, window_size=100,
    )  # fmt: skip


def draw_step() -> tuple[np.ndarray, np.ndarray, PagedKV, PagedKV]:
    """Draws a step's arrays; sequences have between half of the tokens and all."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(TOKENS // 2, TOKENS + 1, SEQUENCES).astype(np.int32)

    def cache(rows: int, lengths: np.ndarray) -> PagedKV:
        columns = math.ceil(rows / PAGE)
        pool = (SEQUENCES * columns, PAGE)
        return PagedKV(
            rng.standard_normal((*pool, KEY_VALUE_HEADS * HEAD_SIZE), np.float32),
            rng.standard_normal((*pool, KEY_VALUE_HEADS * VALUE_SIZE), np.float32),
            rng.permutation(pool[0]).reshape(SEQUENCES, columns).astype(np.int32),
            lengths,
        )

    return (
        rng.standard_normal((SEQUENCES, HEADS, HEAD_SIZE), np.float32),
        rng.random((SEQUENCES, HEADS, 3), np.float32),
        cache(TOKENS // STRIDE, (tokens - COMPRESS_BLOCK) // STRIDE + 1),
        cache(TOKENS, tokens),
    )


def main(cpu_devices: int | None = None) -> None:
    if cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    devices = len(jax.devices())
    heads = math.gcd(devices, KEY_VALUE_HEADS)
    sequences = math.gcd(devices // heads, SEQUENCES)
    # XLA splits over these axes by itself. With AxisType.Explicit, the default of jax.make_mesh,
    # shardings are a part of types; the calls stay the same.
    types = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((sequences, heads), ("sequences", "heads"), axis_types=types)
    idle = devices - sequences * heads
    left = f", {idle} idle" if idle else ""
    print(f"{devices} devices: {sequences} parts of the sequences, {heads} of the heads{left}")

    by_row = PartitionSpec("sequences", "heads")
    # Any page may be any sequence's: pools stay whole along pages, and split along heads.
    cache = PagedKV(
        key=PartitionSpec(None, None, "heads"),
        value=PartitionSpec(None, None, "heads"),
        block_table=PartitionSpec("sequences"),
        lengths=PartitionSpec("sequences"),
    )
    specs = (by_row, by_row, cache, cache)
    arrays = draw_step()
    placed = jax.tree.map(
        lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec)), arrays, specs
    )
    program = jax.jit(step).lower(*placed).compile()
    attention, blocks = program(*placed)

    kinds = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    collectives = re.findall(kinds, program.as_text())
    print(f"collectives in the compiled step: {len(collectives)}")
    print(f"attention {attention.shape} is split as {attention.sharding.spec}")
    expected, expected_blocks = jax.jit(step)(*jax.tree.map(jnp.asarray, arrays))
    np.testing.assert_array_equal(attention, expected)
    np.testing.assert_array_equal(blocks, expected_blocks)
    print("the same bits as on one device")
    assert not collectives


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cpu-devices", type=int, help="how many devices the CPU is to be")
    main(parser.parse_args().cpu_devices)
