"""The decode step of mdy666's flash_nsa, from a checkout of it, under a CUDA graph."""

from __future__ import annotations

import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.step import Shape


def time_parts(checkout: pathlib.Path, shape: Shape, steps: int, repeat: int) -> dict[str, float]:
    """Seconds of a step and of its parts; of none, with a word why, where it cannot run.

    Each step has a query and block tables of its own; original and compressed rows lie in one pool.

    Args:
        checkout: the repository's root.
        shape: what to time, one query token for each sequence.
        steps: calls that a graph is of.
        repeat: replays that a median is of.
    """
    sys.path.insert(0, str(checkout))
    try:
        import torch
        from flash_nsa import inference
    except ImportError as error:
        print(f"the peer is left out: {error}")
        return {}
    page, heads, sets = 128, shape.key_value_heads, shape.sets
    columns = [-(-length // page) for length in (shape.length, shape.compressed_length)]
    pages = sets * shape.sequences * sum(columns)
    kwargs = {"device": "cuda", "dtype": torch.bfloat16}
    key = torch.randn(pages, page, heads, 192, **kwargs)
    value = torch.randn(pages, page, heads, 128, **kwargs)
    order = torch.randperm(pages, device="cuda", dtype=torch.int32)
    order = order.view(sets, shape.sequences, sum(columns))
    tables = [part.contiguous() for part in order.split(columns, dim=2)]
    query = torch.randn(steps, shape.sequences, shape.heads, 192, **kwargs)
    gates = torch.rand(steps, shape.sequences, shape.heads, 3, **kwargs)
    lengths = torch.full((shape.sequences,), shape.length, device="cuda", dtype=torch.int32)
    no_slot = torch.full_like(lengths, -1)

    def compressed(i: int) -> torch.Tensor:
        table = tables[1][i % sets]
        _, lse = inference.cmp_attn_decode(query[i], key, value, table, lengths)
        return inference.topk_decode(query[i], key, lse, table, lengths)

    chosen = [compressed(i) for i in range(steps)]

    def selected(i: int) -> object:
        table = tables[0][i % sets]
        return inference.fused_slc_swa_attn_decode(query[i], key, value, chosen[i], table, lengths)

    def step(i: int) -> object:
        tables_of_step = [table[i % sets] for table in tables]
        return inference.nsa_decode(
            query[i], key, value, gates[i], lengths, tables_of_step[0], no_slot, tables_of_step[1]
        )

    def seconds(part: Callable[[int], object]) -> float:
        for i in range(3):
            part(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [part(i) for i in range(steps)]
        samples = []
        for _ in range(repeat + 1):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) / 1e3 / steps)
        del kept
        return statistics.median(samples[1:])

    parts = {"compressed": compressed, "selected + window": selected, "step": step}
    return {name: seconds(part) for name, part in parts.items()}
