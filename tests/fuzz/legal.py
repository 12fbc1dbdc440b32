"""Legal calls of every operator, plain and transformed, held to the oracles."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import compress.problems as compress_problems
import compress_attention.problems as problems
import jax
import select_attention.problems as select_problems
from compress.contract import CompressContract
from compress_attention.contract import CompressAttentionContract
from contract import FORMS
from interleaved.pools import LARGEST, RANKS, interleaved, interleaved_step
from select_attention.contract import SelectAttentionContract
from step.agreement import assert_is_the_sum
from step.calls import step_of
from step.problems import Step, arguments_of

import jax_nsa
from fuzz import draw, growing
from fuzz.draw import Random, pick
from jax_nsa import native
from jax_nsa.backends.cpu import ISA_VARIABLE


class OneOrTwoPools:
    """Hands an attention operator its keys and values in one pool, if so wanted.

    The caller and the oracle know two pools; the product sees one.

    Attributes:
        rank: the axes of that pool; None: pools as they are.
    """

    rank: int | None = None

    def apply(self, arguments: dict[str, Any], **options: Any) -> Any:
        """Calls the operator as it is, on arrays that may be traced."""
        if self.rank is not None:
            arguments = interleaved(arguments, self.rank)
        return super().apply(arguments, **options)


class CompressAttention(OneOrTwoPools, CompressAttentionContract):
    """The compressed branch with either kind of pools."""


class SelectAttention(OneOrTwoPools, SelectAttentionContract):
    """The selected branch and the window with either kind of pools."""


class StepContract:
    """The decode step, as the operators' contracts show themselves.

    Attributes:
        implementation: its name.
        rank: the axes of the caches' pools of keys and values; None: pools of each.
    """

    implementation: str
    rank: int | None = None

    def apply(self, arguments: dict[str, Any]) -> Any:
        """Calls the step as it is."""
        return jax_nsa.nsa_decode_step(**arguments, implementation=self.implementation)

    def check(self, step: Step, form: str) -> None:
        """Asserts that a legal step is what its parts are by the oracles."""
        arguments = arguments_of(step)
        given = arguments if self.rank is None else interleaved_step(arguments, self.rank)
        run, arrays = step_of(given, self.implementation)
        if form == "eager, host values":
            results = self.apply(given)
        else:
            results = (jax.jit(run) if form.startswith("jit") else run)(*arrays)
        assert_is_the_sum(*results, step, arguments)


@dataclasses.dataclass(frozen=True)
class Operator:
    """How an operator is fuzzed.

    Attributes:
        draw: a geometry.
        build: its arguments.
        contract: the class whose `check` holds a call to the oracle.
        rows: arguments whose first axis is sequences, where rows are not packed.
    """

    draw: Callable[[Random], Any]
    build: Callable[[Any], dict[str, Any]]
    contract: type
    rows: tuple[str, ...] = ()


TABLE = ("block_table", "actual_seq_qlen")
OPERATORS = {
    "compress_attention": Operator(
        draw.compress_attention, problems.build, CompressAttention,
        ("query", *TABLE, "actual_cmp_seq_kvlen", "actual_sel_seq_kvlen"),
    ),
    "select_attention": Operator(
        draw.select_attention, select_problems.build, SelectAttention,
        ("query", "topk_indices", *TABLE, "actual_seq_kvlen"),
    ),
    "compress": Operator(draw.compress, compress_problems.build, CompressContract),
    "step": Operator(draw.step, arguments_of, StepContract),
    "cache": Operator(growing.draw_history, growing.replay, growing.Growing),
}  # fmt: skip


INTERLEAVE = {
    "compress_attention": interleaved, "select_attention": interleaved, "step": interleaved_step,
}  # fmt: skip


def with_one_pool(geometry: Any) -> Any:
    """The same call with heads that one pool of keys and values may have."""
    if isinstance(geometry, Step):
        return dataclasses.replace(geometry, original=with_one_pool(geometry.original))
    size = min(geometry.head_size, LARGEST)
    return dataclasses.replace(geometry, head_size=size, value_size=size)


def check(operator: str, implementation: str, random: Random) -> str:
    """Draws a call, and perhaps a transformation of it, and holds it to the oracle."""
    from fuzz import transformed

    known = OPERATORS[operator]
    geometry = known.draw(random)
    form = pick(random, *FORMS)
    isas = native.module().cpu_kernels() if implementation == "cpu" else [""]
    os.environ[ISA_VARIABLE] = pick(random, "", *isas)
    tester = known.contract()
    tester.implementation = implementation
    told = f"{os.environ[ISA_VARIABLE] or 'default'}, {form}"
    if operator in INTERLEAVE and random.random() < 0.4:
        tester.rank = pick(random, *RANKS)
        geometry = with_one_pool(geometry)
        told += f", one pool of {tester.rank} axes"
    told += f", {geometry}"
    try:
        tester.check(geometry, form)
        if operator in transformed.BY and random.random() < 0.4:
            transform = pick(random, *transformed.BY[operator])
            transform(tester, known, geometry, random)
    except Exception as error:
        error.add_note(told)
        raise
    finally:
        os.environ.pop(ISA_VARIABLE, None)
    return told
