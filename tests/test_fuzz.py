"""A while of fuzzing; the seed is printed, and another one the next time."""

import secrets
import time

import pytest
from fuzz import faulty, illegal, legal
from fuzz.__main__ import run

from jax_nsa import native

SECONDS = 6
LEGAL, ILLEGAL, FAULTY = 0, 2, 36  # seeds that give such calls


@pytest.mark.parametrize("operator", legal.OPERATORS)
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_fuzz(operator, implementation):
    needed = "compress_attention" if operator in ("step", "cache") else operator
    if implementation == "cpu" and native.unavailable("cpu", needed):
        pytest.skip(native.unavailable("cpu", needed))
    if operator == "cache" and implementation == "reference":
        pytest.skip("the cache takes what there is")
    first = secrets.randbits(30)
    print(f"seeds from {first}")
    end = time.monotonic() + SECONDS
    done = 0
    while time.monotonic() < end or not done:
        run(first + done, [operator], [implementation])
        done += 1


def test_a_seed_means_a_problem():
    told = [run(5, ["select_attention"], ["reference"]) for _ in range(2)]
    assert told[0] == told[1]


def test_notices_a_wrong_number(monkeypatch):
    compute = legal.SelectAttentionContract.call

    def wrong(*arguments, **options):
        return tuple(r * 1.1 + 0.1 for r in compute(*arguments, **options))

    monkeypatch.setattr(legal.SelectAttentionContract, "call", wrong)
    with pytest.raises(AssertionError) as caught:
        run(LEGAL, ["select_attention"], ["reference"])
    assert f"again: python -m fuzz --seed {LEGAL} --only" in caught.value.__notes__[-1]


def test_notices_what_is_not_refused(monkeypatch):
    monkeypatch.setattr(illegal.OPERATORS["compress"].contract, "apply", lambda *_: None)
    with pytest.raises(AssertionError, match="was not refused"):
        run(ILLEGAL, ["compress"], ["reference"])


def test_notices_a_fault_that_passes(monkeypatch):
    monkeypatch.setattr(faulty, "_faults", lambda *_: [("actual_seq_len", (0,), 0, 0)])
    with pytest.raises(AssertionError, match="was not refused"):
        run(FAULTY, ["compress"], ["cpu"])


def test_names_are_whole_words():
    assert illegal.names("actual_seq_kvlen[2] must be", "actual_seq_kvlen")
    assert not illegal.names("actual_seq_kvlen[2] must be", "actual_seq")
    assert not illegal.names("key_value_head_num must be", "head_num")
