"""The examples run, and what they check of themselves holds."""

from __future__ import annotations

import importlib.util
import pathlib

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


def test_speculative(capsys):
    load("speculative").main()
    assert capsys.readouterr().out.count("same answer as alone") == 9


def test_block_importance(tmp_path):
    pytest.importorskip("matplotlib", reason="install the extra: pip install '.[examples]'")
    picture = tmp_path / "picture.png"
    load("block_importance").main(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
