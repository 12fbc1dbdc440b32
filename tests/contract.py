"""The base of each operator's contract: what any operator owes, whatever it computes.

`<operator>/contract.py` derives from `OperatorContract`, says how the operator is called and what
is right, and adds what is particular to it. A test file derives from that, and names an
implementation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

# Whether a program is compiled, and whether it knows the integers beforehand.
FORMS = ("eager, host values", "eager, arrays", "jit, host values", "jit, arrays")


def bits(array: Any) -> np.ndarray:
    """An array's bits, so that NaN equals NaN."""
    array = np.asarray(array)
    return array.view(f"u{array.itemsize}")


class OperatorContract:
    """What every implementation of any operator must do.

    Attributes:
        implementation: its name.
        fails_on_faults: whether calls with faulty run-time values fail unless told otherwise; or
            else what the fault spoils is blank.
        FLOATS: the arguments that are always arrays.
        INTEGERS: those that may be host values.
        changes: what an example is to be, for the implementation to serve it.
        EXAMPLES: calls that between them take every argument, by name; the `example` of a test.
    """

    implementation: str
    fails_on_faults = False
    changes: ClassVar[dict[str, Any]] = {}
    FLOATS: ClassVar[tuple[str, ...]]
    INTEGERS: ClassVar[tuple[str, ...]]
    EXAMPLES: ClassVar[dict[str, Any]]

    # An operator's own.

    @staticmethod
    def build(geometry: Any) -> dict[str, Any]:
        """The arguments of a call, by name."""
        raise NotImplementedError

    @classmethod
    def geometries(cls) -> st.SearchStrategy:
        """Draws from the implementation's whole domain."""
        raise NotImplementedError

    @staticmethod
    def operator(arguments: dict[str, Any]) -> Callable[..., Any]:
        """The public function that takes such arguments."""
        raise NotImplementedError

    def assert_agrees(self, results: Any, arguments: dict[str, Any]) -> Any:
        """Asserts that results are the oracle's for these arguments."""
        raise NotImplementedError

    def require(self, geometry: Any) -> None:
        """Skips a test whose call the implementation does not serve."""

    def usual(self, geometry: Any, **changes: Any) -> Any:
        """A call as the implementation takes it, but for changes."""
        return replace(geometry, **self.changes | changes)

    # How the tests call it.

    def apply(self, arguments: dict[str, Any], **options: Any) -> Any:
        """Calls the operator as it is, on arrays that may be traced."""
        results = self.operator(arguments)(
            **arguments, implementation=self.implementation, **options
        )
        return results if isinstance(results, tuple) else (results,)

    def call(self, arguments: dict[str, Any], form: str = "eager, arrays", **options: Any) -> Any:
        """Calls the operator with integers that are known beforehand or not."""
        traced = [n for n in self.FLOATS if n in arguments]
        if form.endswith("arrays"):
            traced += [n for n in self.INTEGERS if n in arguments]
        static = {n: v for n, v in arguments.items() if n not in traced}

        def run(arrays: dict[str, Any]) -> Any:
            return self.apply(static | arrays, **options)

        run = jax.jit(run) if form.startswith("jit") else run
        return jax.block_until_ready(run({n: self.arrays(arguments[n]) for n in traced}))

    @staticmethod
    def arrays(argument: Any) -> Any:
        """An argument as JAX arrays."""
        return jax.tree.map(jnp.asarray, argument)

    def check(self, geometry: Any, form: str = "eager, arrays", **changes: Any) -> Any:
        """Asserts that a legal call agrees with the oracle; returns its results."""
        self.require(geometry)
        arguments = self.build(geometry) | changes
        results = self.call(arguments, form)
        self.assert_agrees(results, arguments)
        return results

    def assert_fails(self, arguments: dict[str, Any], *messages: str) -> None:
        """Asserts that a call fails where it runs, with these words."""
        for form in ("eager, arrays", "jit, arrays"):
            # JAX raises XLA's InvalidArgument as the one or the other.
            with pytest.raises((ValueError, jax.errors.JaxRuntimeError)) as failure:
                self.call(arguments, form)
            for message in ("INVALID_ARGUMENT", *messages):
                assert message in str(failure.value)

    # What any operator owes.

    @pytest.mark.parametrize("form", FORMS)
    def test_forms(self, form, example):
        self.check(self.usual(example), form)

    @given(data=st.data())
    def test_any_legal_call(self, data):
        self.check(data.draw(self.geometries()), data.draw(st.sampled_from(FORMS)))

    def test_equal_bits_each_time(self, example):
        example = self.usual(example)
        self.require(example)
        arguments = self.build(example)
        first = self.call(arguments)
        for _ in range(3):
            jax.tree.map(
                lambda one, other: np.testing.assert_array_equal(bits(one), bits(other)),
                first, self.call(arguments),
            )  # fmt: skip

    def test_vmap(self, example):
        """Over all arrays at once."""
        each = [self.usual(example, seed=seed) for seed in range(3)]
        for one in each:
            self.require(one)
        calls = [self.build(one) for one in each]
        names = [n for n in (*self.FLOATS, *self.INTEGERS) if n in calls[0]]
        stacked = {n: jax.tree.map(lambda *a: np.stack(a), *(c[n] for c in calls)) for n in names}
        static = {n: v for n, v in calls[0].items() if n not in names}
        results = jax.jit(jax.vmap(lambda arrays: self.apply(static | arrays)))(stacked)
        for index, arguments in enumerate(calls):
            one = jax.tree.map(operator.itemgetter(index), results)
            self.assert_agrees(one, arguments)
