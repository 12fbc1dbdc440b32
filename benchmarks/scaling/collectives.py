"""What the devices of a program say to each other: counted in its text, and timed alone."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

KINDS = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
# An asynchronous one is counted where it is done: what stands there is its result alone.
_INSTRUCTION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-done)?\(")
_ARRAY = re.compile(r"\b[a-z]+(\d*)\w*\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
        kind: one of `KINDS`.
        bytes: of its results on each device.
    """

    kind: str
    bytes: int


def collectives(text: str) -> list[Collective]:
    """The collectives in a compiled program's text, those of a loop's body once."""
    return [
        Collective(kind, sum(_bytes(*array) for array in _ARRAY.findall(results)))
        for results, kind in _INSTRUCTION.findall(text)
    ]


def _bytes(bits: str, sizes: str) -> int:
    """Bytes of an array, written as in `f32[4,128]`; a `pred` has one for each element."""
    return math.prod(int(n) for n in sizes.split(",") if n) * max(8, int(bits or 8)) // 8


def exchange(mesh: Mesh, reduced: list[int], steps: int) -> Callable[[], Any]:
    """A program that does nothing but all-reduces of so many bytes, in each of some steps.

    They run in a scan, as those of a decode step do. Each waits for the one before it.
    """

    def one(vectors: list[jax.Array], _: None) -> tuple[list[jax.Array], None]:
        last = jnp.float32(0)
        results = []
        for vector in vectors:
            result = jax.lax.psum(vector + last, mesh.axis_names)
            last = result[0]
            results.append(jax.lax.pcast(result, mesh.axis_names, to="varying"))
        return results, None

    def chain(vectors: list[jax.Array]) -> Any:
        return jax.lax.scan(one, vectors, None, steps)[0]

    run = jax.jit(
        jax.shard_map(chain, mesh=mesh, in_specs=P(mesh.axis_names), out_specs=P(mesh.axis_names))
    )
    zeros = jax.jit(
        lambda: [jnp.zeros(mesh.size * max(1, size // 4), jnp.float32) for size in reduced],
        out_shardings=NamedSharding(mesh, P(mesh.axis_names)),
    )()
    return functools.partial(run.lower(zeros).compile(), zeros)


def on_ring(reduced: int, devices: int) -> float:
    """Bytes that a device sends for an all-reduce of so many, as a ring does it."""
    return 2 * (devices - 1) / devices * reduced
