"""What is right for a whole decode step, by the operators' oracles."""

from __future__ import annotations

import numpy as np
from compress_attention import oracle
from compress_attention.agreement import SCORE_TOLERANCE, assert_indices
from domain import ATTENTION_TOLERANCE
from select_attention import oracle as select_oracle


def assert_is_the_sum(attention, indices, step, arguments):
    """Asserts that results are what the definition gives, in double precision."""
    compressed, selected = arguments["compressed"], arguments["selected"]
    window = arguments.get("window", selected)
    counts, layout = arguments.get("actual_seq_qlen"), arguments["layout"]
    common = {
        n: arguments[n] for n in ("query", "scale_value", "head_num", "key_value_head_num")
    } | {"layout": layout, "actual_seq_qlen": counts}
    several = counts is not None or (layout == "BSND" and arguments["query"].shape[1] > 1)
    first = oracle.compress_attention(
        **common, key=compressed.key, value=compressed.value,
        page_block_size=compressed.key.shape[1], block_table=compressed.block_table,
        actual_cmp_seq_kvlen=compressed.lengths, actual_sel_seq_kvlen=selected.lengths,
        atten_mask=True if several else None,
        **{n: arguments[n] for n in ("select_block_size", "select_block_count",
                                     "compress_block_size", "compress_stride", "importance",
                                     "init_blocks", "local_blocks")},
    )  # fmt: skip
    rounding = SCORE_TOLERANCE + 2.0**-24 * first.score_size
    assert_indices(np.asarray(indices), first, ..., rounding)
    branches = [(first.attention, first.attention_size, first.score_size)]
    for cache, at in ((selected, 0), (window, 1)):
        truth = select_oracle.select_attention(
            **common, key=cache.key, value=cache.value, topk_indices=np.asarray(indices),
            select_block_size=arguments["select_block_size"], block_table=cache.block_table,
            page_block_size=cache.key.shape[1], actual_seq_kvlen=cache.lengths,
            window_size=arguments["window_size"],
        )  # fmt: skip
        which = (truth.attention, truth.window_attention)[at]
        branches.append((which, truth.sizes[at], truth.score_size))
    gates = np.where(step.holds_token[..., None, None], arguments["gates"].astype(np.float64), 0)
    expected = sum(gates[..., i, None] * branch[0] for i, branch in enumerate(branches))
    tolerance = 2 * ATTENTION_TOLERANCE[arguments["query"].dtype.name]
    slack = sum(
        abs(gates[..., i])
        * (tolerance * (size + np.linalg.norm(branch, axis=-1)) + 1e-5 * score * size)
        for i, (branch, size, score) in enumerate(branches)
    )
    assert attention.dtype == arguments["query"].dtype
    assert attention.shape == expected.shape
    error = np.linalg.norm(np.asarray(attention, np.float64) - expected, axis=-1)
    np.testing.assert_array_less(error, slack + 1e-12)
    assert not np.any(np.asarray(attention)[~step.holds_token])
