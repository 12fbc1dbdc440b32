"""Times the whole decode step on a GPU, by parts and as one call, beside what memory allows.

    python -m benchmarks.step                            every shape
    python -m benchmarks.step 20x64k 64x32k --repeat 20  some of them
    python -m benchmarks.step --peer PATH                beside a checkout of flash_nsa

The peer is mdy666's Scalable-Flash-Native-Sparse-Attention; it needs torch and triton.
A program is a scan over decode steps that keeps all of their results, and what is timed is a step
of it: with queries, gates and block tables of its own, over pools that exceed the caches. `loop` is
the same scan around a body that only copies, so that what the scan itself costs can be seen.
`host` is how long calls of the program take to return, for each step: XLA's own work, with the
kernels' launches in it. Where it comes near a part's time, the host binds and not the GPU.
Figures are medians. Each run prints a table and writes a JSON file.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure, step_peer
from benchmarks.__main__ import machine, write
from jax_nsa import (
    PagedKV,
    nsa_compress_attention_infer,
    nsa_decode_step,
    nsa_select_attention_infer,
)

HEAD_SIZE, VALUE_SIZE, PAGE = 192, 128, 128
COMPRESS_BLOCK, STRIDE, SELECT_BLOCK, SELECT_COUNT, WINDOW = 32, 16, 64, 16, 512
# Steps of a program, and programs that are dispatched at once: so many that what passes before the
# first kernel and after the last one, some 0.5 ms, is 1 us of a step.
STEPS, PROGRAMS = 32, 16
ROTATED_BYTES = 256 << 20  # that the compressed caches hold, so that no cache does


@dataclasses.dataclass(frozen=True)
class Shape:
    """A batch of sequences that decode.

    Attributes:
        sequences: how many.
        length: original tokens of each.
        heads: query heads.
        key_value_heads: key and value heads.
        tokens: query tokens of each sequence and step.
    """

    sequences: int
    length: int
    heads: int = 64
    key_value_heads: int = 4
    tokens: int = 1

    @property
    def compressed_length(self) -> int:
        """Compressed positions of each sequence."""
        return (self.length - COMPRESS_BLOCK) // STRIDE + 1

    @property
    def sets(self) -> int:
        """Sets of sequences that steps take in turn."""
        return max(1, math.ceil(ROTATED_BYTES / self.floors["compressed"]))

    @property
    def floors(self) -> dict[str, int]:
        """Bytes of keys and values that each part must read.

        Compressed ones and the window once for all tokens of a sequence, blocks for each: tokens
        with random queries choose blocks of their own.
        """
        row = self.key_value_heads * (HEAD_SIZE + VALUE_SIZE) * 2
        chosen = self.tokens * min(self.length, SELECT_BLOCK * SELECT_COUNT)
        window = min(self.length, WINDOW + self.tokens - 1)
        compressed = self.sequences * self.compressed_length * row
        selected = self.sequences * (chosen + window) * row
        return {
            "compressed": compressed,
            "selected + window": selected,
            "step": compressed + selected,
        }


SHAPES = {
    "1x128k": Shape(1, 128 << 10),
    "8x32k": Shape(8, 32 << 10),
    "20x64k": Shape(20, 64 << 10),
    "32x8k": Shape(32, 8 << 10),
    "64x32k": Shape(64, 32 << 10),
    "20x16k": Shape(20, 16 << 10, heads=8, key_value_heads=2),
    "20x64k, 4 tokens": Shape(20, 64 << 10, tokens=4),
}

Arrays = dict[str, Any]


def problem(shape: Shape) -> tuple[Arrays, Arrays]:
    """Draws the arrays of STEPS steps: those that all share, and those that each has its own of."""
    heads, rows = shape.key_value_heads, shape.sequences * shape.tokens
    seeds = iter(jax.random.split(jax.random.key(0, impl="rbg"), 8))

    def normal(*size: int) -> jax.Array:
        draw = jax.jit(lambda seed: jax.random.normal(seed, size, "bfloat16"))
        return draw(next(seeds))

    def cache(length: int) -> tuple[Arrays, jax.Array]:
        columns = -(-length // PAGE)
        pages = shape.sets * shape.sequences * columns
        order = np.random.default_rng(0).permutation(pages).astype(np.int32)
        tables = order.reshape(shape.sets, shape.sequences, columns)
        pools = {
            "key": normal(pages, PAGE, heads * HEAD_SIZE),
            "value": normal(pages, PAGE, heads * VALUE_SIZE),
            "lengths": jnp.full(shape.sequences, length, jnp.int32),
        }
        return pools, jnp.asarray(tables[np.arange(STEPS) % shape.sets])

    compressed, compressed_tables = cache(shape.compressed_length)
    selected, selected_tables = cache(shape.length)
    own = {
        "query": normal(STEPS, rows, shape.heads, HEAD_SIZE),
        "gates": jax.nn.sigmoid(normal(STEPS, rows, shape.heads, 3)),
        "compressed": compressed_tables,
        "selected": selected_tables,
    }
    shared = {"compressed": compressed, "selected": selected}
    own["indices"] = program(parts(shape)["compressed"])(shared, own)[1]
    return jax.block_until_ready((shared, own))


def parts(shape: Shape) -> dict[str, Callable[[Arrays, Arrays], Any]]:
    """What is timed: functions of the shared arrays and a step's own."""
    common: dict[str, Any] = {
        "scale_value": HEAD_SIZE**-0.5, "head_num": shape.heads,
        "key_value_head_num": shape.key_value_heads, "layout": "TND",
        "actual_seq_qlen": None if shape.tokens == 1 else [shape.tokens] * shape.sequences,
    }  # fmt: skip
    chosen = {"select_block_size": SELECT_BLOCK, "select_block_count": SELECT_COUNT}
    windows = {"compress_block_size": COMPRESS_BLOCK, "compress_stride": STRIDE}

    def loop(shared: Arrays, own: Arrays) -> Any:
        del shared
        return own["query"][..., :VALUE_SIZE], own["compressed"][:, :SELECT_COUNT]

    def compressed(shared: Arrays, own: Arrays) -> Any:
        cache = shared["compressed"]
        return nsa_compress_attention_infer(
            own["query"], cache["key"], cache["value"], **common, **chosen, **windows,
            page_block_size=PAGE, block_table=own["compressed"],
            actual_cmp_seq_kvlen=cache["lengths"],
            actual_sel_seq_kvlen=shared["selected"]["lengths"],
            atten_mask=None if shape.tokens == 1 else np.ones((1, 1), bool),
        )  # fmt: skip

    def selected(shared: Arrays, own: Arrays) -> Any:
        cache = shared["selected"]
        return nsa_select_attention_infer(
            own["query"], cache["key"], cache["value"], own["indices"], **common, **chosen,
            page_block_size=PAGE, block_table=own["selected"], actual_seq_kvlen=cache["lengths"],
            window_size=WINDOW,
        )  # fmt: skip

    def step(shared: Arrays, own: Arrays) -> Any:
        caches = [
            PagedKV(block_table=own[name], **shared[name]) for name in ("compressed", "selected")
        ]
        return nsa_decode_step(
            own["query"], own["gates"], *caches, **common, **chosen, **windows, window_size=WINDOW
        )

    return {"loop": loop, "compressed": compressed, "selected + window": selected, "step": step}


def program(part: Callable[[Arrays, Arrays], Any], unroll: bool = False) -> Callable[..., Any]:
    """A scan over steps that keeps all results."""

    def steps(shared: Arrays, own: Arrays) -> Any:
        return jax.lax.scan(lambda _, own: (None, part(shared, own)), None, own, unroll=unroll)[1]

    return jax.jit(steps)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one step, medians of samples: until its results are there, and of the host."""

    step: float
    host: float


def time_program(run: Callable[..., Any], operands: tuple[Arrays, Arrays], repeat: int) -> Times:
    """Times a program, dispatched several times at once."""
    returned: list[float] = []

    def programs() -> list[Any]:
        start = time.perf_counter()
        results = [run(*operands) for _ in range(PROGRAMS)]
        returned.append(time.perf_counter() - start)
        return results

    jax.block_until_ready(run(*operands))
    samples = [measure.seconds(programs) for _ in range(repeat)]
    steps = PROGRAMS * STEPS
    return Times(statistics.median(samples) / steps, statistics.median(returned) / steps)


def run(shape: Shape, repeat: int, peer: pathlib.Path | None) -> dict[str, Any]:
    """Times one shape; returns its row of the results."""
    operands = problem(shape)
    times = {
        name: time_program(program(part), operands, repeat) for name, part in parts(shape).items()
    }
    bandwidth = measure.DeviceBandwidth()
    row = {
        "shape": dataclasses.asdict(shape),
        "floor_bytes": shape.floors,
        "read_bandwidth": statistics.median(bandwidth.sample() for _ in range(5)),
        "seconds": {name: part.step for name, part in times.items()},
        "host_seconds": {name: part.host for name, part in times.items()},
    }
    del operands, bandwidth
    if peer is not None and shape.tokens == 1:
        row["peer_seconds"] = step_peer.time_parts(peer, shape, STEPS, repeat)
    return row


def print_row(name: str, row: dict[str, Any]) -> None:
    """One line for each part, in microseconds."""
    for part, seconds in row["seconds"].items():
        host = row["host_seconds"][part]
        line = f"{name:18}{part:18}{seconds * 1e6:9.1f}   host {host * 1e6:5.1f}"
        if part in row["floor_bytes"]:
            floor = row["floor_bytes"][part] / row["read_bandwidth"]
            line += f"   floor {floor * 1e6:7.1f}, {floor / seconds:6.1%} of the read bandwidth"
        if part in row.get("peer_seconds", {}):
            line += f"   peer {row['peer_seconds'][part] * 1e6:7.1f}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", nargs="*", help=f"shapes among {', '.join(SHAPES)}")
    parser.add_argument("--repeat", type=int, default=10, help="programs that a median is of")
    parser.add_argument("--peer", type=pathlib.Path, metavar="PATH", help="a checkout to time too")
    parser.add_argument("--output", metavar="JSON", help="where to write, not benchmarks/results")
    arguments = parser.parse_args()
    if unknown := set(arguments.what) - set(SHAPES):
        parser.error(f"no such shape: {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    report: dict[str, Any] = {"machine": machine(), "rows": {}}
    print("  ".join(f"{what}: {value}" for what, value in report["machine"].items()))
    for name in arguments.what or SHAPES:
        report["rows"][name] = run(SHAPES[name], arguments.repeat, arguments.peer)
        print_row(name, report["rows"][name])
    write(report, arguments.output, f"step-{report['machine']['platform']}")


if __name__ == "__main__":
    main()
