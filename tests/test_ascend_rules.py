"""The stand-in for CANN notices each breach of the rules of the operators beside the first.

The rules of memory, streams and executors are the same for all: test_ascend_faults.py.
"""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from ascend.caller import BFLOAT16, INT32, Caller, Cann

pytest_plugins = ("ascend.fixtures",)

FLOAT32, INT64 = 0, 9  # aclDataType
ONE = 0x3F80  # 1.0 in bfloat16


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A legal call, in the order of CANN's parameters.

    Attributes:
        name: of the operator.
        arrays: tensors as (dims, dtype, bits), lists of integers, scalars and strings, by name.
        result: the array that it writes.
    """

    name: str
    arrays: dict[str, Any]
    result: str


SELECT = Arguments(
    "aclnnNsaSelectedAttentionInfer",
    {
        "query": ((2, 1, 2, 192), BFLOAT16, ONE),
        "key": ((3, 64, 1, 192), BFLOAT16, ONE),
        "value": ((3, 64, 1, 128), BFLOAT16, ONE),
        "topk": ((2, 1, 1, 2), INT32, [0, 1, 1, -1]),
        "mask": None,
        "table": ((2, 2), INT32, [2, 0, 1, 1]),
        "q_lengths": [1, 1],
        "lengths": [40, 100],
        "layout": b"BSND",
        "heads": 2,
        "kv_heads": 1,
        "block": 32,
        "k": 2,
        "page": 64,
        "scale": 0.1,
        "sparse_mode": 0,
        "output": ((2, 1, 2, 128), BFLOAT16, 0xFFFF),
    },
    "output",
)
COMPRESS = Arguments(
    "aclnnNsaCompressWithCache",
    {
        "input": ((3, 64, 2, 16), BFLOAT16, ONE),
        "weight": ((32, 2), BFLOAT16, ONE),
        "slots": ((2,), INT32, [3, 0]),
        "lengths": [32, 80],
        "table": ((2, 2), INT32, [2, -1, 0, 1]),
        "layout": b"TND",
        "block": 32,
        "stride": 16,
        "lengths_type": 1,
        "page": 64,
        "cache": ((5, 2, 16), BFLOAT16, 0xFFFF),
    },
    "cache",
)


def run(cann: Cann, arguments: Arguments, **changes: Any) -> tuple[list[int], np.ndarray]:
    """Both phases and a wait.

    Returns:
        The statuses up to the first that is not 0, and what the result's memory holds then.
    """
    caller = Caller(cann)
    memory: dict[str, tuple[ctypes.c_void_p, np.ndarray]] = {}

    def passed(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return caller.integers(value)
        if not isinstance(value, tuple):
            return value
        dims, dtype, bits = value
        content = np.empty(dims, np.int32 if dtype in (INT32, INT64) else np.uint16)
        content.flat = bits
        pointer = caller.copied_in(content)
        memory[name] = pointer, content
        return caller.tensor(dims, dtype, pointer, format=changes.get("format", 2))

    given = [passed(n, changes.get(n, value)) for n, value in arguments.arrays.items()]
    statuses = [*caller.run(arguments.name, *given), caller.synchronize()]
    caller.copy_out(*memory[arguments.result])
    caller.close()
    return statuses, memory[arguments.result][1]


def tensor(arguments: Arguments, name: str, dims=None, dtype=None, bits=None) -> tuple:
    """One of the call's tensors, changed."""
    was = arguments.arrays[name]
    return (dims or was[0], was[1] if dtype is None else dtype, was[2] if bits is None else bits)


def test_the_rules_kept(standin):
    statuses, attention = run(standin, SELECT)
    assert statuses == [0, 0, 0]
    assert np.all(attention == ONE)
    statuses, cache = run(standin, COMPRESS)
    assert statuses == [0, 0, 0]
    assert np.all(cache[[0, 3]] == 0x4200)  # 32
    assert np.all(cache[[1, 2, 4]] == 0xFFFF)


@pytest.mark.parametrize(
    ("arguments", "changes", "complaint"),
    [
        (SELECT, {"query": tensor(SELECT, "query", dtype=FLOAT32)}, "query has dtype 0"),
        (SELECT, {"query": None}, "query is null"),
        (SELECT, {"format": 0}, "query is not ND"),
        (SELECT, {"topk": tensor(SELECT, "topk", dims=(2, 1, 2))}, "topkIndices has rank 3"),
        (SELECT, {"topk": tensor(SELECT, "topk", dtype=INT64)}, "topkIndices has dtype 9"),
        (SELECT, {"key": tensor(SELECT, "key", dims=(3, 64, 1, 128))}, "key has the wrong shape"),
        (SELECT, {"value": tensor(SELECT, "value", dims=(3, 64, 1, 192))}, "value has the wrong"),
        (SELECT, {"key": tensor(SELECT, "key", dims=(6, 32, 1, 192)), "page": 32}, "pageBlockSize"),
        (SELECT, {"table": None}, "blockTable is null"),
        (SELECT, {"mask": tensor(SELECT, "table")}, "attenMask is not supported"),
        (SELECT, {"sparse_mode": 3}, "sparseMode is not 0"),
        (SELECT, {"layout": b"BNSD"}, "layout is BNSD"),
        (SELECT, {"layout": None}, "layout is null"),
        (SELECT, {"q_lengths": None}, "actualQSeqLen is null"),
        (SELECT, {"q_lengths": [1, 0]}, "actualQSeqLen is 0"),
        (SELECT, {"lengths": None}, "actualKvSeqLen is null"),
        (SELECT, {"lengths": [40]}, "actualKvSeqLen has not one entry"),
        (SELECT, {"lengths": [40, 0]}, "actualKvSeqLen is 0"),
        (SELECT, {"lengths": [40, 129]}, "actualKvSeqLen is 129"),
        (SELECT, {"heads": 34}, "numHeads / numKeyValueHeads"),
        (COMPRESS, {"input": tensor(COMPRESS, "input", dtype=FLOAT32)}, "input has dtype 0"),
        (COMPRESS, {"weight": tensor(COMPRESS, "weight", dtype=1)}, "weight has dtype 1"),
        (COMPRESS, {"weight": tensor(COMPRESS, "weight", dims=(16, 2))}, "weight has the wrong"),
        (COMPRESS, {"format": 0}, "input is not ND"),
        (COMPRESS, {"slots": None}, "slotMapping is null"),
        (COMPRESS, {"table": None}, "blockTable is null"),
        (COMPRESS, {"lengths": None}, "actSeqLen is null"),
        (COMPRESS, {"lengths": [32]}, "actSeqLen has not one entry"),
        (COMPRESS, {"lengths": [32, 129]}, "actSeqLen is 129"),
        (COMPRESS, {"lengths_type": 0}, "actSeqLenType is not 1"),
        (COMPRESS, {"layout": b"BSND"}, "layout is BSND"),
        (COMPRESS, {"stride": 48}, "block sizes"),
        (COMPRESS, {"page": 16}, "pageBlockSize"),
        (COMPRESS, {"cache": tensor(COMPRESS, "cache", dims=(5, 32))}, "outputCache has rank 2"),
    ],
    ids=lambda value: value.name if isinstance(value, Arguments) else "",
)  # fmt: skip
def test_first_phase(standin, arguments, changes, complaint):
    statuses, result = run(standin, arguments, **changes)
    assert statuses[0] in (161001, 161002)
    assert complaint in standin.take_violations(expected=True)
    assert np.all(result == 0xFFFF)
    standin.take_violations()


@pytest.mark.parametrize(
    ("arguments", "changes", "complaint"),
    [
        (SELECT, {"topk": tensor(SELECT, "topk", bits=[0, 1, -1, 1])}, "never ends"),
        (SELECT, {"topk": tensor(SELECT, "topk", bits=[0, 2, 1, -1])}, "block 2 past the end"),
        (SELECT, {"topk": tensor(SELECT, "topk", dims=(2, 1, 1, 3), bits=[0, 1, -1, 0, -1, 1]),
                  "k": 3}, "stands after -1"),
        (SELECT, {"table": tensor(SELECT, "table", bits=[3, 0, 1, 1])}, "has page 3"),
        (SELECT, {"table": tensor(SELECT, "table", bits=[-1, 0, 1, 1])}, "has page -1"),
        (COMPRESS, {"table": tensor(COMPRESS, "table", bits=[2, -1, 0, 3])}, "has page 3"),
        (COMPRESS, {"slots": tensor(COMPRESS, "slots", bits=[5, 0])}, "slotMapping has 5"),
        (COMPRESS, {"slots": tensor(COMPRESS, "slots", bits=[0, -1])}, "slotMapping has -1"),
        (COMPRESS, {"slots": tensor(COMPRESS, "slots", bits=[2, 2])}, "writes a row twice"),
    ],
    ids=lambda value: value.name if isinstance(value, Arguments) else "",
)  # fmt: skip
def test_when_the_stream_gets_there(standin, arguments, changes, complaint):
    statuses, _ = run(standin, arguments, **changes)
    assert statuses[:2] == [0, 0]
    assert statuses[2] != 0
    assert complaint in standin.take_violations(expected=True)
    standin.take_violations()


def test_windows_that_do_not_end_with_the_sequence_are_passed_over(standin):
    """As CANN does."""
    _, cache = run(standin, COMPRESS, lengths=[33, 79])
    assert np.all(cache == 0xFFFF)


def test_all_heads_read_the_blocks_of_the_first(standin):
    """As CANN does."""
    assert values_of_two_heads(standin) == [1, 1]


def values_of_two_heads(cann: Cann) -> list[float]:
    """What two key/value heads read, which choose a block of ones and a block of twos."""
    value = np.full((2, 64, 2, 128), ONE, np.uint16)
    value[0, 32:] = 0x4000  # 2.0
    _, attention = run(
        cann, SELECT,
        query=((1, 1, 2, 192), BFLOAT16, ONE), key=((2, 64, 2, 192), BFLOAT16, ONE),
        value=(value.shape, BFLOAT16, value.ravel()), topk=((1, 1, 2, 1), INT32, [0, 1]),
        table=((1, 1), INT32, [0]), q_lengths=[1], lengths=[64], kv_heads=2, k=1,
        output=((1, 1, 2, 128), BFLOAT16, 0xFFFF),
    )  # fmt: skip
    return attention.view(ml_dtypes.bfloat16)[0, 0, :, 0].astype(float).tolist()
