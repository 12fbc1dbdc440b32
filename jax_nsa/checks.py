"""Checks of types and ranges that front doors share: an error names the value and what is legal.

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

SHOWN = 120  # characters of a value in a message
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = SHOWN
FLOATS = ("bfloat16", "float16", "float32")
INT32_MAX = 2**31 - 1
FLOAT32_MAX = 3.4028234663852886e38
SCALE_MAX = 2.0**127  # kernels compute powers of 2: times log2(e), it must be finite, too


def shown(value: Any) -> str:
    """A value for a message, shortened."""
    return _SHORT.repr(value)


def integer(name: str, value: Any) -> int:
    """Returns `value` as an int; refuses bools, floats and what is not known yet."""
    try:
        if isinstance(value, bool) or type(value).__name__ == "bool":
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be a Python integer, got {shown(value)} of type {type(value).__name__}"
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
        raise TypeError(f"{name} must be a bool, got {shown(value)}")
    return bool(value)


def choice(name: str, value: Any, legal: Sequence[str]) -> str:
    """Returns `value` if it is one of the `legal` words."""
    if not isinstance(value, str) or value not in legal:
        raise ValueError(f"{name} must be one of {tuple(legal)}, got {shown(value)}")
    return value


def scale(value: Any) -> float:
    """Returns `scale_value` as a float that kernels can compute with; refuses NaN, infinities."""
    if hasattr(value, "dtype"):  # a NumPy or JAX scalar
        kinds = ("float", "bfloat", "int", "uint")
        real = value.shape == () and value.dtype.name.startswith(kinds)
    else:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real:
        raise TypeError(
            f"scale_value must be a real number, got {shown(value)} of type {type(value).__name__}"
        )
    try:
        checked = float(value)
    except OverflowError:
        checked = math.inf
    except TypeError as error:
        raise TypeError(
            f"scale_value must be known when the call is traced, got {shown(value)}: {error}"
        ) from None
    if not abs(checked) <= FLOAT32_MAX:
        raise ValueError(f"scale_value must be finite in float32, got {checked}")
    if abs(checked) > SCALE_MAX:
        raise ValueError(f"scale_value must be at most 2**127 in size, got {checked}")
    return checked


def axis_size(context_axis: Hashable) -> int:
    """Devices along `context_axis`, which must be a manual mesh axis here."""
    try:
        hash(context_axis)  # as a primitive's parameters must be
        return jax.lax.axis_size(context_axis)
    except (NameError, TypeError, ValueError):
        raise ValueError(
            "context_axis must be a mesh axis of the enclosing jax.shard_map, got "
            f"{shown(context_axis)}"
        ) from None


def described(value: Any) -> str:
    """What a value is, for a message about what it should be: "tuple of 3"."""
    length = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return f"{type(value).__name__}{length}"


def floats(
    name: str, value: Any, *, like: tuple[str, Any] | None = None, or_float32: bool = False
) -> ArrayLike:
    """Returns an array of one of the dtypes that operators compute with.

    Args:
        name: the argument's name.
        value: a JAX or NumPy array, or an object that holds one and says so by `__jax_array__`,
            as variables of neural network libraries do.
        like: the name of an argument whose dtype this one must have, and that argument.
        or_float32: whether it may be float32 instead, as what is small may.
    """
    array = _held_array(value)
    if not isinstance(array, (jax.Array, np.ndarray)) or isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a JAX or NumPy array, got {type(array).__name__}")
    if array.dtype.name not in FLOATS or not array.dtype.isnative:
        raise TypeError(f"{name} must have dtype {', '.join(FLOATS)}, got {array.dtype}")
    is_float32 = or_float32 and array.dtype == jnp.float32
    if like is not None and array.dtype != like[1].dtype and not is_float32:
        if or_float32:
            own = "" if like[1].dtype == jnp.float32 else f"{like[1].dtype.name} or "
            raise TypeError(
                f"{name} must have {like[0]}'s dtype {own}float32, got {array.dtype.name}"
            )
        raise TypeError(
            f"{like[0]} and {name} must have the same dtype, got {like[1].dtype.name} and "
            f"{array.dtype.name}"
        )
    _check_memory(name, array)
    return array


def bools(name: str, values: Any) -> jax.Array:
    """Returns bools, of an array or a list, as a JAX array."""
    held = _held_array(values)
    try:
        array = None if isinstance(held, np.ma.MaskedArray) else jnp.asarray(held)
    except (TypeError, ValueError, OverflowError):  # rows of several lengths, say
        array = None
    if array is None or array.dtype != bool:
        raise TypeError(f"{name} must hold bools, got {shown(values)}")
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
        """Holds known values to `[0, most]`, None for any; `says` explains the limit.

        Held to a limit, they are int64 in `host` from then on: rules subtract from them, which
        narrow and unsigned dtypes do not survive. A symbolic limit is for the running program.
        """
        if self.host is None:
            return
        bad = self.host < 0
        if isinstance(most, int):
            bad |= self.host > most
        if bad.any():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            legal = "at least 0" if most is None else f"in [0, {most}]{says}"
            raise ValueError(
                f"{self.name}[{', '.join(map(str, at))}] must be {legal}, got {int(self.host[at])}"
            )
        if most is not None:
            self.host = self.host.astype(np.int64)


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
        if array.dtype.kind == "V" and jnp.issubdtype(array.dtype, jnp.integer):
            return array.astype(np.int32)  # such as int4, of which NumPy knows no limits
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    except jax.errors.JAXTypeError as error:
        raise TypeError(
            f"{name} must be an array or nested lists of integers of rank {rank}; lists "
            f"cannot hold traced values (stack them with jnp.stack): {error}"
        ) from None
    except ValueError:
        raise TypeError(
            f"{name} must be an array or nested lists of integers of rank {rank}, all rows "
            f"of one length, got {shown(values)}"
        ) from None


@jax.jit
def _to_int32(values: jax.Array) -> jax.Array:
    own, limits = jnp.iinfo(values.dtype), jnp.iinfo(jnp.int32)
    values = jnp.clip(values, max(own.min, limits.min), min(own.max, limits.max))
    return values.astype(jnp.int32)


def _shown(host: np.ndarray | None) -> str:
    """Known values for a message, shortened."""
    if host is None:
        return ""
    text = reprlib.repr(host.tolist())
    return f": {text}" if len(text) <= SHOWN else f": {text[:SHOWN]}..."
