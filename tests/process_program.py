"""What test_processes.py starts several of: a decode step, and its selected branch alone.

    python process_program.py COORDINATOR PROCESSES PROCESS

Each process has two devices. Sequences and heads are split over the devices of all, by JAX's
automatic partitioner; then every sequence's pages are, in shard_map.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_nsa import PagedKV, nsa_decode_step, nsa_select_attention_infer

SEQUENCES, HEADS, KEY_VALUE_HEADS, HEAD_SIZE, VALUE_SIZE = 8, 16, 4, 64, 32
PAGE, TOKENS, COMPRESS_BLOCK, STRIDE, SELECT_BLOCK, SELECT_COUNT = 32, 2048, 32, 16, 64, 6
SHARED = {
    "scale_value": HEAD_SIZE**-0.5, "head_num": HEADS, "key_value_head_num": KEY_VALUE_HEADS,
    "select_block_size": SELECT_BLOCK, "select_block_count": SELECT_COUNT, "window_size": 300,
}  # fmt: skip


def step(query, gates, compressed, selected, **options: Any) -> Any:
    return nsa_decode_step(
        query, gates, compressed, selected, **SHARED, compress_block_size=COMPRESS_BLOCK,
        compress_stride=STRIDE, **options,
    )  # fmt: skip


def select(query, ids, cache, **options: Any) -> Any:
    return nsa_select_attention_infer(
        query, cache.key, cache.value, ids, **SHARED, page_block_size=PAGE, layout="TND",
        block_table=cache.block_table, actual_seq_kvlen=cache.lengths, return_lse=True, **options,
    )  # fmt: skip


def cache(rng: np.random.Generator, lengths: np.ndarray, rows: int) -> PagedKV:
    """A cache for so many rows of each sequence, its pages in random order."""
    columns = rows // PAGE
    pool = (SEQUENCES * columns, PAGE)
    return PagedKV(
        rng.standard_normal((*pool, KEY_VALUE_HEADS * HEAD_SIZE), np.float32),
        rng.standard_normal((*pool, KEY_VALUE_HEADS * VALUE_SIZE), np.float32),
        rng.permutation(pool[0]).reshape(SEQUENCES, columns).astype(np.int32),
        lengths.astype(np.int32),
    )


def device_by_device(whole: PagedKV, devices: int) -> PagedKV:
    """The same cache, pools laid out by columns of the block table, each device's from page 0."""
    columns = whole.block_table.shape[1] // devices
    order = whole.block_table.reshape(SEQUENCES, devices, columns).swapaxes(0, 1).ravel()
    own = np.arange(SEQUENCES * columns, dtype=np.int32).reshape(SEQUENCES, columns)
    return dataclasses.replace(
        whole,
        key=whole.key[order],
        value=whole.value[order],
        block_table=np.tile(own, devices),
    )


def check(road: str, operator: Callable, mesh: Mesh, specs: tuple, operands: tuple, expected):
    """Runs an operator on operands that are split so, compares what this process has of it."""

    def place(array: np.ndarray, spec: P) -> jax.Array:
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    results = jax.jit(operator)(*jax.tree.map(place, operands, specs))
    for result, whole in zip(results, expected, strict=True):
        assert not result.is_fully_addressable or jax.process_count() == 1
        for shard in result.addressable_shards:
            want = np.asarray(whole)[shard.index]
            np.testing.assert_allclose(np.asarray(shard.data), want, rtol=1e-5, atol=1e-5)
    print(f"{road}: agrees with one device")


def main(coordinator: str, processes: int, process: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, processes, process, initialization_timeout=60)

    # Every process draws the same sequences.
    rng = np.random.default_rng(0)
    tokens = rng.integers(TOKENS // 2, TOKENS + 1, SEQUENCES)
    query = rng.standard_normal((SEQUENCES, HEADS, HEAD_SIZE), np.float32)
    gates = rng.random((SEQUENCES, HEADS, 3), np.float32)
    ids = rng.integers(-1, TOKENS // 2 // SELECT_BLOCK, (SEQUENCES, KEY_VALUE_HEADS, SELECT_COUNT))
    compressed = cache(rng, (tokens - COMPRESS_BLOCK) // STRIDE + 1, TOKENS // STRIDE)
    selected = cache(rng, tokens, TOKENS)
    operands = {"selected": (query, ids.astype(np.int32), selected)}
    operands["step"] = (query, gates, compressed, selected)
    operators = {"selected": select, "step": step}
    with jax.default_device(jax.local_devices()[0]):
        expected = {name: jax.jit(operators[name])(*operands[name]) for name in operators}

    devices = np.asarray(jax.devices())
    mesh = Mesh(devices.reshape(-1, 2), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
    rows, pages = P("batch", "heads"), P(None, None, "heads")
    split = PagedKV(pages, pages, P("batch"), P("batch"))
    for name, specs in (("selected", (rows, rows, split)), ("step", (rows, rows, split, split))):
        check(f"{name} by batch and heads", operators[name], mesh, specs, operands[name],
              expected[name])  # fmt: skip

    mesh = Mesh(devices, ("context",), axis_types=(AxisType.Auto,))
    split = PagedKV(P("context"), P("context"), P(None, "context"), P())
    for name, specs in (("selected", (P(), P(), split)), ("step", (P(), P(), split, split))):

        def part(*arrays, name=name):
            return operators[name](*arrays, context_axis="context")

        moved = jax.tree.map(
            lambda c: device_by_device(c, len(devices)) if isinstance(c, PagedKV) else c,
            operands[name], is_leaf=lambda c: isinstance(c, PagedKV),
        )  # fmt: skip
        operator = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P())
        check(f"{name} by context", operator, mesh, specs, moved, expected[name])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
