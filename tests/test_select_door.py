"""What the front door of selected attention says of chosen blocks that the host knows."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from select_attention.calls import USUAL
from select_attention.oracle import select_attention
from select_attention.problems import build

from jax_nsa import nsa_select_attention_infer, nsa_window_attention_infer

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


def test_a_table_of_more_positions_than_lengths_can_count():
    pool = np.ones((4, 256, 32), np.float32)
    with pytest.raises(ValueError, match=r"block_table's second axis .* got 8388608 \* 256"):
        nsa_window_attention_infer(
            np.ones((1, 2, 16), np.float32), pool, pool, 1.0, 2, 2, 5, 256, layout="TND",
            block_table=np.zeros((1, 2**23), np.int32), actual_seq_kvlen=[5],
        )  # fmt: skip


# Page ids that are known.


def pages_read(rows, lengths, ids, window, *, block, page, columns):
    """Which pages the tokens of a call read, by a loop over everything.

    Args:
        rows: sequence and row of each token, and how many come after it.
        lengths: of each sequence.
        ids: of each row, or None.
        window: its size, or 0.
        block: tokens in a block.
        page: rows in a page.
        columns: of the table.
    """
    read = np.zeros((len(lengths), columns), bool)
    for sequence, row, later in rows:
        limit = lengths[sequence] - later
        positions = set(range(max(0, limit - window), limit)) if window else set()
        for i in () if ids is None else ids[row].ravel():
            positions |= set(range(i * block, min((i + 1) * block, limit)) if i >= 0 else ())
        for position in positions:
            read[sequence, position // page] = True
    return read


def drawn(random):
    """A call of which the host knows all, and which page ids are read."""
    sequences, columns, tokens = (int(n) for n in random.integers(1, 4, 3))
    page, block = int(random.choice([16, 32, 48])), int(random.choice([16, 32, 48, 64]))
    packed, counted = random.random() < 0.5, random.random() < 0.7
    counts = random.integers(0, tokens + 1, sequences)
    if not counted:
        counts = np.full(sequences, 1 if packed else tokens)
    # Where pages, blocks and windows end, a token more or less decides.
    granule = int(random.choice([1, page, block]))
    lengths = random.integers(0, columns * page // granule + 1, sequences) * granule
    lengths += random.integers(-2, 4, sequences)
    lengths = np.clip(lengths, counts, columns * page)
    owners = [(b, t, counts[b] - 1 - t) for b in range(sequences) for t in range(counts[b])]
    leading = (len(owners),) if packed else (sequences, tokens)
    rows = [(b, i if packed else (b, t), later) for i, (b, t, later) in enumerate(owners)]
    window, chooses = int(random.choice([0, 0, 1, 2, 40])), random.random() < 0.7
    ids = np.full((*leading, 2, 3), -1)
    for sequence, row, _ in rows:
        chosen = random.integers(-1, -(-lengths[sequence] // block), (2, 3))
        ids[row] = np.where(random.random((2, 3)) < 0.2, chosen, -1)  # few, so that each matters
    chooses |= window == 0
    read = pages_read(
        rows, lengths, ids if chooses else None, window, block=block, page=page, columns=columns
    )
    table = random.integers(0, 6, (sequences, columns))
    pool = np.ones((6, page, 32), np.float32)
    arguments = {
        "query": np.ones((*leading, 2, 16), np.float32), "key": pool, "value": pool,
        "scale_value": 1.0, "head_num": 2, "key_value_head_num": 2, "page_block_size": page,
        "layout": "TND" if packed else "BSND", "block_table": table, "actual_seq_kvlen": lengths,
        "actual_seq_qlen": counts if counted else None,
    }  # fmt: skip
    if not chooses:
        return nsa_window_attention_infer, arguments | {"window_size": window}, read
    of_blocks = {"topk_indices": ids, "select_block_size": block, "select_block_count": 3}
    of_blocks["window_size"] = window or None
    return nsa_select_attention_infer, arguments | of_blocks, read


def test_page_ids_that_tokens_read():
    random = np.random.default_rng(0)
    refused = []
    for _ in range(300):
        operator, arguments, read = drawn(random)
        # What is let through is not worth a run: to be traced is enough.
        call = functools.partial(operator, implementation="reference", **arguments)
        for place in np.ndindex(read.shape):
            table = arguments["block_table"].copy()
            table[place] = random.choice([-1, 6, 99])
            if read[place]:
                message = f"block_table[{place[0]}, {place[1]}] must be in [0, 6)"
                with pytest.raises(ValueError, match=re.escape(message)):
                    jax.eval_shape(functools.partial(call, block_table=table))
            else:
                jax.eval_shape(functools.partial(call, block_table=table))
            refused.append(read[place])
    assert 0.1 < np.mean(refused) < 0.9
