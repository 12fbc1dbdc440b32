"""How tests call the step."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from step.problems import Step

from jax_nsa import nsa_decode_step

ARRAYS = ("query", "gates", "compressed", "selected", "window")
USUAL = Step()
TOKENS = Step(replace(USUAL.original, layout="BSND", tokens=3, token_counts=(3, 1)))
PACKED = Step(replace(USUAL.original, token_counts=(2, 3)))


def step_of(arguments, implementation, **options):
    """The step as a function of its arrays, and these."""
    static = {n: v for n, v in arguments.items() if n not in ARRAYS}
    names = [n for n in ARRAYS if n in arguments]

    def run(*arrays):
        return nsa_decode_step(
            **dict(zip(names, arrays, strict=True)), **static, implementation=implementation,
            **options,
        )  # fmt: skip

    return run, [jax.tree.map(jnp.asarray, arguments[n]) for n in names]
