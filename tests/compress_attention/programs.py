"""What every implementation must do inside of a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from compress_attention.calls import FLOATS, Calls
from compress_attention.problems import Geometry, build

from jax_nsa import nsa_compress_attention_infer


class Programs(Calls):
    """Loops whose lengths grow."""

    def test_scan(self):
        geometry = self.usual(lengths=(31, 8), spare_slots=2, hostile=False, shared_pages=True, k=2)
        arguments, operator = self._operator_of_lengths(geometry)
        start = jnp.asarray(geometry.lengths, jnp.int32)

        def step(lengths, _):
            return lengths + 1, operator(lengths)

        _, results = jax.jit(lambda lengths: jax.lax.scan(step, lengths, length=4))(start)
        for i in range(4):
            step_arguments = {**arguments, "actual_cmp_seq_kvlen": np.asarray(start) + i}
            self.assert_agrees(tuple(r[i] for r in results), step_arguments)

    def test_while_loop(self):
        geometry = self.usual(lengths=(31, 8), spare_slots=2, hostile=False, shared_pages=True, k=2)
        arguments, operator = self._operator_of_lengths(geometry)
        start = jnp.asarray(geometry.lengths, jnp.int32)

        @jax.jit
        def loop(lengths):
            def body(state):
                lengths, _ = state
                return lengths + 1, operator(lengths + 1)

            return jax.lax.while_loop(
                lambda state: state[0][0] < 35, body, (lengths, operator(lengths))
            )

        lengths, results = loop(start)
        assert lengths.tolist() == [35, 12]
        self.assert_agrees(results, {**arguments, "actual_cmp_seq_kvlen": np.asarray(lengths)})

    def test_map(self):
        geometry = self.usual(lengths=(31, 8), spare_slots=0, hostile=False, shared_pages=True, k=2)
        arguments, operator = self._operator_of_lengths(geometry)
        lengths = jnp.asarray([[31, 8], [8, 31], [12, 24]], jnp.int32)
        results = jax.jit(lambda lengths: jax.lax.map(operator, lengths))(lengths)
        for i in range(3):
            step_arguments = {**arguments, "actual_cmp_seq_kvlen": np.asarray(lengths[i])}
            self.assert_agrees(tuple(r[i] for r in results), step_arguments)

    def _operator_of_lengths(self, geometry: Geometry) -> tuple[dict[str, Any], Callable]:
        """Arguments whose pages serve any lengths, and the operator with all but lengths bound."""
        self.require(geometry)
        arguments = build(geometry)
        num_pages = len(arguments["key"])
        rng = np.random.default_rng(1)
        shape = arguments["block_table"].shape
        arguments["block_table"] = rng.integers(0, num_pages, shape, dtype=np.int32)
        for name in ("key", "value"):
            pool = arguments[name]
            arguments[name] = rng.standard_normal(pool.shape).astype(pool.dtype)
        bound = {
            n: jnp.asarray(v) if n in (*FLOATS, "block_table") else v
            for n, v in arguments.items()
            if n != "actual_cmp_seq_kvlen"
        }

        def operator(lengths: jax.Array) -> tuple:
            return nsa_compress_attention_infer(
                **bound, actual_cmp_seq_kvlen=lengths, implementation=self.implementation
            )

        return arguments, operator
