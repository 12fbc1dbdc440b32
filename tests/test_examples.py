"""The examples run, and what they check of themselves holds."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pathlib
import sys
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


def test_alignment(tmp_path):
    """The one rule chooses the block that holds the passage, the other the block before it."""
    pytest.importorskip("matplotlib", reason="install the extra: pip install '.[examples]'")
    example = load("alignment")
    chosen = example.main(tmp_path / "picture.svg")
    assert "<svg" in (tmp_path / "picture.svg").read_text()
    for blocks in example.GEOMETRIES:
        holds_passage = example.PASSAGE.start // blocks.select_block_size
        assert chosen[blocks, "aligned"] == holds_passage
        assert chosen[blocks, "cann"] == holds_passage - 1


def test_sharded(capsys):
    load("sharded").main()
    printed = capsys.readouterr().out
    assert "4 devices: 1 parts of the sequences, 4 of the heads" in printed
    assert "collectives in the compiled step: 0" in printed
    assert "the same bits as on one device" in printed


def test_model(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="install the extra: pip install '.[examples]'")
    picture = tmp_path / "picture.png"
    assert load("model").main(steps=2, new=20, picture=picture) < 1e-4
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "step    2 of 2" in printed
    assert "greedy bytes are those of the training forward" in printed


def test_model_tells_of_a_missing_matplotlib(capsys, monkeypatch, tmp_path):
    example = load("model")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    example.draw(example.init(), example.sources()[:40], tmp_path / "picture.png")
    assert "pip install 'jax_nsa[examples]'" in capsys.readouterr().out


def test_model_notices_another_attention(monkeypatch):
    example = load("model")
    step = example.nsa_decode_step
    monkeypatch.setattr(
        example, "nsa_decode_step", lambda *a, **o: step(*a, **{**o, "window_size": 16})
    )
    text = example.sources()
    with pytest.raises(AssertionError):
        example.check(example.init(), [text[:100], text[:30]], 5)


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)  # it imports its neighbour
    yield importlib.import_module("serve")
    for name in ("serve", "model"):
        sys.modules.pop(name)


def test_serve_makes_place(serve, capsys):
    server = serve.main(requests=8, slots=3, pages=20)
    assert server.preempted > 0
    assert server.traces == {"join": 1, "step": 1, "cut": 1}
    assert "all texts are the training forward's" in capsys.readouterr().out


def test_serve_displaces_none_that_has_finished(serve, monkeypatch):
    """The first runs out of pages in the step in which the second writes its last byte."""
    text = serve.model.sources()
    requests = [
        serve.Request(text[:31].tolist(), 60, 0),
        serve.Request(text[100:105].tolist(), 24, 0),
    ]
    monkeypatch.setattr(serve, "arrivals", lambda _: [*requests])
    serve.main(requests=2, slots=2, pages=5)
    assert [len(request.tokens) for request in requests] == [60, 24]


def test_serve_writes_the_same_with_drafts(serve):
    server = serve.main(requests=3, slots=2, pages=40, speculate=4)
    assert server.preempted == 0
    assert server.traces == {"join": 1, "step": 1, "cut": 1}
