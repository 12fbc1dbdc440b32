"""The examples run, and what they check of themselves holds."""

from __future__ import annotations

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_seed_call(capsys):
    attention, indices = load("seed_call").main()
    assert attention.shape == (20, 8, 128)
    assert indices.shape == (20, 2, 16)
    assert "blocks for sequence 0, key/value head 0: 0 255 256" in capsys.readouterr().out


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_decode_loop(implementation):
    # Long enough for a second page, and for sequences that joined late.
    assert load("decode_loop").main(2, 420, implementation) < 5e-3


def test_decode_loop_notices_a_wrong_selection():
    example = load("decode_loop")
    call = example.jax_nsa.nsa_compress_attention_infer

    def wrong(*arguments, **options):
        attention, blocks = call(*arguments, **options)
        return attention, blocks.at[..., 3].set(1)

    example.jax_nsa = type("jax_nsa", (), {"nsa_compress_attention_infer": staticmethod(wrong)})
    with pytest.raises(AssertionError):
        example.main(1, 600, "reference")


def test_decode_loop_takes_pages_when_they_are_needed():
    """Two sequences, the second 16 tokens late; a page holds 16 positions of 16 tokens."""
    example = load("decode_loop")
    key = np.zeros((2, example.KEY_VALUE_HEADS, example.HEAD_SIZE), jnp.bfloat16)
    value = np.zeros((2, example.KEY_VALUE_HEADS, example.VALUE_SIZE), jnp.bfloat16)
    append = jax.jit(example.append)
    cache = example.empty_cache(2)
    taken = {}
    for step in range(1, 321):
        cache = append(cache, key, value, np.array([True, step > 16]))
        taken[step] = int(cache.pages_taken)
    assert [taken[s] for s in (31, 32, 47, 48, 287, 288, 303, 304)] == [0, 1, 1, 2, 2, 3, 3, 4]
    np.testing.assert_array_equal(cache.block_table, [[0, 2, -1, -1], [1, 3, -1, -1]])
    np.testing.assert_array_equal(cache.tokens, [320, 304])
    np.testing.assert_array_equal(cache.lengths, [19, 18])


def test_decode_loop_notices_a_wrong_page(monkeypatch):
    example = load("decode_loop")
    append = example.append

    def wrong(cache, *token):
        grown = append(cache, *token)
        return grown._replace(key_pages=grown.key_pages.at[0, 3].set(1))

    monkeypatch.setattr(example, "append", wrong)
    with pytest.raises(AssertionError):
        example.main(1, 200, "reference")


def test_speculative(capsys):
    load("speculative").main()
    assert capsys.readouterr().out.count("same answer as alone") == 9


def test_speculative_notices_a_missing_mask(monkeypatch):
    example = load("speculative")
    attend = example.attend
    monkeypatch.setattr(example, "attend", lambda *a, atten_mask=None, **k: attend(*a, **k))
    with pytest.raises(AssertionError):
        example.main()


def test_block_importance(tmp_path):
    pytest.importorskip("matplotlib", reason="install the extra: pip install '.[examples]'")
    picture = tmp_path / "picture.png"
    load("block_importance").main(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_sharded(capsys):
    load("sharded").main()
    printed = capsys.readouterr().out
    assert "4 devices: 1 parts of the sequences, 4 of the heads" in printed
    assert "collectives in the compiled step: 0" in printed
    assert "the same bits as on one device" in printed
