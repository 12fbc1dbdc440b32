"""Legal calls under `jax.vmap`, over meshes, and with their caches split over devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from step.problems import Step

from fuzz.draw import Random, pick
from jax_nsa import PagedKV

if TYPE_CHECKING:
    from fuzz.legal import Operator


def check_vmap(tester: Any, known: Operator, geometry: Any, random: Random) -> None:
    """Two calls of one geometry under `jax.vmap`; all that tells them apart is mapped."""
    both = [known.build(_other(geometry, i)) for i in range(2)]
    names = _arrays(both[0])
    same = {n for n in names if jax.tree.all(jax.tree.map(np.array_equal, both[0][n], both[1][n]))}
    mapped = {n for n in names if n not in same or random.random() < 0.5}
    if "key" in names and random.integers(2):  # they share their caches, and whose pages are whose
        shared = {"key", "value", "block_table"}
        mapped -= shared
        both[1] |= {n: both[0][n] for n in shared}
    arrays = {n: jax.tree.map(lambda *a: np.stack(a), *(c[n] for c in both)) for n in mapped}
    results = jax.jit(jax.vmap(lambda mapped: tester.apply({**both[0], **mapped})))(arrays)
    for i, arguments in enumerate(both):
        own = tuple(np.asarray(result[i]) for result in jax.tree.leaves(results))
        tester.assert_agrees(own, arguments)


# Arguments whose first axis is sequences, where rows are not packed; and arrays of a cache.
OF_SEQUENCES = (
    "query", "gates", "topk_indices", "block_table", "lengths", "slot_mapping", "actual_seq_len",
    "actual_seq_qlen", "actual_seq_kvlen", "actual_cmp_seq_kvlen", "actual_sel_seq_kvlen",
)  # fmt: skip


def check_mesh(tester: Any, known: Operator, geometry: Any, random: Random) -> None:
    """The same over a mesh, sequences and heads split where they divide: by XLA, JAX or the user.

    Which sequence writes to a row of a cache is known where all sequences are: a compression's are
    split by XLA alone.
    """
    arguments = known.build(geometry)
    by = pick(random, AxisType.Auto, AxisType.Explicit, "shard_map")
    of = geometry.original if isinstance(geometry, Step) else geometry
    if "layout" in arguments:
        heads, together = of.key_value_heads, of.layout == "TND" and of.token_counts is not None
    else:
        heads, together = of.heads, by != AxisType.Auto
    most = len(jax.devices())
    rows = pick(random, *_divisors(1 if together else len(of.lengths), most))
    parts = pick(random, *_divisors(heads, most // rows))
    axis_type = AxisType.Auto if by == "shard_map" else by
    mesh = jax.make_mesh(
        (rows, parts),
        ("b", "h"),
        axis_types=(axis_type,) * 2,
        devices=jax.devices()[: rows * parts],
    )
    # Reshapes, such as to one pool, take an axis of one device for any.
    split = {"b": None if together else "b", "h": "h" if parts > 1 or tester.rank is None else None}
    specs = {n: _specs(n, arguments[n], of, split) for n in _arrays(arguments)}
    arrays = {
        n: jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), arguments[n], its)
        for n, its in specs.items()
    }

    def part(arrays: dict[str, Any]) -> Any:
        own = {n: arguments[n] // parts for n in arguments if n.endswith("head_num")}
        return tester.apply({**arguments, **own, **arrays})

    def whole(arrays: dict[str, Any]) -> Any:
        return tester.apply({**arguments, **arrays})

    if by == "shard_map":
        # Results have query's rows and heads, or are the caches.
        result = specs.get("cache", PartitionSpec(*_spec("query", _head_axis(of) + 1, of, split)))
        run = jax.shard_map(part, mesh=mesh, in_specs=(specs,), out_specs=result)
        results = jax.jit(run)(arrays)
    else:
        with jax.set_mesh(mesh):
            results = jax.jit(whole)(arrays)
    tester.assert_agrees(results, arguments)


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, most + 1) if number % n == 0]


def _specs(name: str, value: Any, geometry: Any, split: Mapping[str, str | None]) -> Any:
    """How an argument, or each array of one that has several, is split over a mesh."""
    if isinstance(value, PagedKV):
        arrays = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return PagedKV(**{n: _specs(n, a, geometry, split) for n, a in arrays.items()})
    return jax.tree.map(
        lambda array: PartitionSpec(*_spec(name, array.ndim, geometry, split)), value
    )


def _head_axis(geometry: Any) -> int:
    """Which axis of query is heads."""
    return 1 if getattr(geometry, "layout", "TND") == "TND" else 2


def _spec(name: str, rank: int, geometry: Any, split: Mapping[str, str | None]) -> list[str | None]:
    """The mesh axis, or none, of each of an array's axes; `split` has that of either split."""
    rows = _head_axis(geometry)
    of_heads = {
        "query": rows, "gates": rows, "topk_indices": rows, "key": 2, "value": 2, "input": 2,
        "weight": 1, "bias": 0, "cache": 1 if getattr(geometry, "cache", None) == "rows" else 2,
    }  # fmt: skip
    axes: list[str | None] = [None] * rank
    if name in OF_SEQUENCES:
        axes[0] = split["b"]
    if name in of_heads:
        axes[of_heads[name]] = split["h"]
    return axes


def check_context(tester: Any, known: Operator, geometry: Any, random: Random) -> None:
    """The same with the pages of each sequence split over devices, whose pools are their own."""
    arguments = known.build(geometry)
    if hasattr(geometry, "block"):
        step = geometry.block if "topk_indices" in arguments else 1
    else:
        step = geometry.window[2] // geometry.window[1]
    devices = len(jax.devices())
    parts = _split(arguments, devices, step, random)
    pages, whole = PartitionSpec("x"), PartitionSpec()
    specs = {"key": pages, "value": pages, "block_table": PartitionSpec(None, "x")}
    arrays = {n: parts.get(n, arguments[n]) for n in _arrays(arguments)}

    def part(arrays: dict[str, Any]) -> tuple[Any, ...]:
        return tester.apply({**arguments, **arrays, "context_axis": "x"})

    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(
        part, mesh=mesh, in_specs=({n: specs.get(n, whole) for n in arrays},), out_specs=whole
    )
    tester.assert_agrees(jax.jit(run)(arrays), arguments)


def check_context_of_step(tester: Any, known: Operator, step: Step, random: Random) -> None:
    """A step whose caches are split as in `check_context`."""
    arguments = known.build(step)
    devices = len(jax.devices())
    block = step.original.block
    multiples = {"compressed": block // step.stride, "selected": block, "window": 1}
    of_cache = PagedKV(
        PartitionSpec("x"), PartitionSpec("x"), PartitionSpec(None, "x"), PartitionSpec()
    )
    arrays, specs = {}, {}
    for name in _arrays(arguments):
        arrays[name], specs[name] = arguments[name], PartitionSpec()
        if name in multiples:
            cache = arguments[name]
            whole = {n: getattr(cache, n) for n in ("key", "value", "block_table")}
            whole["page_block_size"] = cache.key.shape[1]
            parts = _split(whole, devices, multiples[name], random)
            arrays[name], specs[name] = dataclasses.replace(cache, **parts), of_cache

    def part(arrays: dict[str, Any]) -> tuple[Any, ...]:
        return tester.apply({**arguments, **arrays, "context_axis": "x"})

    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(part, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec())
    tester.assert_agrees(jax.jit(run)(arrays), arguments)


def _other(geometry: Any, number: int) -> Any:
    """A call of the same geometry with other contents; the same for 0."""
    if isinstance(geometry, Step):
        return dataclasses.replace(geometry, original=_other(geometry.original, number))
    return dataclasses.replace(geometry, seed=geometry.seed + number)


def _split(
    arguments: dict[str, Any], devices: int, step: int, random: Random
) -> dict[str, np.ndarray]:
    """The pools and the block table of each device, side by side.

    Args:
        arguments: those of the whole call.
        devices: how many.
        step: of how many positions each device must have a multiple.
        random: decides the order of each device's pages.
    """
    table, page = arguments["block_table"], arguments["page_block_size"]
    columns = -(-table.shape[1] // devices)
    while columns * page % step:
        columns += 1
    # What is behind a sequence's pages is not looked at.
    padded = np.full((len(table), columns * devices), -5, np.int32)
    padded[:, : table.shape[1]] = table
    owned = [padded[:, r * columns : (r + 1) * columns] for r in range(devices)]
    pools = len(arguments["key"])
    used = [random.permutation(np.unique(own[(own >= 0) & (own < pools)])) for own in owned]
    most = max(map(len, used)) + 1
    parts: dict[str, Any] = {"key": [], "value": [], "block_table": []}
    for own, names in zip(owned, used, strict=True):
        number = {int(name): at for at, name in enumerate(names)}
        parts["block_table"].append([[number.get(int(id), most) for id in row] for row in own])
        for name in ("key", "value"):
            pool = np.full((most, *arguments[name].shape[1:]), np.nan, arguments[name].dtype)
            pool[: len(names)] = arguments[name][names]
            parts[name].append(pool)
    return {
        "key": np.concatenate(parts["key"]), "value": np.concatenate(parts["value"]),
        "block_table": np.concatenate(parts["block_table"], axis=1, dtype=np.int32),
    }  # fmt: skip


def _arrays(arguments: dict[str, Any]) -> list[str]:
    """Names of the arguments that are arrays, or pairs of them."""
    return [
        n for n, a in arguments.items()
        if n != "atten_mask" and all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(a))
    ]  # fmt: skip


BY = {
    "compress_attention": (check_vmap, check_mesh, check_context),
    "select_attention": (check_vmap, check_mesh, check_context),
    "compress": (check_vmap, check_mesh),
    "step": (check_vmap, check_mesh, check_context_of_step),
}
