"""A usual call of the compressed branch, for what is particular to the route that it takes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from compress_attention import oracle
from compress_attention.agreement import assert_agrees
from compress_attention.problems import Geometry
from domain import ATTENTION_TOLERANCE

from jax_nsa import nsa_compress_attention_infer

USUAL = Geometry(
    dtype="bfloat16", lengths=(150, 33, 97), page=16, k=8, group=4, head_size=24, value_size=12
)


def call(arguments, implementation="ascend"):
    """Calls the operator with arrays, as values that only the run knows."""
    arrays = {n: jnp.asarray(v) if isinstance(v, np.ndarray) else v for n, v in arguments.items()}
    return jax.block_until_ready(
        nsa_compress_attention_infer(**arrays, implementation=implementation)
    )


def check(arguments, implementation="ascend"):
    """Asserts that a call agrees with the oracle."""
    results = call(arguments, implementation)
    tolerance = ATTENTION_TOLERANCE[results[0].dtype.name]
    assert_agrees(results, oracle.compress_attention(**arguments), attention_tolerance=tolerance)
