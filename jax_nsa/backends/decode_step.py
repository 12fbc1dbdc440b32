"""The calls of a decode step, for backends that make them one."""

from __future__ import annotations

from collections.abc import Sequence

from jax_nsa.backends import Call

TARGET = "step"
# What the attributes of each call begin with. A window that reads the same pools as the chosen
# blocks is in their call.
BRANCHES = ("compressed", "chosen", "window")


def is_one(calls: Sequence[Call]) -> bool:
    """Whether the calls are those of a step that computes anything, of known shapes.

    They are the compressed branch, the chosen blocks with the window or without, and then the
    window.
    """
    targets = [call.operator.target for call in calls]
    if targets not in (["compress_attention", *["select_attention"] * n] for n in (1, 2)):
        return False
    branches = [
        bool(size)
        for call in calls[1:]
        for size in (call.problem.select_block_size, call.problem.window_size)
    ]
    arrays = [array for call in calls for array in (*call.operands, *call.results())]
    return branches in ([True, True], [True, False, False, True]) and all(
        isinstance(size, int) and size > 0 for array in arrays for size in array.shape
    )
