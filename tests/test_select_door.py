"""What the front door of selected attention says of chosen blocks that the host knows."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from select_attention.calls import USUAL
from select_attention.oracle import select_attention
from select_attention.problems import build

from jax_nsa import nsa_select_attention_infer

# Sequences of four and of two blocks.
PACKED = replace(USUAL, token_counts=(2, 1))
SEVERAL = replace(USUAL, layout="BSND", tokens=2)
COUNTED = replace(SEVERAL, token_counts=(1, 2))
HAS = {0: 3, 1: 1}  # each sequence's last block


def call(arguments, **changes):
    return nsa_select_attention_infer(**arguments | changes, implementation="reference")


def with_id(arguments, place, value):
    ids = arguments["topk_indices"].copy()
    ids[place] = value
    return arguments | {"topk_indices": ids}


@pytest.mark.parametrize(
    ("geometry", "place", "sequence"),
    [
        (USUAL, (0, 1, 2), 0), (USUAL, (1, 0, 0), 1), (PACKED, (1, 0, 1), 0),
        (PACKED, (2, 1, 0), 1),
        (SEVERAL, (0, 1, 0, 2), 0), (SEVERAL, (1, 0, 1, 1), 1), (COUNTED, (0, 0, 1, 1), 0),
        (COUNTED, (1, 1, 0, 0), 1), (replace(SEVERAL, layout="BSH"), (1, 1, 1, 2), 1),
    ],
)  # fmt: skip
def test_blocks_that_a_sequence_has(geometry, place, sequence):
    arguments = build(geometry)
    for value in (-1, 0, HAS[sequence]):
        call(with_id(arguments, place, value))
    told = f"topk_indices[{', '.join(map(str, place))}] must be in [-1, {HAS[sequence]}], the "
    told += "blocks of 32 tokens that its sequence has, got "
    for value in (-2, HAS[sequence] + 1, 2**31 - 1, -(2**31)):
        with pytest.raises(ValueError, match=f"^{re.escape(f'{told}{value}')}$"):
            call(with_id(arguments, place, value))


def test_without_an_axis_of_one_token():
    arguments = build(replace(USUAL, layout="BSND"))
    arguments["topk_indices"] = arguments["topk_indices"][:, 0]
    call(with_id(arguments, (1, 1, 2), HAS[1]))
    with pytest.raises(ValueError, match=re.escape("topk_indices[1, 1, 2] must be in [-1, 1], ")):
        call(with_id(arguments, (1, 1, 2), HAS[1] + 1))


def test_a_sequence_without_a_block():
    arguments = build(replace(USUAL, lengths=(100, 0)))
    call(with_id(arguments, (1, 1, 2), -1))
    with pytest.raises(ValueError, match=re.escape("topk_indices[1, 1, 2] must be in [-1, -1], ")):
        call(with_id(arguments, (1, 1, 2), 0))


def test_lengths_that_only_the_program_knows():
    arguments = build(USUAL)
    lengths = jnp.asarray(arguments["actual_seq_kvlen"])
    told = re.escape("topk_indices[0, 1, 2] must be at least -1, got -2")
    with pytest.raises(ValueError, match=f"^{told}$"):
        call(with_id(arguments, (0, 1, 2), -2), actual_seq_kvlen=lengths)
    spoilt = call(with_id(arguments, (0, 1, 2), 2**31 - 1), actual_seq_kvlen=lengths)
    assert np.isnan(spoilt[0][0, 2:]).all()


@pytest.mark.parametrize("known", ["all", "ids", "none"])
@pytest.mark.parametrize("squeezed", [False, True])
def test_ids_of_rows_without_a_token_may_be_anything(known, squeezed):
    """As at run time, whoever knows of ids and counts, and when."""
    tokens = 1 if squeezed else 2
    arguments = build(replace(SEVERAL, tokens=tokens, token_counts=(tokens, tokens - 1)))
    truth = select_attention(
        **{n: a for n, a in arguments.items() if n not in ("return_lse", "select_block_count")}
    )
    ids = arguments["topk_indices"]
    ids[1, tokens - 1] = [[-(2**31), 10**6, -2], [2**31 - 1, 4, 3]]
    arguments["topk_indices"] = ids[:, 0] if squeezed else ids
    traced = {"all": (), "ids": ("actual_seq_qlen",), "none": ("actual_seq_qlen", "topk_indices")}
    arrays = {n: jnp.asarray(arguments[n]) for n in traced[known]}
    attention, _ = jax.jit(lambda arrays: call(arguments, **arrays))(arrays)
    np.testing.assert_allclose(attention, truth.attention, rtol=1e-4, atol=1e-5)
