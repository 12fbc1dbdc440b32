"""Legal calls of every operator, plain and transformed, held to the oracles."""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Callable
from typing import Any

import compress.problems as compress_problems
import compress_attention.problems as problems
import jax
import jax.numpy as jnp
import numpy as np
import select_attention.problems as select_problems
from compress.contract import CompressContract
from compress_attention.contract import CompressAttentionContract
from contract import FORMS
from interleaved.pools import LARGEST, RANKS, interleaved, interleaved_step
from select_attention.contract import SelectAttentionContract
from step.agreement import assert_is_the_sum
from step.calls import ARRAYS
from step.problems import Step, arguments_of

import jax_nsa
from fuzz import draw, growing
from fuzz.draw import Random, pick
from jax_nsa import native
from jax_nsa.backends.cpu import ISA_VARIABLE


class Given:
    """Hands an operator its arguments in one of the forms that it takes them in.

    The caller and the oracle know pools of keys and of values, and int32.

    Attributes:
        rank: the axes of a pool of keys and values; None: pools of each.
        integers: makes what the host knows of an array of integers.
    """

    rank: int | None = None
    integers: Callable[[np.ndarray], Any] = staticmethod(np.asarray)

    def apply(self, arguments: dict[str, Any], **options: Any) -> Any:
        """Calls the operator as it is, on arrays that may be traced."""
        if self.rank is not None:
            arguments = interleaved(arguments, self.rank)
        given = {
            n: self.integers(a)
            for n, a in arguments.items()
            if type(a) is np.ndarray and a.dtype == np.int32
        }
        return super().apply(arguments | given, **options)


# Of NumPy's dtypes, those that hold what no one looks at, too.
INTEGERS = (
    np.asarray, np.asfortranarray, np.ndarray.tolist, operator.methodcaller("astype", np.int64),
    operator.methodcaller("astype", ">i8"),
)  # fmt: skip


class CompressAttention(Given, CompressAttentionContract):
    """The compressed branch."""


class SelectAttention(Given, SelectAttentionContract):
    """The selected branch and the window."""


class Compress(Given, CompressContract):
    """The compression into the cache."""


class StepContract:
    """The decode step, as the operators' contracts show themselves.

    Attributes:
        implementation: its name.
        rank: the axes of the caches' pools of keys and values; None: pools of each.
        step: what was checked last.
    """

    implementation: str
    rank: int | None = None
    step: Step

    def apply(self, arguments: dict[str, Any]) -> Any:
        """Calls the step as it is, on arrays that may be traced."""
        if self.rank is not None:
            arguments = interleaved_step(arguments, self.rank)
        return jax_nsa.nsa_decode_step(**arguments, implementation=self.implementation)

    def assert_agrees(self, results: Any, arguments: dict[str, Any]) -> None:
        """Asserts that results are what the parts are by the oracles."""
        assert_is_the_sum(*results, self.step, arguments)

    def check(self, step: Step, form: str) -> None:
        """Asserts that a legal step is what its parts are by the oracles."""
        self.step = step
        arguments = arguments_of(step)
        traced = {n: jax.tree.map(jnp.asarray, arguments[n]) for n in ARRAYS if n in arguments}
        if form == "eager, host values":
            traced = {}
        run = jax.jit if form.startswith("jit") else lambda function: function
        results = run(lambda arrays: self.apply(arguments | arrays))(traced)
        self.assert_agrees(results, arguments)


@dataclasses.dataclass(frozen=True)
class Operator:
    """How an operator is fuzzed.

    Attributes:
        draw: a geometry.
        build: its arguments.
        contract: the class whose `check` holds a call to the oracle.
    """

    draw: Callable[[Random], Any]
    build: Callable[[Any], dict[str, Any]]
    contract: type


OPERATORS = {
    "compress_attention": Operator(draw.compress_attention, problems.build, CompressAttention),
    "select_attention": Operator(draw.select_attention, select_problems.build, SelectAttention),
    "compress": Operator(draw.compress, compress_problems.build, Compress),
    "step": Operator(draw.step, arguments_of, StepContract),
    "cache": Operator(growing.draw_history, growing.replay, growing.Growing),
}


INTERLEAVE = {
    "compress_attention": interleaved, "select_attention": interleaved, "step": interleaved_step,
}  # fmt: skip


def with_one_pool(geometry: Any) -> Any:
    """The same call with heads that one pool of keys and values may have."""
    if isinstance(geometry, Step):
        return dataclasses.replace(geometry, original=with_one_pool(geometry.original))
    size = min(geometry.head_size, LARGEST)
    return dataclasses.replace(geometry, head_size=size, value_size=size)


def check(name: str, implementation: str, random: Random) -> str:
    """Draws a call, and perhaps a transformation of it, and holds it to the oracle."""
    from fuzz import transformed

    known = OPERATORS[name]
    geometry = known.draw(random)
    form = pick(random, *FORMS)
    isas = native.module().cpu_kernels() if implementation == "cpu" else [""]
    os.environ[ISA_VARIABLE] = pick(random, "", *isas)
    tester = known.contract()
    tester.implementation = implementation
    told = f"{os.environ[ISA_VARIABLE] or 'default'}, {form}"
    if name not in ("step", "cache") and form.endswith("host values"):
        tester.integers = pick(random, *INTEGERS)
    if name in INTERLEAVE and random.random() < 0.4:
        tester.rank = pick(random, *RANKS)
        geometry = with_one_pool(geometry)
        told += f", one pool of {tester.rank} axes"
    told += f", {geometry}"
    try:
        tester.check(geometry, form)
        if name in transformed.BY and random.random() < 0.4:
            transform = pick(random, *transformed.BY[name])
            transform(tester, known, geometry, random)
    except Exception as error:
        error.add_note(told)
        raise
    finally:
        os.environ.pop(ISA_VARIABLE, None)
    return told
