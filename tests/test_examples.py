"""The examples run, and what they check of themselves holds."""

from __future__ import annotations

import functools
import importlib.util
import pathlib
from dataclasses import replace

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


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_decode_loop(implementation):
    # Long enough for a second page, and for sequences that joined late.
    assert load("decode_loop").main(2, 420, implementation) < 1e-4


def test_decode_loop_notices_a_wrong_selection(monkeypatch):
    example = load("decode_loop")
    wrong = functools.partial(example.nsa_decode_step, local_blocks=1)
    monkeypatch.setattr(example, "nsa_decode_step", wrong)
    with pytest.raises(AssertionError):
        example.main(1, 420)


def test_decode_loop_notices_a_wrong_page(monkeypatch):
    example = load("decode_loop")
    step = example.decode_step

    def wrong(*arguments, **options):
        (tables, pools), attention = step(*arguments, **options)
        return (tables, replace(pools, key=pools.key.at[3, 5].set(1))), attention

    monkeypatch.setattr(example, "decode_step", wrong)
    with pytest.raises(AssertionError):
        example.main(1, 200)


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
