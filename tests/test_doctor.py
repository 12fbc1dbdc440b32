"""`python -m jax_nsa` says who agrees, and its exit status can say no."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_nsa import backends, doctor, native, trial
from jax_nsa.backends import cpu, reference

# The reference is right, too, and takes XLA seconds to compile.
ON_CPU = jax.default_backend() == "cpu" and native.unavailable("cpu", "compress") is None
HONEST = cpu if ON_CPU else reference


@pytest.fixture(scope="module")
def truth():
    return trial.make()[1]


class Impostor:
    """An honest implementation with one operator's results spoilt."""

    PLATFORMS = None
    DEFAULT_PLATFORMS = ()

    def __init__(self, name, target, spoil):
        self.NAME = name
        self._target = target
        self._spoil = spoil

    def unavailable(self, operator, platform):
        return None

    def refuses(self, call, platform):
        return None

    def configuration(self, call):
        return {}

    def compute(self, call, *operands):
        results = HONEST.compute(call, *operands)
        return self._spoil(*results) if call.operator.target == self._target else results


def explode(*_):
    raise RuntimeError("out of paper\nand a long trace")


def test_succeeds_when_all_agree(monkeypatch, capsys):
    monkeypatch.setattr(backends, "ALL", {"reference": reference})
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    assert "All is well." in printed
    # Of the compressed branch by either rule, and of the step.
    assert printed.count("128/128 blocks equal") == 3
    assert printed.count("agrees") == 5
    assert "of 64 blocks of 64 tokens" in printed


@pytest.mark.parametrize(
    ("target", "spoil", "says"),
    [
        ("compress_attention", lambda a, i: [a * jnp.bfloat16(1.05), i], "DISAGREES"),
        ("compress_attention", lambda a, i: [a.at[3, 0, 1, 5].set(jnp.nan), i], "within nan"),
        ("compress_attention", lambda a, i: [a.at[-1].set(a[0]), i], "DISAGREES"),
        ("compress_attention", lambda a, i: [a, i.at[2, 0, 1, 9].add(1)], "1 WRONG"),
        ("compress_attention", lambda a, i: [a, i[..., [0, 2, 1, *range(3, 16)]]], "16 WRONG"),
        (
            "compress_attention",
            lambda a, i: [a, i.at[0, 0, 0, 15].set(i[0, 0, 0, 14])],
            "1 WRONG",
        ),
        ("compress_attention", lambda a, i: [a, i.at[0, 0, 0, 15].set(-1)], "1 WRONG"),
        ("compress_attention", explode, "FAILED: RuntimeError: out of paper\n"),
        ("select_attention", lambda a, w: [w, a], "selected, window: DISAGREES"),
        ("select_attention", lambda a, w: [a, w * jnp.bfloat16(1.05)], "DISAGREES"),
        ("compress", lambda k, v: [k, v.at[:, -2].multiply(1.05)], "compress: DISAGREES"),
        ("compress", lambda k, v: [k.at[0, 0].add(1), v], "compress: DISAGREES"),
    ],
)
def test_fails_when_an_operator_is_wrong(monkeypatch, capsys, target, spoil, says):
    impostor = Impostor("impostor", target, spoil)
    monkeypatch.setattr(backends, "ALL", {"impostor": impostor})
    monkeypatch.setenv(backends.IMPLEMENTATION_VARIABLE, "impostor")
    assert doctor.main() == 1
    printed = capsys.readouterr().out
    assert says in printed
    assert "Not well: impostor" in printed


def test_fails_when_the_implementation_asked_for_is_not_here(monkeypatch, capsys):
    absent = Impostor("absent", "", None)
    absent.unavailable = lambda operator, platform: "buy one"
    monkeypatch.setattr(backends, "ALL", {"absent": absent, "reference": reference})
    monkeypatch.setenv(backends.IMPLEMENTATION_VARIABLE, "absent")
    assert doctor.main() == 1
    printed = capsys.readouterr().out
    assert "not here: buy one" in printed
    assert "None of absent can run here." in printed


def test_fails_when_nothing_has_the_name_asked_for(monkeypatch, capsys):
    monkeypatch.setenv(backends.IMPLEMENTATION_VARIABLE, "cup")
    assert doctor.main() == 1
    assert "JAX_NSA_IMPLEMENTATION must name some of" in capsys.readouterr().out


def test_an_implementation_of_some_operators_is_tried_on_these(monkeypatch, capsys):
    some = Impostor("some", "", None)
    some.unavailable = lambda operator, platform: (
        None if operator.target == "select_attention" else "not written"
    )
    monkeypatch.setattr(backends, "ALL", {"some": some})
    monkeypatch.setenv(backends.IMPLEMENTATION_VARIABLE, "some")
    assert doctor.main() == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "not here for compress, compress_attention: not written" in printed
    assert "some selected, window: agrees" in printed
    assert "the whole step" not in printed


def test_what_an_implementation_refuses_is_no_failure(monkeypatch, capsys):
    limited = Impostor("limited", "", None)
    limited.refuses = lambda call, platform: (
        "two heads are too many" if call.operator.target == "select_attention" else None
    )
    monkeypatch.setattr(backends, "ALL", {"limited": limited})
    monkeypatch.setenv(backends.IMPLEMENTATION_VARIABLE, "limited")
    assert doctor.main() == 0
    printed = " ".join(capsys.readouterr().out.split())
    for title in ("selected, window", "the whole step"):
        told = f'limited {title}: not served: implementation="limited": two heads are too many'
        assert told in printed


@pytest.mark.parametrize(
    ("platform", "driver", "compiled", "says"),
    [
        ("cuda", True, ["cpu"], "compiled without CUDA kernels"),
        ("cpu", True, ["cpu", "cuda"], "JAX sees no GPU"),
        ("cuda", True, ["cpu", "cuda"], None),
        ("cpu", False, ["cpu"], None),
    ],
)
def test_says_what_keeps_a_gpu_idle(monkeypatch, tmp_path, platform, driver, compiled, says):
    version = tmp_path / "version"
    if driver:
        version.touch()
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", str(version))
    monkeypatch.setattr(native, "compiled", lambda: compiled)
    advice = doctor._advice(platform)
    assert advice[-1] == f"compiled kernels: {', '.join(compiled)}"
    assert len(advice) == (2 if says else 1)
    assert says is None or says in advice[0]


def judged(truth, chosen, importance):
    changed = trial.dataclasses.replace(truth, importance=importance)
    parts = np.stack(changed.branches(chosen), -1)
    return changed.judge_step((parts * truth.gates[..., None, :]).sum(-1), chosen)


def test_the_rules_choose_different_blocks(truth):
    aligned = trial.dataclasses.replace(truth, importance=truth.aligned_importance)
    assert (aligned.chosen != truth.chosen).any(-1).all()
    assert not aligned.judge_attend(truth.attention, truth.chosen).holds


@pytest.mark.parametrize(("factor", "holds"), [(1 + 1e-6, True), (0.99, False)])
def test_only_a_swap_within_a_tie_is_no_error(truth, factor, holds):
    importance = truth.importance.copy()
    first, second = truth.chosen[0, 0, 5:7]
    importance[0, 0, second] = importance[0, 0, first] * factor
    swapped = truth.chosen.copy()
    swapped[0, 0, 5:7] = (second, first) if factor < 1 else (first, second)
    agreement = judged(truth, swapped, importance)
    assert agreement.holds is holds
    assert agreement.exact == 126
    assert agreement.tied == (2 if holds else 0)


def test_this_machine_is_well():
    report = subprocess.run(
        [sys.executable, "-m", "jax_nsa"], capture_output=True, text=True, timeout=120
    )
    assert report.returncode == 0, report.stdout + report.stderr
