"""The contracts of the step's other operators can fail: each wrong formula turns a test red."""

import inspect
import types
from dataclasses import replace

import pytest
from compress.calls import COUNTED
from compress.contract import CompressContract
from references import joined, with_softmax
from select_attention.contract import USUAL, SelectAttentionContract

import jax_nsa.compress.door
import jax_nsa.select_attention.door
from jax_nsa.compress import window
from jax_nsa.compress.reference import compress
from jax_nsa.select_attention.reference import select_attention

# What goes wrong, the right text and the wrong one, and the contract's test that must notice.
SELECT_MUTANTS = {
    "ids of the first head for all": (
        '.reshape(-1, heads, operands["topk_indices"].shape[-1])',
        '.reshape(-1, heads, operands["topk_indices"].shape[-1])[:, :1].repeat(heads, 1)',
        "every_head_has_its_own_ids",
    ),
    "-1 is block 0": (
        "known = (blocks >= 0) & (blocks < -(-capacity // size))",
        "known = blocks < -(-capacity // size)",
        "none_chosen",
    ),
    "an id listed twice counts once": (
        "positions = _positions_of_blocks(blocks, size, capacity)",
        "positions = _positions_of_blocks(jnp.where(jnp.any(jnp.tril(blocks[..., :, None] == "
        "blocks[..., None, :], -1), -1), -1, blocks), size, capacity)",
        "listed_twice",
    ),
    "the first tokens see the last": (
        "length - (count - token))",
        "length - 1)",
        "blocks_wholly_past_a_token",
    ),
    "the current token unseen": (
        '"limit": jnp.clip(newest + 1, 0, capacity)',
        '"limit": jnp.clip(newest, 0, capacity)',
        "usual",
    ),
    "positions past the limit of a chosen block": (
        'reads["attention"] = jnp.where(positions < limit, positions, capacity)',
        'reads["attention"] = positions',
        "usual",
    ),
    "a window of one more": (
        "problem.window_size + 1, 0, limit)",
        "problem.window_size, 0, limit)",
        "usual",
    ),
    "a window without the current token": (
        "jnp.where(after < limit - start, start + after, capacity)",
        "jnp.where(after < limit - start - 1, start + after, capacity)",
        "usual",
    ),
    "garbage that is not read is not cleared": (
        "jnp.where(is_read[..., None], taken.astype(jnp.float32), 0.0)",
        "taken.astype(jnp.float32)",
        "garbage",
    ),
    "unscaled": ("problem.scale * jnp.einsum", "jnp.einsum", "usual"),
    "heads of a group interleaved": (
        "query.reshape(-1, heads, query.shape[-2] // heads, query.shape[-1])",
        "query.reshape(-1, query.shape[-2] // heads, heads, query.shape[-1]).swapaxes(1, 2)",
        "usual",
    ),
    "lse to base 2": ("peak + jnp.log(", "peak + jnp.log2(", "usual"),
    "an empty row's lse is 0": ("jnp.where(empty, -jnp.inf,", "jnp.where(empty, 0.0,", "short"),
    "probabilities rounded to bfloat16": (
        "return weights / total",
        "return weights.astype(jnp.bfloat16).astype(jnp.float32) / total",
        "usual",
    ),
    "rows of a page in the next page": ("positions // page", "(positions + 1) // page", "usual"),
    "bad ids attended to": ("bad = bad | (jnp.any(is_bad", "bad = bad | False & (jnp.any(is_bad",
                            "bad_id"),
    "bad lengths attended to": (
        "bad = bad | (lengths < 0) | (lengths > capacity)",
        "pass",
        "lengths_past_the_block_table",
    ),
    "a bad id spoils every head": (
        "jnp.any(is_bad, axis=-1)",
        "jnp.any(is_bad, axis=(-1, -2))[:, None]",
        "bad_id",
    ),
}  # fmt: skip

COMPRESS_MUTANTS = {
    "windows of the last token only": (
        "size + position * stride > lengths - counts",
        "(size + position * stride == lengths) & (counts > 0)",
        "a_step_passes_over_no_window",
    ),
    "a token too many looked at": (
        "size + position * stride > lengths - counts",
        "size + position * stride >= lengths - counts",
        "a_step_passes_over_no_window",
    ),
    "windows before the first": (
        "(lengths >= size) &",
        "",
        "no_window_ends_before_the_first_one",
    ),
    "windows one token late": ("position * stride, position)", "position * stride + 1, position)",
                               "usual"),
    "weights reversed": ('"blhd,lh->bhd",\n            tokens.',
                         '"blhd,lh->bhd",\n            tokens[:, ::-1].', "usual"),
    "weights of the first head": (
        'operands[f"weight_{i}"].astype(jnp.float32)',
        'operands[f"weight_{i}"].astype(jnp.float32)[:, :1].repeat(tokens.shape[2], 1)',
        "usual",
    ),
    "no bias": ('if f"bias_{i}" in operands', "if False", "usual"),
    "the last row written for what is skipped": (
        "row = jnp.where(writes, slots, rows)",
        "row = jnp.where(writes, slots, -1)",
        "usual",
    ),
    "rows for two written": ("& (times_named[slot] == 1)", "", "a_row_for_two"),
    "a sequence without a window claims its row": (
        "slot = jnp.where(named, slots, rows)",
        "slot = jnp.where((slots >= 0) & (slots < rows), slots, rows)",
        "a_row_for_three_of_which_one_has_no_window",
    ),
    "bad pages read": (" & has_pages", "", "bad_page"),
    "bad lengths complete": (
        "legal = (lengths >= 0) & (lengths <= block_table.shape[1] * page)",
        "legal = lengths >= 0",
        "bad_length",
    ),
    "bad counts complete": (
        "legal &= (counts >= 0) & (counts <= problem.compress_stride)",
        "legal &= counts >= 0",
        "bad_count",
    ),
    "accumulated in bfloat16": (
        "tokens.astype(jnp.float32)",
        "tokens.astype(jnp.bfloat16).astype(jnp.float32)",
        "usual",
    ),
    "values into the cache of keys": (
        "cache = by_row[i]\n",
        "cache = by_row[i] + (i == 0) * 1\n",
        "usual",
    ),
}  # fmt: skip


class Select(SelectAttentionContract):
    """The contract with each call compiled anew, so that none meets another mutant's program."""

    implementation = "reference"

    def call(self, arguments, form="jit, arrays", **options):
        del form
        return super().call(arguments, "jit, arrays", **options)

    def run(self, test):
        """Runs one of the contract's tests by name."""
        named = {
            "usual": lambda: self.check(replace(USUAL, return_lse=True), "jit, arrays"),
            "none_chosen": lambda: self.test_ids([0, -1, 2]),
            "listed_twice": lambda: self.test_ids([2, 2, 0]),
            "short": lambda: self.test_short_sequences((0, 5)),
            "bad_id": lambda: self.test_faults("topk_indices", (1, 1, 2), 2, ""),
            "garbage": lambda: [self.check(replace(USUAL, seed=seed)) for seed in range(10)],
        }
        named.get(test, getattr(self, f"test_{test}", None))()


class Compress(CompressContract):
    """Likewise."""

    implementation = "reference"

    def call(self, arguments, form="jit, arrays", **options):
        del form
        return super().call(arguments, "jit, arrays", **options)

    def run(self, test):
        """Runs one of the contract's tests by name."""
        named = {
            "usual": lambda: self.test_forms("jit, arrays", COUNTED),
            "bad_page": lambda: self.test_faults("block_table", (2, 4), 17, "", False),
            "bad_length": lambda: self.test_faults("actual_seq_len", 2, 113, "", False),
            "bad_count": lambda: self.test_faults("actual_seq_qlen", 2, 17, "", False),
        }
        named.get(test, getattr(self, f"test_{test}", None))()


CONTRACTS = {
    "select_attention": (Select, SELECT_MUTANTS, jax_nsa.select_attention.door.OPERATOR),
    "compress": (Compress, COMPRESS_MUTANTS, jax_nsa.compress.door.OPERATOR),
}
CASES = [(name, mutant) for name, (_, mutants, _) in CONTRACTS.items() for mutant in mutants]


def source_of(operator):
    """The reference's source; for compression, with the module that finds the windows in it."""
    if operator == "select_attention":
        return with_softmax(inspect.getmodule(inspect.unwrap(select_attention)))
    imported = "from jax_nsa.compress.window import gather_window, last_window, pages_of\n"
    return joined(window, inspect.getmodule(inspect.unwrap(compress)), without=imported)


def use(monkeypatch, operator, source):
    """Makes `source` the operator's reference."""
    module = types.ModuleType("mutant")
    exec(compile(source, "mutant", "exec"), module.__dict__)
    reference = getattr(module, operator)
    monkeypatch.setattr(CONTRACTS[operator][2], "reference", reference)


@pytest.mark.parametrize(("operator", "mutant"), CASES, ids=[": ".join(case) for case in CASES])
def test_mutant_is_caught(monkeypatch, operator, mutant):
    contract, mutants, _ = CONTRACTS[operator]
    right, wrong, test = mutants[mutant]
    source = source_of(operator)
    assert source.count(right) == 1, f"the reference no longer says {right!r}"
    use(monkeypatch, operator, source.replace(right, wrong))
    with pytest.raises(AssertionError):
        contract().run(test)


@pytest.mark.parametrize("operator", CONTRACTS)
def test_original_passes(monkeypatch, operator):
    contract, mutants, _ = CONTRACTS[operator]
    use(monkeypatch, operator, source_of(operator))
    for test in sorted({test for _, _, test in mutants.values()}):
        contract().run(test)
