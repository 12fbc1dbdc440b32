"""`python -m jax_nsa` says who agrees, and its exit status can say no."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jax_nsa import backends, doctor
from jax_nsa.backends import reference


@pytest.fixture(scope="module")
def truth():
    return doctor.find_truth(doctor.seed_operands())


class Impostor:
    """The reference with its results spoilt."""

    PLATFORMS = None
    DEFAULT_PLATFORMS = ()

    def __init__(self, name, spoil):
        self.NAME = name
        self._spoil = spoil

    def register(self):
        pass

    def unavailable(self, operator, platform):
        return None

    def refuses(self, call, platform):
        return None

    def configuration(self, call):
        return {}

    def compute(self, call, *operands):
        return self._spoil(*reference.compute(call, *operands))


def explode(*_):
    raise RuntimeError("out of paper\nand a long trace")


def test_succeeds_when_all_agree(monkeypatch, capsys):
    monkeypatch.setattr(backends, "ALL", {"reference": reference})
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    assert "All is well." in printed
    assert "640/640 indices equal" in printed
    assert "of 257 blocks of 64 tokens" in printed


@pytest.mark.parametrize(
    ("name", "spoil", "says"),
    [
        ("attention_off", lambda a, i: [a * jnp.bfloat16(1.05), i], "DISAGREES"),
        ("attention_nan", lambda a, i: [a.at[3, 0, 1, 5].set(jnp.nan), i], "DISAGREES"),
        ("one_row_off", lambda a, i: [a.at[-1].set(a[0]), i], "DISAGREES"),
        ("one_index_off", lambda a, i: [a, i.at[7, 0, 1, 9].add(1)], "1 WRONG"),
        ("forced_swapped", lambda a, i: [a, i[..., [0, 2, 1, *range(3, 16)]]], "80 WRONG"),
        ("index_repeated", lambda a, i: [a, i.at[0, 0, 0, 15].set(i[0, 0, 0, 14])], "1 WRONG"),
        ("index_outside", lambda a, i: [a, i.at[0, 0, 0, 15].set(-1)], "1 WRONG"),
        ("raises", explode, "FAILED: RuntimeError: out of paper\n"),
    ],
)
def test_fails_when_an_implementation_is_wrong(monkeypatch, capsys, name, spoil, says):
    impostor = Impostor(name, spoil)
    monkeypatch.setattr(backends, "ALL", {"reference": reference, name: impostor})
    assert doctor.main() == 1
    printed = capsys.readouterr().out
    assert says in printed
    assert f"Not well: {name}." in printed


def test_fails_when_the_implementation_asked_for_is_not_here(monkeypatch, capsys):
    absent = Impostor("absent", None)
    absent.unavailable = lambda operator, platform: "buy one"
    monkeypatch.setattr(backends, "ALL", {"absent": absent, "reference": reference})
    monkeypatch.setenv(backends.IMPLEMENTATION_VARIABLE, "absent")
    assert doctor.main() == 1
    printed = capsys.readouterr().out
    assert "not here: buy one" in printed
    assert "None of absent can run here." in printed


def test_a_swap_within_a_tie_is_no_error(truth):
    importance = truth.importance.copy()
    first, second = truth.indices[0, 0, 5:7]
    importance[0, 0, second] = importance[0, 0, first] * (1 + 1e-6)
    tied = doctor.Truth(truth.attention, truth.indices, importance)
    swapped = truth.indices.copy()
    swapped[0, 0, 5:7] = second, first
    agreement = doctor.compare(tied, truth.attention, swapped)
    assert agreement.holds
    assert (agreement.exact, agreement.tied) == (638, 2)


def test_a_swap_of_different_importances_is_an_error(truth):
    importance = truth.importance.copy()
    first, second = truth.indices[0, 0, 5:7]
    importance[0, 0, second] = importance[0, 0, first] * 0.99
    apart = doctor.Truth(truth.attention, truth.indices, importance)
    swapped = truth.indices.copy()
    swapped[0, 0, 5:7] = second, first
    assert not doctor.compare(apart, truth.attention, swapped).holds


def test_the_reference_is_the_mathematics(truth):
    """One head of the yardstick itself, in float64 and from the definition."""
    query, key, value, table, _ = (
        np.asarray(x, np.float64 if x.dtype == jnp.bfloat16 else None)
        for x in doctor.seed_operands()
    )
    b, h = 4, 1
    keys = key[table[b]].reshape(doctor.LENGTH, 2, 192)[:, h]
    values = value[table[b]].reshape(doctor.LENGTH, 2, 128)[:, h]
    importance = np.zeros(257)
    for head in range(4 * h, 4 * h + 4):
        weights = np.exp(keys @ query[b, head] - (keys @ query[b, head]).max())
        weights /= weights.sum()
        np.testing.assert_allclose(truth.attention[b, head], weights @ values, atol=1e-4)
        for j in range(257):
            for offset, factor in zip(range(5), (1, 2, 2, 2, 1), strict=True):
                if 4 * j + offset < doctor.LENGTH:
                    importance[j] += factor * weights[4 * j + offset]
    importance[[0, -2, -1]] = np.inf
    np.testing.assert_allclose(truth.importance[b, h], importance, rtol=1e-3, atol=1e-30)


def test_this_machine_is_well():
    report = subprocess.run(
        [sys.executable, "-m", "jax_nsa"], capture_output=True, text=True, timeout=120
    )
    assert report.returncode == 0, report.stdout + report.stderr
