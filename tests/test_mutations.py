"""The contract can fail: each wrong formula in the reference turns one of its tests red."""

import types

import pytest
from compress_attention.contract import CompressAttentionContract
from references import with_softmax

from jax_nsa.compress_attention import reference
from jax_nsa.compress_attention.door import OPERATOR

# What goes wrong, the right text and the wrong one, and the contract's test that must notice.
MUTANTS = {
    "j+1 dropped": ("before + latest - m - n", "before + latest - m_count - m - n", "dtype"),
    "initial block not forced": (
        "(block < problem.init_blocks) |",
        "",
        "initial_and_local_blocks_lead",
    ),
    "first local block not forced": (
        "(block >= num_blocks - problem.local_blocks)",
        "(block == num_blocks - 1)",
        "initial_and_local_blocks_lead",
    ),
    "last block not forced": (
        "(block >= num_blocks - problem.local_blocks)",
        "(block == num_blocks - problem.local_blocks)",
        "initial_and_local_blocks_lead",
    ),
    "initial blocks are one": (
        "(block < problem.init_blocks) |",
        "(block < 1) |",
        "no_forced_block",
    ),
    "local blocks are two": (
        "(block >= num_blocks - problem.local_blocks)",
        "(block >= num_blocks - 2)",
        "no_forced_block",
    ),
    "aligned blocks scored by CANN's rule": (
        "latest = m_count - 1 if problem.aligned else m_count",
        "latest = m_count",
        "peak",
    ),
    "aligned blocks scored two positions early": (
        "latest = m_count - 1 if problem.aligned else m_count",
        "latest = m_count - 2 if problem.aligned else m_count",
        "peak",
    ),
    "blocks counted by compress blocks": (
        "universe(jnp.maximum(select_lengths - later, 0))",
        "num_blocks(lengths - 0 * later)",
        "a_block_that_no_position_reaches",
    ),
    "no block before any position": (
        "universe(jnp.maximum(select_lengths - later, 0))",
        "universe(jnp.maximum(select_lengths - later, 0)) * (lengths > 0)",
        "before_any_position",
    ),
    "each token counts all blocks": (
        "jnp.where(problem.causal, counts - 1 - token, 0)",
        "0 * token",
        "each_token_counts_the_blocks_that_it_sees",
    ),
    "tokens that are not causal count fewer blocks": (
        "jnp.where(problem.causal, counts - 1 - token, 0)",
        "counts - 1 - token",
        "tokens_that_are_not_causal_count_all_blocks",
    ),
    "original lengths of aligned blocks unchecked": (
        "bad |= (select_lengths < 0)",
        "bad &= (select_lengths < 0)",
        "aligned_faults",
    ),
    "equals in descending order": (
        "order = _descending(importance, count)",
        "order = importance.shape[-1] - 1 - _descending(importance[..., ::-1], count)",
        "equals_in_ascending_order",
    ),
    "flat weights": (
        "for n in range(n_count)",
        "for n in range(n_count if m == m_count - 1 else 1)",
        "dtype",
    ),
    "a block too many": (
        "problem.blocks.num_blocks(lengths)",
        "problem.blocks.num_blocks(lengths + 4)",
        "initial_and_local_blocks_lead",
    ),
    "a block too few": (
        "problem.blocks.num_blocks(lengths)",
        "problem.blocks.num_blocks(lengths - 4)",
        "initial_and_local_blocks_lead",
    ),
    "nothing masked past the length": (
        "position < visible[:, :, None]",
        "position < position.size + 0 * visible[:, :, None]",
        "dtype",
    ),
    "last position dropped": (
        "position < visible[:, :, None]",
        "position < visible[:, :, None] - 1",
        "dtype",
    ),
    "garbage past the length not cleared": (
        "jnp.where(in_sequence[:, :, None, None], heads, 0.0)",
        "heads",
        "dtype",
    ),
    "unscaled": ("problem.scale * jnp.einsum", "jnp.einsum", "dtype"),
    "no maximum subtracted": (
        "jnp.exp(scores - peak)",
        "jnp.exp(scores) * jnp.exp(-peak)",
        "scores_whose_exponentials_overflow",
    ),
    "probabilities rounded to bfloat16": (
        "return weights / total",
        "return weights.astype(jnp.bfloat16).astype(jnp.float32) / total",
        "dtype",
    ),
    "importance is the greatest head's": (
        "jnp.sum(scores, axis=3)",
        "jnp.max(scores, axis=3)",
        "dtype",
    ),
    "heads of a group interleaved": (
        "problem.key_value_heads, -1, rows.shape[-1])",
        "-1, problem.key_value_heads, rows.shape[-1]).swapaxes(2, 3)",
        "dtype",
    ),
    "selection not padded": (
        "jnp.where(jnp.arange(count, dtype=jnp.int32) < num_blocks, order, -1)",
        "order",
        "more_selected_than_there_are_blocks",
    ),
    "mask ignored": (
        "sequences.token < sequences.early[:, None]",
        "0 * sequences.token",
        "mask_matters",
    ),
    "mask hides from the wrong end": (
        "sequences.token < sequences.early[:, None]",
        "sequences.token >= (sequences.counts - sequences.early)[:, None]",
        "masked_tokens",
    ),
    "lse to base 2": ("peak + jnp.log(", "peak + jnp.log2(", "length_zero"),
    "rows without a token computed": ("when_absent, by_head", "by_head, by_head", "padding"),
    "faulty sequences computed": ("jnp.nan, filled", "filled, filled", "faults"),
}


class Contract(CompressAttentionContract):
    """The contract with each call compiled anew, so that none meets another mutant's program."""

    implementation = "reference"

    def call(self, arguments, form="jit, arrays"):
        del form
        return super().call(arguments, "jit, arrays")

    def run(self, test):
        """Runs one of the contract's tests by name."""
        with_arguments = {
            "dtype": lambda: self.test_dtype("float32"),
            "equals_in_ascending_order": lambda: self.test_equals_in_ascending_order("float32"),
            "no_forced_block": lambda: self.test_forced_blocks_lead("cann", (0, 0)),
            "peak": lambda: self.test_the_block_that_holds_a_peak_is_chosen("NSA-1B"),
            "aligned_faults": lambda: self.test_faulty_length_of_aligned_blocks(0, 1, 33),
            "masked_tokens": lambda: self.test_mask("jit, arrays", "TND"),
            "padding": lambda: self.test_padded_tokens("jit, arrays"),
            "faults": lambda: self.test_faulty_sequence("actual_cmp_seq_kvlen", 1, -1, ""),
        }
        with_arguments.get(test, getattr(self, f"test_{test}", None))()


def use(monkeypatch, source):
    """Makes `source` the reference implementation's module."""
    module = types.ModuleType("mutant")
    exec(compile(source, "mutant", "exec"), module.__dict__)
    monkeypatch.setattr(OPERATOR, "reference", module.compress_attention)


@pytest.mark.parametrize(("right", "wrong", "test"), MUTANTS.values(), ids=MUTANTS)
def test_mutant_is_caught(monkeypatch, right, wrong, test):
    source = with_softmax(reference)
    assert source.count(right) == 1, f"the reference no longer says {right!r}"
    use(monkeypatch, source.replace(right, wrong))
    with pytest.raises(AssertionError):
        Contract().run(test)


@pytest.mark.parametrize("test", sorted({test for _, _, test in MUTANTS.values()}))
def test_original_passes(monkeypatch, test):
    use(monkeypatch, with_softmax(reference))
    Contract().run(test)
