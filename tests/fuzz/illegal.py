"""Illegal calls: a legal one with one argument spoilt, which an error has to name.

What the host can see is refused before anything runs; for what only the running program knows, see
`faulty`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from interleaved.pools import RANKS

from fuzz import faulty
from fuzz.draw import Random, pick
from fuzz.legal import INTERLEAVE, OPERATORS, with_one_pool
from jax_nsa import PagedKV

Arguments = dict[str, Any]


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def _instead(value: Any, first: Any) -> Any:
    """The value, or a pair with its first one, replaced."""
    return (first, *value[1:]) if isinstance(value, tuple) else first


def spoil_dtype(arguments: Arguments, random: Random) -> str:
    """Floats of a dtype that no operator has, or that differs from the others'."""
    names = [n for n, v in arguments.items() if _is_float(v) and n not in ("weight", "bias")]
    name = pick(random, *names)
    array = _first(arguments[name])
    wrong = pick(random, np.float64, np.int32, np.complex64, bool)
    with np.errstate(all="ignore"):
        arguments[name] = _instead(arguments[name], np.zeros(array.shape, wrong))
    return name


def spoil_rank(arguments: Arguments, random: Random) -> str:
    """An array with an axis too many, or too few."""
    names = [n for n, v in arguments.items() if isinstance(_first(v), np.ndarray)]
    name = pick(random, *(n for n in names if n != "atten_mask"))
    array = _first(arguments[name])
    wrong = array[None, None, None] if random.integers(2) else array.reshape(-1)[:1].reshape(())
    arguments[name] = _instead(arguments[name], wrong)
    return name


def spoil_static(arguments: Arguments, random: Random) -> str:
    """A static argument of another type, or no legal value."""
    legal = ("scale_value", "layout", "return_lse", "page_block_size", "compress_block_size",
             "compress_stride", "select_block_size", "select_block_count", "head_num",
             "key_value_head_num", "window_size")  # fmt: skip
    name = pick(random, *(n for n in legal if n in arguments))
    if name == "scale_value":
        wrong = pick(random, np.nan, np.inf, -np.inf, None, "1", 1j, 1e39)
    elif name == "layout":
        wrong = pick(random, "SBH", "tnd", None, 3)
    elif name == "return_lse":
        wrong = pick(random, 1, None, "yes", 0.0)
    else:
        wrong = pick(
            random,
            0,
            -1,
            2.5,
            "16",
            None,
            True,
            2**40,
            17 if name not in ("window_size", "select_block_count") else 0,
        )
        if name in ("select_block_count", "window_size") and wrong is None:
            wrong = 0
    arguments[name] = wrong
    return name


INTEGERS = ("block_table", "actual_cmp_seq_kvlen", "actual_seq_kvlen", "actual_seq_len",
            "actual_seq_qlen", "topk_indices", "slot_mapping")  # fmt: skip


def spoil_integers(arguments: Arguments, random: Random) -> str:
    """Integers as floats, of a wrong number, or None."""
    name = pick(random, *(n for n in INTEGERS if n in arguments and n != "actual_seq_qlen"))
    array = arguments[name]
    arguments[name] = pick(
        random, array.astype(np.float32) + 0.5, np.concatenate([array, array]), None, "12",
        np.ma.masked_array(array),
    )  # fmt: skip
    return name


def spoil_value(arguments: Arguments, random: Random) -> str:
    """One integer outside its range, of a sequence that has tokens and positions."""
    lengths = next(n for n in INTEGERS[1:4] if n in arguments)
    name = pick(random, *(n for n in (lengths, "actual_seq_qlen") if n in arguments))
    array = arguments[name].copy()
    array[random.integers(len(array))] = pick(random, -1, -(2**31), 2**31 - 1, 10**6)
    arguments[name] = array
    return name


def spoil_one_pool(arguments: Arguments, random: Random) -> str:
    """Of keys and values in one pool: another shape, values beside it, or a layout that is none."""
    at = pick(random, "kv_layout", "shape", "value")
    if at == "kv_layout":
        arguments["kv_layout"] = pick(random, "separate", "Interleaved", None, 2)
        return "kv_layout"
    # The step's pools are those of its caches.
    caches = [n for n, v in arguments.items() if isinstance(v, PagedKV)]
    name = pick(random, *caches) if caches else None
    key = arguments[name].key if name else arguments["key"]
    if at == "shape":
        wrong = (key[..., :-1], np.concatenate([key, key], axis=2), key[None], key[:0])
        change = {"key": wrong[random.integers(len(wrong))]}
    else:
        change = {"value": key}
    if name:
        arguments[name] = dataclasses.replace(arguments[name], **change)
        return name
    arguments |= change
    return next(iter(change))


HOST: tuple[Callable[[Arguments, Random], str], ...] = (
    spoil_dtype, spoil_rank, spoil_static, spoil_integers, spoil_value,
)  # fmt: skip


def _is_float(value: Any) -> bool:
    array = _first(value)
    return isinstance(array, np.ndarray) and jnp.issubdtype(array.dtype, jnp.floating)


def names(message: str, name: str) -> bool:
    """Whether a message says the name as a whole word."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message) is not None


def check(operator: str, implementation: str, random: Random) -> str:
    """Spoils a call and sees it refused by name; returns what it was."""
    known = OPERATORS[operator]
    geometry = known.draw(random)
    one_pool = operator in INTERLEAVE and random.random() < 0.4
    if one_pool:
        geometry, rank = with_one_pool(geometry), pick(random, *RANKS)
        arguments = INTERLEAVE[operator](known.build(geometry), rank)
        arguments = jax.tree.map(
            lambda a: np.array(a) if isinstance(a, jax.Array) else a, arguments
        )
    else:
        arguments = known.build(geometry)
    tester = known.contract()
    tester.implementation = implementation
    if operator in RUN_TIME and random.random() < 0.4:
        return faulty.check(tester, geometry, arguments, random)
    able = [
        spoil
        for spoil in HOST
        if operator in RUN_TIME or spoil not in (spoil_integers, spoil_value)
    ]
    if one_pool:
        able.append(spoil_one_pool)
    spoil = able[random.integers(len(able))]
    name = spoil(arguments, random)
    told = f"{spoil.__name__} {name} = {arguments[name]!r}, {geometry}"
    try:
        tester.apply(arguments)
    except (TypeError, ValueError) as error:
        # An argument may be told by what no longer fits it.
        if not any(names(str(error), n) for n in (name, *RELATED.get(name, ()))):
            raise AssertionError(f"the message does not name {name}: {error}\n{told}") from error
        return told
    except Exception as error:
        error.add_note(told)
        raise
    raise AssertionError(f"was not refused: {told}")


RUN_TIME = ("compress_attention", "select_attention", "compress")
RELATED = {
    "head_num": ("key_value_head_num",),
    "key_value_head_num": ("head_num", "key", "query", "topk_indices"),
    "page_block_size": ("key", "input"),
    "block_table": ("query", "actual_seq_kvlen", "actual_cmp_seq_kvlen", "actual_seq_len",
                    "actual_seq_qlen", "slot_mapping"),
    "query": ("block_table", "head_num", "key"),
    "value": ("key",),
    "kv_layout": ("value",),
    **dict.fromkeys(("compressed", "selected", "window"), ("key", "value")),
    "layout": ("query",),
    "select_block_count": ("topk_indices",),
    "cache": ("input",),
    "input": ("cache", "key"),
    "actual_cmp_seq_kvlen": ("actual_sel_seq_kvlen",),
    "compress_stride": ("compress_block_size", "select_block_size", "actual_seq_len",
                        "actual_seq_qlen", "actual_sel_seq_kvlen"),
    "compress_block_size": ("select_block_size", "compress_stride", "weight"),
    "select_block_size": ("topk_indices", "compress_block_size"),
    "gates": ("query",),
}  # fmt: skip
