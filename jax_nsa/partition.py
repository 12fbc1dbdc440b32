"""How one call splits over devices: by sequences and by groups of heads, without a collective.

Every (sequence, key/value head) is a computation of its own. So XLA may split the sequences over
some mesh axes and the key/value heads, each with the query heads of its group, over others. All
else stays whole on each device: the pool of pages, the rows of a page, head sizes, blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from jax_nsa.problem import Problem

Bind: TypeAlias = Callable[..., Sequence[jax.Array]]

# One letter for each axis: (b)sequences, (t)okens, (h) key/value heads, (g)roup, (d) head size,
# (p)ages, (r)ows of a page, (e) value size, (c)olumns of the block table, (k) selected, (j) blocks.
# The rows of ragged tokens, (t) there, follow from all sequences together and do not split.
_PAGES = ("p r (h d)", "p r (h e)")
_DENSE = ("b t (h g) d", *_PAGES, "b c", "b")
_RAGGED = ("t (h g) d", *_PAGES, "b c", "b")
_RESULT_TAILS = ("(h g) e", "h k", "(h g)", "(h g) j")


def axes(query_rank: int, num_operands: int, num_results: int) -> tuple[list[str], list[str]]:
    """The axes of the primitive's operands and results, as letters."""
    dense = query_rank == 4
    operands = [*(_DENSE if dense else _RAGGED), *["b"] * (num_operands - 5)]
    leading = "b t" if dense else "t"
    return operands, [f"{leading} {tail}" for tail in _RESULT_TAILS[:num_results]]


def specs(letters: Sequence[str], sequence_axes: Any, head_axes: Any) -> list[PartitionSpec]:
    """Partition specs that split the sequences and the key/value heads over these mesh axes."""
    split = {"b": sequence_axes, "h": head_axes}

    def spec(array: str) -> PartitionSpec:
        dims = array.replace("(h ", "h").replace(")", "").split()
        return PartitionSpec(*(split.get(dim[0]) for dim in dims))

    return [spec(array) for array in letters]


def result_shardings(operands: Sequence[Any], num_results: int) -> list[Any]:
    """Shardings of the results on a mesh with explicit axes; refuses what would need a collective.

    Args:
        operands: abstract values of the primitive's operands.
        num_results: how many results it has.

    Raises:
        ValueError: an operand is sharded along an axis that must stay whole, or not as query is.
    """
    query = operands[0]
    if query.sharding.mesh.empty:
        return [query.sharding] * num_results
    operand_axes, result_axes = axes(query.ndim, len(operands), num_results)
    sequence_axes = query.sharding.spec[0] if query.ndim == 4 else None
    head_axes = query.sharding.spec[-2]
    expected = specs(operand_axes, sequence_axes, head_axes)
    names = (
        "query", "key", "value", "block_table", "actual_cmp_seq_kvlen", *["actual_seq_qlen"] * 3,
    )  # fmt: skip
    for name, operand, spec in zip(names, operands, expected, strict=False):
        _check_sharding(name, operand, spec, query)
    return [query.sharding.update(spec=s) for s in specs(result_axes, sequence_axes, head_axes)]


def cut_as_sequences(name: str, integers: jax.Array, query: jax.Array) -> jax.Array:
    """One integer for each sequence, sharded as query's sequences on a mesh with explicit axes.

    Args:
        name: the user's name of `integers`.
        integers: `[sequences]`, sharded as query's sequences or whole.
        query: the primitive's first operand; ragged rows need all sequences' integers whole.

    Raises:
        ValueError: they are sharded otherwise.
    """
    aval = jax.typeof(query)
    spec = PartitionSpec(aval.sharding.spec[0] if query.ndim == 4 else None)
    if aval.sharding.mesh.empty or jax.typeof(integers).sharding.spec == spec:
        return integers
    _check_sharding(name, jax.typeof(integers), spec, aval)
    return jax.sharding.reshard(integers, NamedSharding(aval.sharding.mesh, spec))


def _check_sharding(name: str, operand: Any, spec: PartitionSpec, query: Any) -> None:
    """Refuses an operand that is neither whole, and so cut without a collective, nor as `spec`."""
    actual = operand.sharding.spec
    if any(actual) and actual != spec:
        raise ValueError(
            f"{name} is sharded as {actual} and must be as {spec} to go with "
            f"query's {query.sharding.spec}: sequences and key/value heads split, all else "
            "stays whole; use jax.sharding.reshard"
        )


def partitioned(bind: Bind, operands: Sequence[Any], problem: Problem) -> Bind:
    """Wraps `bind(*operands, problem=...)` in a call that XLA's partitioner may split.

    Args:
        bind: binds the primitive on each device's part, with that part's problem.
        operands: the abstract values of the whole operands.
        problem: the whole problem.
    """
    heads, head_size = operands[0].shape[-2:]
    dense = operands[0].ndim == 4
    num_results = 2 + problem.return_lse + problem.return_block_scores
    operand_axes, result_axes = axes(operands[0].ndim, len(operands), num_results)
    sizes = {
        "h": problem.key_value_heads,
        "g": heads // problem.key_value_heads,
        "d": head_size,
        "e": operands[2].shape[2] // problem.key_value_heads,
    }
    rule = f"{', '.join(operand_axes)} -> {', '.join(result_axes)}"
    # An axis that stands alone somewhere tells its size itself.
    alone = {dim for array in (*operand_axes, *result_axes) for dim in _alone(array)}
    # Shardy wants them in the order in which the rule names them.
    whole = tuple(
        dict.fromkeys(c for c in rule if c.isalpha() and c not in ("bh" if dense else "h"))
    )

    def partition(mesh: Any, arg_infos: Any, result_infos: Any) -> Any:
        del arg_infos
        spec = result_infos[0].sharding.spec
        sequence_axes = spec[0] if dense else None
        head_axes = spec[-2]
        shards = _shards(mesh, head_axes)
        if problem.key_value_heads % shards:
            head_axes, shards = None, 1
        if dense and operands[0].shape[0] % _shards(mesh, sequence_axes):
            sequence_axes = None
        part = dataclasses.replace(problem, key_value_heads=problem.key_value_heads // shards)

        def shardings(arrays: Sequence[str]) -> tuple[NamedSharding, ...]:
            return tuple(NamedSharding(mesh, s) for s in specs(arrays, sequence_axes, head_axes))

        def each(*parts: jax.Array) -> tuple[jax.Array, ...]:
            # A device's part is whole to it, whatever mesh the surrounding program is under.
            with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
                return tuple(bind(*parts, problem=part))

        return (
            mesh,
            each,
            shardings(result_axes),
            shardings(operand_axes),
        )

    call = custom_partitioning(
        lambda *whole_operands: tuple(bind(*whole_operands, problem=problem))
    )
    call.def_partition(
        partition,
        sharding_rule=rule,
        need_replication_factors=whole,
        **{letter: size for letter, size in sizes.items() if letter not in alone},
    )
    return call


def _alone(array: str) -> list[str]:
    """The letters that stand outside parentheses."""
    outside, depth = [], 0
    for c in array:
        depth += (c == "(") - (c == ")")
        if c.isalpha() and depth == 0:
            outside.append(c)
    return outside


def _shards(mesh: Any, mesh_axes: Any) -> int:
    names = (mesh_axes,) if isinstance(mesh_axes, str) else (mesh_axes or ())
    return math.prod(mesh.shape[name] for name in names)
