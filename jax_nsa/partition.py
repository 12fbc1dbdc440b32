"""How one call splits over devices: by sequences and by groups of heads, without a collective.

Every (sequence, key/value head) is a computation of its own. So XLA may split the sequences over
some mesh axes and the key/value heads, each with the query heads of its group, over others. All
else stays whole on each device: the pool of pages, the rows of a page, head sizes, blocks. Packed
rows follow from all sequences together; there only heads split.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from jax_nsa.axes import Axes
    from jax_nsa.backends import Backend, Call

Dimensions: TypeAlias = Sequence[tuple[str, ...]]


def specs(arrays: Sequence[Dimensions], split: Mapping[str, Any]) -> list[PartitionSpec]:
    """Partition specs that split axes over mesh axes, each where it leads its dimension."""
    return [PartitionSpec(*(split.get(letters[0]) for letters in array)) for array in arrays]


def result_shardings(
    arguments: Sequence[str], operands: Sequence[Any], axes: Axes, splits: str
) -> list[Any]:
    """Shardings of the results on a mesh with explicit axes; refuses what would need a collective.

    Args:
        arguments: what the caller knows the operands as.
        operands: their abstract values.
        axes: the call's axes.
        splits: the axes that may split.

    Raises:
        ValueError: an operand is sharded along an axis that must stay whole, or not as the first.
    """
    first = operands[0]
    if first.sharding.mesh.empty:
        return [first.sharding] * len(axes.results)
    split = _splits_of(first.sharding.spec, axes.operands[0], _splittable(axes, splits))
    shards = _shards(first.sharding.mesh, split.get("h"))
    if axes.sizes["h"] % shards:
        raise ValueError(
            f"{arguments[0]} is sharded as {first.sharding.spec}, its heads over {shards} devices, "
            f"and there are {axes.sizes['h']} key/value heads to go with them: these must be a "
            "multiple of the devices, as a group of heads is not split; use jax.sharding.reshard"
        )
    for name, operand, spec in zip(arguments, operands, specs(axes.operands, split), strict=True):
        _check_sharding(name, operand, spec, (arguments[0], first))
    return [first.sharding.update(spec=spec) for spec in specs(axes.results, split)]


def _splittable(axes: Axes, splits: str) -> str:
    return splits.replace("b", "") if axes.packed else splits


def _splits_of(spec: Any, dimensions: Dimensions, splittable: str) -> dict[str, Any]:
    """Over which mesh axes an array with this spec splits each of the axes that may split."""
    return {
        letters[0]: mesh_axes
        for letters, mesh_axes in zip(dimensions, spec, strict=False)
        if letters[0] in splittable
    }


def by_device(
    function: Callable[..., Any], arrays: Sequence[Any], axes: Axes, splits: str, problem: Any
) -> Callable[..., Any]:
    """Makes `function(problem, *arrays)` one of the arrays, each device of their mesh doing a part.

    Args:
        function: computes a part from the part's problem and arrays.
        arrays: the operands, sharded as `result_shardings` allows.
        axes: the call's axes.
        splits: the axes that may split.
        problem: the whole problem.
    """
    sharding: Any = jax.typeof(arrays[0]).sharding
    if sharding.mesh.empty or sharding.mesh.are_all_axes_manual:
        return functools.partial(function, problem)
    split = _splits_of(sharding.spec, axes.operands[0], _splittable(axes, splits))
    shards = _shards(sharding.mesh, split.get("h"))
    part = problem.with_heads(axes.sizes["h"] // shards)
    in_specs = tuple(specs(axes.operands, split))
    mapped = jax.shard_map(
        functools.partial(function, part), mesh=sharding.mesh, in_specs=in_specs,
        out_specs=list(specs(axes.results, split)),
    )  # fmt: skip
    # Whole ones are cut: jax.shard_map wants each as its spec has it.
    shardings = [NamedSharding(sharding.mesh, spec) for spec in in_specs]
    return lambda *arrays: mapped(*map(jax.sharding.reshard, arrays, shardings))


def whole_in_front(array: jax.Array) -> jax.Array:
    """The array with its first axis whole on each device of a mesh with explicit axes."""
    sharding: Any = jax.typeof(array).sharding
    if sharding.mesh.empty or not any(sharding.spec[:1]):
        return array
    spec = PartitionSpec(None, *sharding.spec[1:])
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, spec))


def check_only_heads_split(name: str, array: Any) -> None:
    """Refuses rows or pools `[:, :, heads, ...]` that a mesh with explicit axes cuts otherwise."""
    sharding: Any = jax.typeof(array).sharding
    cut = [] if sharding.mesh.empty else _cut(sharding.mesh, sharding.spec)
    if any(cut[:2] + cut[3:]):
        raise ValueError(
            f"{name} is sharded as {sharding.spec}, and only its heads may split: all else must be "
            "whole on each device, as a pool takes the rows of all slots; use jax.sharding.reshard"
        )


def split_as(pool: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows `[n, S, heads, size]` whose heads are split as a pool's on a mesh with explicit axes."""
    sharding: Any = jax.typeof(pool).sharding
    if sharding.mesh.empty or _cut(sharding.mesh, jax.typeof(rows).sharding.spec[2:3]) != [()]:
        return rows
    spec = PartitionSpec(None, None, sharding.spec[2], None)
    return jax.sharding.reshard(rows, NamedSharding(sharding.mesh, spec))


def one_after_another(rows: jax.Array) -> jax.Array:
    """Rows `[n, S, ...]` as `[n * S, 1, ...]`, their heads sharded as they were."""
    sharding: Any = jax.typeof(rows).sharding
    shape = (rows.shape[0] * rows.shape[1], 1, *rows.shape[2:])
    if sharding.mesh.empty:
        return rows.reshape(shape)
    spec = PartitionSpec(None, None, *sharding.spec[2:])
    return jax.lax.reshape(rows, shape, out_sharding=NamedSharding(sharding.mesh, spec))


def cut_as_sequences(name: str, integers: jax.Array, query: jax.Array, packed: bool) -> jax.Array:
    """One integer for each sequence, sharded as query's sequences on a mesh with explicit axes.

    Args:
        name: the user's name of `integers`.
        integers: `[sequences]`, sharded as query's sequences or whole.
        query: the operator's query.
        packed: whether its rows are packed, which needs all sequences' integers whole.

    Raises:
        ValueError: they are sharded otherwise.
    """
    aval = jax.typeof(query)
    spec = PartitionSpec(None if packed else aval.sharding.spec[0])
    if aval.sharding.mesh.empty or jax.typeof(integers).sharding.spec == spec:
        return integers
    _check_sharding(name, jax.typeof(integers), spec, ("query", aval))
    return jax.sharding.reshard(integers, NamedSharding(aval.sharding.mesh, spec))


def _check_sharding(name: str, operand: Any, spec: PartitionSpec, like: tuple[str, Any]) -> None:
    """Refuses an operand that is neither whole, and so cut without a collective, nor as `spec`."""
    actual, mesh = operand.sharding.spec, operand.sharding.mesh
    cut = _cut(mesh, actual)
    if any(cut) and cut != _cut(mesh, spec):
        raise ValueError(
            f"{name} is sharded as {actual} and must be as {spec} to go with "
            f"{like[0]}'s {like[1].sharding.spec}: sequences and key/value heads split, all else "
            "stays whole; use jax.sharding.reshard"
        )


def _cut(mesh: Any, spec: PartitionSpec) -> list[tuple[str, ...]]:
    """Over which mesh axes each dimension is cut: one of size 1 cuts none, and reshapes lose it."""
    each = ((names,) if isinstance(names, str) else names or () for names in spec)
    return [tuple(name for name in names if mesh.shape[name] > 1) for names in each]


def partitioned(backend: Backend, call: Call, axes: Axes) -> Callable[..., Any]:
    """Makes a call, served by `backend`, a function that XLA's partitioner may split."""
    splittable = _splittable(axes, call.operator.splits)
    heads = axes.sizes["h"]

    def partition(mesh: Any, operands: Any, results: Any) -> Any:
        del operands
        first = results[0] if isinstance(results, (tuple, list)) else results
        split = _splits_of(first.sharding.spec, axes.results[0], splittable)
        split = {a: m for a, m in split.items() if axes.sizes[a] % _shards(mesh, m) == 0}
        # Maps lie inside a sequence: a part of whole sequences has them all.
        sequences = axes.sizes.get("b", 1) // _shards(mesh, split.get("b"))
        part = dataclasses.replace(
            call,
            constants=(),  # of all sequences
            maps=call.maps if sequences % math.prod(call.maps) == 0 else (),
            is_part=True,
            problem=call.problem.with_heads(heads // _shards(mesh, split.get("h"))),
        )

        def shardings(arrays: Sequence[Dimensions]) -> tuple[NamedSharding, ...]:
            return tuple(NamedSharding(mesh, spec) for spec in specs(arrays, split))

        def each(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            # A device's part is whole to it, whatever mesh the surrounding program is under.
            with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
                avals = tuple(jax.core.ShapedArray(a.shape, a.dtype) for a in arrays)
                mine = dataclasses.replace(part, operands=avals)
                return tuple(backend.compute(mine, *arrays))

        return mesh, each, shardings(axes.results), shardings(axes.operands)

    function = custom_partitioning(lambda *arrays: tuple(backend.compute(call, *arrays)))
    rule, sizes, whole = _sharding_rule(axes, splittable)
    function.def_partition(partition, sharding_rule=rule, need_replication_factors=whole, **sizes)
    return function


def _sharding_rule(axes: Axes, splittable: str) -> tuple[str, dict[str, int], tuple[str, ...]]:
    """Shardy's rule for a call: the axes, sizes that no array tells, and the axes that stay whole.

    Shardy takes no axis of size 1 beside another in one dimension; such an axis is left out.
    """

    def dimension(letters: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(a for a in letters if axes.sizes[a] != 1) or letters[:1]

    arrays = [tuple(map(dimension, array)) for array in (*axes.operands, *axes.results)]
    spelled = [
        " ".join(d[0] if len(d) == 1 else f"({' '.join(d)})" for d in array) for array in arrays
    ]
    operands = len(axes.operands)
    rule = f"{', '.join(spelled[:operands])} -> {', '.join(spelled[operands:])}"
    # In the order in which the rule names them; an axis that stands alone tells its size itself.
    letters = list(dict.fromkeys(a for array in arrays for d in array for a in d))
    alone = {d[0] for array in arrays for d in array if len(d) == 1}
    sizes = {a: axes.sizes[a] for a in letters if a not in alone}
    return rule, sizes, tuple(a for a in letters if a not in splittable)


def _shards(mesh: Any, mesh_axes: Any) -> int:
    names = (mesh_axes,) if isinstance(mesh_axes, str) else (mesh_axes or ())
    return math.prod(mesh.shape[name] for name in names)
