"""A decode step over a mesh of devices: its arrays, where they lie, the program of many steps.

The mesh has three axes. Along one, sequences are split, along another key/value heads with their
query heads, along the third the pages of every sequence (`context_axis`). One program, in
`jax.shard_map`, serves every split; one device is the mesh of 1 x 1 x 1.

A cache is `[sequences, columns, sets, page, heads * size]`. Where a page lies tells whose rows it
holds, so that the same numbers are drawn for the same sequences whatever the mesh. What a device
has of it is its pool of pages.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import compress_attention, decode_step
from jax_nsa import (
    PagedKV,
    nsa_compress_attention_infer,
    nsa_decode_step,
    nsa_select_attention_infer,
)
from jax_nsa.shapes import Shape

AXES = ("sequences", "heads", "context")
COLD_BYTES = 128 << 20  # that each device reads in turn, more than twice what its caches hold
GRAINS = 8  # parts of a sequence whose columns are shuffled each by itself: as many may be split

Arrays = dict[str, Any]
Part = Callable[[Arrays, Arrays], Any]
ROWS = P(None, "sequences", "heads")  # how what each step has for query's rows is split


@dataclasses.dataclass(frozen=True)
class Split:
    """In how many parts a step is split along each axis of the mesh."""

    sequences: int = 1
    heads: int = 1
    context: int = 1

    @property
    def devices(self) -> int:
        """How many devices share the step."""
        return math.prod(dataclasses.astuple(self))

    @property
    def context_axis(self) -> str | None:
        """The mesh axis that pages are split over, if they are."""
        return "context" if self.context > 1 else None

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The first devices of the process."""
        devices = np.array(jax.devices()[: self.devices]).reshape(dataclasses.astuple(self))
        return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))

    def __str__(self) -> str:
        parts = {axis: n for axis, n in dataclasses.asdict(self).items() if n > 1}
        return ", ".join(f"{axis} / {n}" for axis, n in parts.items()) or "one device"


def floors(shape: Shape) -> dict[str, int]:
    """Bytes of keys and values that each part of a step must read, on all devices together."""
    return {
        "compressed": compress_attention.floor_bytes(shape),
        "step": decode_step.floor_bytes(shape),
    }


def cold_sets(shape: Shape, devices: int) -> int:
    """Sets of pages that steps take in turn, so that no cache of so many devices holds them."""
    return max(1, math.ceil(COLD_BYTES * devices / floors(shape)["compressed"]))


def draw(
    shape: Shape, split: Split, *, sets: int, steps: int, dtype: str = "bfloat16"
) -> tuple[Arrays, Arrays]:
    """Draws the arrays of some steps and places them.

    Args:
        shape: of one step, with one new token for each sequence.
        split: over what; which numbers are drawn does not depend on it.
        sets: sets of pages, which steps take in turn.
        steps: how many.
        dtype: of all floats.

    Returns:
        The arrays that all steps share, and those that each has its own of, along a first axis.
    """
    assert shape.query_tokens == 1
    rows = {"compressed": shape.lengths, "original": shape.tokens}
    blocks = {
        "compressed": shape.blocks.strides_per_select_block,
        "original": shape.blocks.select_block_size,
    }
    columns = {n: _columns(int(rows[n].max()), shape.page, blocks[n]) for n in rows}
    sizes = {"key": shape.head_size, "value": shape.value_size}
    heads = shape.key_value_heads

    def floats() -> tuple[Arrays, Arrays]:
        seeds = itertools.count()

        def noise(*size: int) -> jax.Array:
            return _noise(next(seeds), size).astype(dtype)

        pools = {
            cache: {
                name: noise(shape.sequences, columns[cache], sets, shape.page, heads * size)
                for name, size in sizes.items()
            }
            for cache in rows
        }
        of_steps = (steps, shape.sequences, shape.heads)
        query, gates = noise(*of_steps, shape.head_size), noise(*of_steps, 3)
        return pools, {"query": query, "gates": jax.nn.sigmoid(gates)}

    tables = P(None, "sequences", split.context_axis)
    pools = {name: P("sequences", split.context_axis, None, None, "heads") for name in sizes}
    lie = (dict.fromkeys(rows, pools), {"query": ROWS, "gates": ROWS})
    shardings = jax.tree.map(functools.partial(NamedSharding, split.mesh), lie)
    shared, own = jax.jit(floats, out_shardings=shardings)()
    for name, lengths in rows.items():
        shared[name]["lengths"] = _put(split, lengths, P("sequences"))
        of_steps = _tables(shape.sequences, columns[name], sets, split, steps)
        own[name] = _put(split, of_steps, tables)
    return jax.block_until_ready((shared, own))


def parts(shape: Shape, split: Split, implementation: str | None = None) -> dict[str, Part]:
    """What is timed: functions of what a device holds of the shared arrays and of a step's own."""
    common: dict[str, Any] = {
        "scale_value": shape.head_size**-0.5, "head_num": shape.heads // split.heads,
        "key_value_head_num": shape.key_value_heads // split.heads, "layout": "TND",
        "implementation": implementation,
        "context_axis": split.context_axis,
        "select_block_size": shape.blocks.select_block_size,
        "select_block_count": shape.select_count,
    }  # fmt: skip
    windows: dict[str, Any] = {
        "compress_block_size": shape.blocks.compress_block_size,
        "compress_stride": shape.blocks.compress_stride,
    }

    def cache(name: str, shared: Arrays, own: Arrays) -> PagedKV:
        pools = shared[name]
        key, value = (pools[n].reshape(-1, *pools[n].shape[3:]) for n in ("key", "value"))
        return PagedKV(key, value, own[name], pools["lengths"])

    def compressed(shared: Arrays, own: Arrays) -> Any:
        paged = cache("compressed", shared, own)
        return nsa_compress_attention_infer(
            own["query"], paged.key, paged.value, **common, **windows,
            page_block_size=shape.page, block_table=paged.block_table,
            actual_cmp_seq_kvlen=paged.lengths,
            actual_sel_seq_kvlen=shared["original"]["lengths"],
        )  # fmt: skip

    def selected(shared: Arrays, own: Arrays) -> Any:
        paged = cache("original", shared, own)
        return nsa_select_attention_infer(
            own["query"], paged.key, paged.value, own["ids"], **common,
            page_block_size=shape.page, block_table=paged.block_table,
            actual_seq_kvlen=paged.lengths, window_size=shape.window,
        )  # fmt: skip

    def step(shared: Arrays, own: Arrays) -> Any:
        caches = (cache(name, shared, own) for name in ("compressed", "original"))
        return nsa_decode_step(
            own["query"], own["gates"], *caches, **common, **windows, window_size=shape.window
        )

    return {"compressed": compressed, "selected": selected, "step": step}


def program(part: Part, split: Split, operands: tuple[Arrays, Arrays]) -> Any:
    """A scan over steps that keeps all of their results, compiled for all devices of a split."""

    def steps(shared: Arrays, own: Arrays) -> Any:
        return jax.lax.scan(lambda _, own: (None, part(shared, own)), None, own)[1]

    lie = jax.tree.map(lambda array: array.sharding.spec, operands)
    spread = jax.shard_map(steps, mesh=split.mesh, in_specs=lie, out_specs=ROWS)
    return jax.jit(spread).lower(*operands).compile()


def _noise(seed: int, size: tuple[int, ...]) -> jax.Array:
    """Numbers of variance 1, float32, each hashed from where it lies.

    Each device computes what it holds. The generators of `jax.random` do so too, but take long to
    compile, or need twice the memory.
    """
    strides = np.cumprod((1, *size[:0:-1]))[::-1].astype(np.uint32)
    bits = jnp.full(size, 0x9E3779B9 * (seed + 1) % 2**32, jnp.uint32)
    for axis, stride in enumerate(strides):
        bits += jax.lax.broadcasted_iota(jnp.uint32, size, axis) * stride
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return jax.lax.bitcast_convert_type(bits, jnp.int32) * np.float32(3**0.5 / 2**31)


def _put(split: Split, array: np.ndarray, spec: P) -> jax.Array:
    return jax.device_put(array, NamedSharding(split.mesh, spec))


def _columns(rows: int, page: int, block: int) -> int:
    """Columns of a block table for so many rows, in grains that hold whole blocks of rows."""
    return -(-rows // (GRAINS * math.lcm(page, block))) * GRAINS * math.lcm(page, block) // page


def _tables(sequences: int, columns: int, sets: int, split: Split, steps: int) -> np.ndarray:
    """Block tables, int32 `[steps, sequences, columns]`.

    Pages have their number in the pool of the device that holds them.
    """
    rng = np.random.default_rng(0)
    grain = columns // GRAINS
    shuffled = np.concatenate([i * grain + rng.permutation(grain) for i in range(GRAINS)])
    rows, width = sequences // split.sequences, columns // split.context
    row = np.arange(sequences)[None, :, None] % rows
    taken = np.arange(steps)[:, None, None] % sets
    return ((row * width + shuffled % width) * sets + taken).astype(np.int32)
