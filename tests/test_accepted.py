"""What the compressed branch takes: forms of arguments, and the choice of implementations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention import oracle
from compress_attention.agreement import assert_agrees
from compress_attention.arguments import ARGUMENTS, MASK, ORIGINAL, TABLE, call
from compress_attention.problems import WINDOWS

from jax_nsa import nsa_compress_attention_infer, operator


@pytest.mark.parametrize(
    "changes",
    [
        # Page ids that no position needs.
        {"block_table": np.where(np.arange(4) < [[3], [1]], TABLE, 2**30)},
        {"actual_cmp_seq_kvlen": (40, 7)},
        {"actual_cmp_seq_kvlen": [np.int64(40), jnp.int32(7)]},
        {"block_table": TABLE.tolist()},
        {"block_table": TABLE.astype(">i8")},
        {"scale_value": np.float64(0.25)},
        {"scale_value": jnp.bfloat16(0.25)},
        {"select_block_count": np.int8(4)},
        {"actual_seq_qlen": [1, 1]},
        {"actual_seq_qlen": [2, 0]},
        {"actual_sel_seq_kvlen": ORIGINAL},
        # Too short for any window.
        {"actual_cmp_seq_kvlen": [0, 7], "actual_sel_seq_kvlen": [3, 128]},
        {"atten_mask": MASK, "actual_sel_seq_kvlen": jnp.array(ORIGINAL)},
        {"implementation": ["cuda", "reference"]},
        {name: jnp.asarray(ARGUMENTS[name]) for name in ("query", "key", "value")},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_accepts(changes):
    assert_right(ARGUMENTS | changes)


@pytest.mark.parametrize("library", [np, jnp], ids=["numpy", "jax"])
@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("width", [8, 16, 32, 64])
@pytest.mark.parametrize("kind", ["int", "uint"])
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
def test_accepts_every_integer_dtype(library, x64, kind, width):
    with jax.enable_x64(x64):
        names = ("block_table", "actual_cmp_seq_kvlen")
        changes = {n: library.asarray(ARGUMENTS[n], f"{kind}{width}") for n in names}
        assert_right(ARGUMENTS | changes)


@pytest.mark.parametrize("value", [2**31, 2**32, 2**32 + 40, -(2**32) + 40, 2**63 - 1])
def test_traced_lengths_beyond_int32_stay_illegal(value):
    with jax.enable_x64(True):
        attention, indices = call(**ARGUMENTS | {"actual_cmp_seq_kvlen": jnp.array([value, 7])})
    assert np.all(np.isnan(attention[0]))
    assert np.all(np.asarray(indices)[0] == -1)
    assert np.all(np.isfinite(attention[1]))


def test_token_counts_that_sum_past_int32_claim_no_row_of_others(monkeypatch):
    rows = sequences = 2**16 + 1
    monkeypatch.setattr(
        operator.Operator, "bind", lambda self, o, **_: {"first_rows": o["first_rows"]}
    )
    ones = jnp.ones(sequences, jnp.int32)
    (first_rows,) = nsa_compress_attention_infer(
        np.zeros((rows, 1, 1), np.float32), *[np.zeros((1, 16, 1), np.float32)] * 2,
        1.0, 1, 1, 64, 1, 16, 32, 16,
        block_table=ones[:, None], actual_cmp_seq_kvlen=ones, actual_seq_qlen=rows * ones,
    )  # fmt: skip
    assert first_rows[0] == 0
    np.testing.assert_array_equal(first_rows[1:], rows)


def assert_right(arguments):
    expected = {k: v for k, v in arguments.items() if k != "implementation"}
    truth = oracle.compress_attention(**expected)
    assert_agrees(call(**arguments), truth, attention_tolerance=1e-5)


def test_windows_are_those_of_the_rules():
    """Which triples are refused, by trying all."""
    accepted = []
    for stride in range(0, 145, 16):
        for compress in range(0, 145, 16):
            for select in range(0, 145, 16):
                window = {
                    "compress_block_size": compress,
                    "compress_stride": stride,
                    "select_block_size": select,
                }
                try:
                    jax.eval_shape(lambda window=window: call(**ARGUMENTS | window))
                except ValueError:
                    continue
                accepted.append((compress, stride, select))
    assert sorted(accepted) == sorted(WINDOWS)


def test_unavailable_implementations_say_why():
    with pytest.raises(NotImplementedError) as failure:
        call(**ARGUMENTS, implementation=("cuda", "ascend"))
    message = str(failure.value)
    if jax.default_backend() == "cpu":
        assert 'implementation="cuda": it runs on platform cuda, and this program is' in message
    assert 'implementation="ascend": ' in message


@pytest.mark.parametrize(
    ("value", "error"), [("torch", ValueError), (",", ValueError), ("ascend,cuda", None)]
)
def test_environment_variable(monkeypatch, value, error):
    monkeypatch.setenv("JAX_NSA_IMPLEMENTATION", value)
    with pytest.raises(error or NotImplementedError) as failure:
        call(**ARGUMENTS, implementation=None)
    if error:
        assert "JAX_NSA_IMPLEMENTATION must name some of" in str(failure.value)


def test_environment_variable_gives_way_to_the_argument(monkeypatch):
    monkeypatch.setenv("JAX_NSA_IMPLEMENTATION", "torch")
    call(**ARGUMENTS, implementation="reference")
