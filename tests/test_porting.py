"""What docs/porting.md writes after "and after" runs, on arrays of the shapes that it states."""

from __future__ import annotations

import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

import jax_nsa

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "porting.md"


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float16)


ARRAYS = {
    "nsa_select_attention_infer": {
        "query": normal(123, 1, 4 * 192),
        "key": normal(246, 64, 2 * 192),
        "value": normal(246, 64, 2 * 128),
        "topk_indices": jnp.tile(jnp.array([1, 0], jnp.int32), (123, 2, 1)),
        "block_table": jnp.arange(246, dtype=jnp.int32).reshape(123, 2),
    },
    "nsa_compress_infer": {
        "key": normal(4, 128, 2, 16),
        "value": normal(4, 128, 2, 8),
        "weight": normal(32, 2),
        "slot_mapping": [0, 1],
        "block_table": [[0, 1], [2, 3]],
        "lengths": [64, 48],
        "compressed_key": normal(1, 16, 2, 16),
        "compressed_value": normal(1, 16, 2, 8),
    },
}
SHAPES = {
    "nsa_select_attention_infer": {"attention": (123, 1, 512), "window": (123, 1, 512)},
    "nsa_compress_infer": {"compressed_key": (1, 16, 2, 16), "compressed_value": (1, 16, 2, 8)},
}


@pytest.mark.parametrize("name", ARRAYS)
def test_what_is_written_after_runs(name):
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    (snippet,) = [s for s in snippets if f"jax_nsa.{name}(" in s]
    names = {"jax_nsa": jax_nsa, **ARRAYS[name]}
    exec(compile(snippet, "docs/porting.md", "exec"), names)
    for result, shape in SHAPES[name].items():
        assert names[result].shape == shape
