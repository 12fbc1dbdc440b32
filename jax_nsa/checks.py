"""Checks of arguments that front doors share: an error names the value and what is legal.

Values that the host knows are checked before anything runs, all at once in NumPy, and copied, so
that what was checked is what is used. Values in JAX arrays are never waited for.
"""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from collections.abc import Hashable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

ArrayLike: TypeAlias = jax.Array | np.ndarray
IntegersLike: TypeAlias = jax.Array | np.ndarray | Sequence[int]

FLOATS = ("bfloat16", "float16", "float32")
INT32_MAX = 2**31 - 1
FLOAT32_MAX = 3.4028234663852886e38
PAGE_GRANULE = 16
PAGE_MAX = 256
GROUP_MAX = 128
HEAD_SIZE_MAX = 192
VALUE_SIZE_MAX = 128


def integer(name: str, value: Any) -> int:
    """Returns `value` as an int; refuses bools, floats and what is not known yet."""
    try:
        if isinstance(value, bool) or type(value).__name__ == "bool":
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be a Python integer, got {value!r} of type {type(value).__name__}"
        ) from None


def count(name: str, value: Any, *, least: int = 1) -> int:
    """Returns `value` as an int of at least `least` that int32 can hold."""
    checked = integer(name, value)
    if not least <= checked <= INT32_MAX:
        raise ValueError(f"{name} must be in [{least}, {INT32_MAX}], got {checked}")
    return checked


def flag(name: str, value: Any) -> bool:
    """Returns `value` as a bool; refuses all else."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return bool(value)


def choice(name: str, value: Any, legal: Sequence[str]) -> str:
    """Returns `value` if it is one of the `legal` words."""
    if not isinstance(value, str) or value not in legal:
        raise ValueError(f"{name} must be one of {tuple(legal)}, got {value!r}")
    return value


def scale(value: Any) -> float:
    """Returns `scale_value` as a float that float32 can hold; refuses NaN and infinities."""
    if hasattr(value, "dtype"):  # a NumPy or JAX scalar
        kinds = ("float", "bfloat", "int", "uint")
        real = value.shape == () and value.dtype.name.startswith(kinds)
    else:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real:
        raise TypeError(
            f"scale_value must be a real number, got {value!r} of type {type(value).__name__}"
        )
    try:
        checked = float(value)
    except OverflowError:
        checked = math.inf
    except TypeError as error:
        raise TypeError(
            f"scale_value must be known when the call is traced, got {value!r}: {error}"
        ) from None
    if not abs(checked) <= FLOAT32_MAX:
        raise ValueError(f"scale_value must be finite in float32, got {checked}")
    return checked


def axis_size(context_axis: Hashable) -> int:
    """Devices along `context_axis`, which must be a manual mesh axis here."""
    try:
        hash(context_axis)  # as a primitive's parameters must be
        return jax.lax.axis_size(context_axis)
    except (NameError, TypeError, ValueError):
        raise ValueError(
            f"context_axis must be a mesh axis of the enclosing jax.shard_map, got {context_axis!r}"
        ) from None


def floats(name: str, value: Any, *, like: tuple[str, Any] | None = None) -> ArrayLike:
    """Returns an array of one of the dtypes that operators compute with.

    Args:
        name: the argument's name.
        value: a JAX or NumPy array, or an object that holds one and says so by `__jax_array__`,
            as variables of neural network libraries do.
        like: the name of an argument whose dtype this one must have, and that argument.
    """
    array = _held_array(value)
    if not isinstance(array, (jax.Array, np.ndarray)) or isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a JAX or NumPy array, got {type(array).__name__}")
    if array.dtype.name not in FLOATS or not array.dtype.isnative:
        raise TypeError(f"{name} must have dtype {', '.join(FLOATS)}, got {array.dtype}")
    if like is not None and array.dtype != like[1].dtype:
        raise TypeError(
            f"{name} must have {like[0]}'s dtype {like[1].dtype.name}, got {array.dtype.name}"
        )
    _check_memory(name, array)
    return array


class Integers:
    """An integer argument that is known now (`host`, a copy) or only when the program runs.

    Attributes:
        name: the argument's name.
        shape: its shape.
        host: its values where the host knows them, else None.
    """

    def __init__(self, name: str, values: Any, *, rank: int | tuple[int, ...]) -> None:
        """Checks that `values` are integers of this rank, or of one of these."""
        ranks = (rank,) if isinstance(rank, int) else tuple(sorted(set(rank)))
        told = " or ".join(map(str, ranks))
        if values is None:
            raise ValueError(f"{name} is required, got None")
        values = _held_array(values)
        self.name = name
        self.host: np.ndarray | None = None
        if isinstance(values, jax.Array):
            _check_memory(name, values)
            array: Any = values
        else:
            self.host = array = _host_array(name, values, told)
        empty = self.host is not None and array.size == 0  # an empty list's dtype is no choice
        integral = jnp.issubdtype(array.dtype, jnp.integer) and array.dtype.kind != "m"  # timedelta
        if not empty and not integral:
            raise TypeError(
                f"{name} must hold integers, got dtype {array.dtype.name}{_shown(self.host)}"
            )
        if len(array.shape) not in ranks:
            raise ValueError(
                f"{name} must have rank {told}, got shape {tuple(array.shape)}{_shown(self.host)}"
            )
        if empty and not integral:
            self.host = array = array.astype(np.int32)
        self.shape: tuple[Any, ...] = tuple(array.shape)
        self._values = array

    def array(self) -> jax.Array:
        """The values as int32; those beyond it stay beyond every legal range."""
        values, limits = self._values, jnp.iinfo(jnp.int32)
        if self.host is not None and values.dtype == np.int32:
            return jnp.asarray(values)  # a copy already
        if self.host is not None:
            own = np.iinfo(values.dtype)
            values = np.clip(values, max(own.min, limits.min), min(own.max, limits.max))
            return jnp.asarray(values.astype(np.int32))
        return values if values.dtype == jnp.int32 else _to_int32(values)

    def check_range(self, most: Any, says: str = "") -> None:
        """Holds known values to `[0, most]`, None for any; `says` explains the limit."""
        if self.host is None:
            return
        bad = self.host < 0 if most is None else (self.host < 0) | (self.host > most)
        if bad.any():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            legal = "at least 0" if most is None else f"in [0, {most}]{says}"
            raise ValueError(
                f"{self.name}[{', '.join(map(str, at))}] must be {legal}, got {int(self.host[at])}"
            )


def per_sequence(name: str, values: Any, sequences: Any) -> Integers:
    """Integers, one for each of the block table's rows."""
    integers = Integers(name, values, rank=1)
    if integers.shape != (sequences,):
        raise ValueError(
            f"{name} must have an entry for each of the {sequences} rows of block_table, "
            f"got shape {integers.shape}"
        )
    return integers


def counts_of_tokens(
    counts: Any, query_shape: tuple[Any, ...], table: Integers, *, packed: bool
) -> dict[str, Integers]:
    """`actual_seq_qlen` by its name where it is given, held to query's token axis.

    Args:
        counts: the argument.
        query_shape: `[T, N, D]` where rows are packed, or `[B, S, N, D]`.
        table: the block table, which has a row for each sequence.
        packed: whether rows are packed.
    """
    sequences = table.shape[0]
    tokens = query_shape[0 if packed else 1]
    if counts is None:
        if packed and tokens != sequences:
            raise ValueError(
                "query must have one row for each row of block_table unless actual_seq_qlen is "
                f"given, got shapes {query_shape} and {table.shape}"
            )
        return {}
    integers = per_sequence("actual_seq_qlen", counts, sequences)
    integers.check_range(None if packed else tokens)
    if packed and integers.host is not None and sum(integers.host.tolist()) != tokens:
        raise ValueError(
            f"actual_seq_qlen must sum to query's tokens ({tokens}), "
            f"got a sum of {sum(integers.host.tolist())}"
        )
    return {"actual_seq_qlen": integers}


def sequences(table: Integers, query_shape: tuple[Any, ...], *, packed: bool) -> Any:
    """How many sequences a call has: the rows of its block table."""
    if not packed and query_shape[0] != table.shape[0]:
        raise ValueError(
            "block_table must have a row for each sequence of query, "
            f"got shapes {table.shape} and {query_shape}"
        )
    if table.shape[1:] == (0,) and table.shape[0] != 0:
        raise ValueError(f"block_table must not be empty, got shape {table.shape}")
    return table.shape[0]


def page_ids(
    table: Integers, lengths: np.ndarray, *, page: int, pages: int, first: np.ndarray | None = None
) -> None:
    """Holds the entries of a known block table that sequences need to the pages of the pools.

    Args:
        table: the block table.
        lengths: rows of each sequence.
        page: rows in a page.
        pages: pages in the pools.
        first: the first row of each sequence that is needed; None: all are.
    """
    if table.host is None:
        return
    # As unsigned integers, negative ones are beyond all pages too.
    bad = table.host.view(f"u{table.host.itemsize}") >= pages
    column = np.arange(table.host.shape[1], dtype=np.int32)
    if bad.any():
        bad &= column < -(-lengths[:, None] // page)
    if first is not None and bad.any():
        bad &= column >= first[:, None] // page
    if bad.any():
        b, p = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{table.name}[{b}, {p}] must be in [0, {pages}), the pages of key and value, "
            f"got {int(table.host[b, p])}"
        )


def page_size(value: Any) -> int:
    """Returns `page_block_size`, a multiple of 16 up to 256."""
    size = integer("page_block_size", value)
    if size % PAGE_GRANULE or not 0 < size <= PAGE_MAX:
        raise ValueError(
            f"page_block_size must be a multiple of {PAGE_GRANULE} up to {PAGE_MAX}, got {size}"
        )
    return size


def pool(name: str, array: ArrayLike, *, heads: int, page: int, size: int | None) -> ArrayLike:
    """Returns a pool of pages as `[pages, page, heads * size]`, without a copy.

    Args:
        name: the argument's name.
        array: `[pages, page, heads * size]` or `[pages, page, heads, size]`.
        heads: key/value heads.
        page: `page_block_size` as the caller states it.
        size: the size of a head; None: whatever the pool has.
    """
    shape, stated = tuple(array.shape), "head_size" if size is None else str(size)
    if len(shape) not in (3, 4):
        raise ValueError(
            f"{name} must have shape [pages, page_block_size, {heads} * {stated}] or [pages, "
            f"page_block_size, {heads}, {stated}], got {shape}"
        )
    if any(isinstance(n, int) and n == 0 for n in shape):
        raise ValueError(f"{name} must not be empty, got shape {shape}")
    if shape[1] != page:
        raise ValueError(
            f"{name}'s second axis must be page_block_size ({page}), got shape {shape}"
        )
    if len(shape) == 4:
        if shape[2] != heads:
            raise ValueError(
                f"{name}'s third axis must be its {heads} heads (key_value_head_num), "
                f"got shape {shape}"
            )
        array = _merge_heads(array)
    if size is None and array.shape[2] % heads:
        raise ValueError(
            f"{name}'s last axis must be a multiple of key_value_head_num ({heads}), "
            f"got {array.shape[2]} in shape {shape}"
        )
    if size is not None and array.shape[2] != heads * size:
        raise ValueError(
            f"{name}'s last axis must be key_value_head_num * head_size = {heads} * {size} = "
            f"{heads * size}, got {array.shape[2]} in shape {shape}"
        )
    return array


def query_shape(query: ArrayLike, *, axes: str) -> None:
    """Holds query to its axes; only its rows may be none."""
    shape = tuple(query.shape)
    if len(shape) != axes.count(",") + 1:
        raise ValueError(f"query must have shape {axes}, got {shape}")
    if any(isinstance(n, int) and n == 0 for n in shape[-2:]):
        raise ValueError(f"query must not be empty, got shape {shape}")


def heads(query_shape: tuple[Any, ...], *, stated: int, key_value_heads: int) -> None:
    """Holds query's heads and head size to the rules of attention over groups of heads."""
    size = query_shape[-1]
    have = query_shape[-2]
    if have != stated:
        raise ValueError(
            f"head_num must equal the heads of query, {have} in shape {query_shape}, got {stated}"
        )
    if have % key_value_heads:
        raise ValueError(
            f"head_num must be a multiple of key_value_head_num ({key_value_heads}), got {have}"
        )
    group = have // key_value_heads
    if GROUP_MAX % group:
        raise ValueError(
            f"head_num / key_value_head_num must divide {GROUP_MAX}, "
            f"got {have} / {key_value_heads} = {group}"
        )
    if size > HEAD_SIZE_MAX:
        raise ValueError(f"query's head size must be at most {HEAD_SIZE_MAX}, got {size}")


def pools(
    key: ArrayLike, value: ArrayLike, *, key_value_heads: int, page: int, head_size: int
) -> tuple[ArrayLike, ArrayLike]:
    """Returns the pools of key and value as `[pages, page, Nkv * size]`, checked."""
    key = pool("key", key, heads=key_value_heads, page=page, size=head_size)
    value = pool("value", value, heads=key_value_heads, page=page, size=None)
    value_size = value.shape[2] // key_value_heads
    if value_size > min(VALUE_SIZE_MAX, head_size):
        raise ValueError(
            f"value's head size must be at most {VALUE_SIZE_MAX} and at most query's "
            f"({head_size}), got {value_size}"
        )
    if key.shape[0] != value.shape[0]:
        raise ValueError(
            f"key and value must have as many pages, got {key.shape[0]} and {value.shape[0]}"
        )
    return key, value


def _held_array(value: Any) -> Any:
    """The array that an object holds and offers to JAX, or the object itself."""
    if not isinstance(value, (jax.Array, np.ndarray)) and hasattr(value, "__jax_array__"):
        return value.__jax_array__()
    return value


def _check_memory(name: str, array: Any) -> None:
    """Refuses an array in host memory that its devices' programs do not compute with."""
    space = getattr(jax.typeof(array), "memory_space", None)
    concrete = isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)
    if concrete and array.sharding.memory_kind == "unpinned_host":
        # Its type does not tell; on a CPU it is as good as any.
        on_host = any(device.platform != "cpu" for device in array.sharding.device_set)
        space = jax.memory.Space.Host if on_host else space
    if space == jax.memory.Space.Host:
        raise ValueError(
            f"{name} must be in device memory, got an array in memory space {space}; move it with "
            "jax.device_put(array, jax.memory.Space.Device)"
        )


def _host_array(name: str, values: Any, rank: str) -> np.ndarray:
    """A copy of integers in host memory, which their owner may change at will."""
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(f"{name} must not be a masked array")
    try:
        array = np.array(values)
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    except jax.errors.JAXTypeError as error:
        raise TypeError(
            f"{name} must be an array or nested lists of integers of rank {rank}; lists "
            f"cannot hold traced values (stack them with jnp.stack): {error}"
        ) from None
    except ValueError:
        raise TypeError(
            f"{name} must be an array or nested lists of integers of rank {rank}, all rows "
            f"of one length, got {reprlib.repr(values)}"
        ) from None


@jax.jit
def _to_int32(values: jax.Array) -> jax.Array:
    own, limits = jnp.iinfo(values.dtype), jnp.iinfo(jnp.int32)
    values = jnp.clip(values, max(own.min, limits.min), min(own.max, limits.max))
    return values.astype(jnp.int32)


def _shown(host: np.ndarray | None) -> str:
    """Known values for a message, shortened."""
    return "" if host is None else f": {reprlib.repr(host.tolist())}"


def _merge_heads(array: ArrayLike) -> ArrayLike:
    return array.reshape(*array.shape[:2], array.shape[2] * array.shape[3])
