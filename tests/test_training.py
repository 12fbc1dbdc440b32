"""Training agrees with decoding: row t is what the step gives on the caches of t + 1 tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import cpu_or_reference

from jax_nsa import PagedKV, nsa_attention, nsa_compress, nsa_decode_step
from jax_nsa.blocks import Blocks

PAGE, HEADS, KEY_VALUE_HEADS, HEAD_SIZE, VALUE_SIZE = 16, 4, 2, 16, 8
IMPLEMENTATIONS = cpu_or_reference("compress_attention", "select_attention")
SETTINGS = {
    "cann": {"importance": "cann"},
    "fla": {"importance": "aligned", "init_blocks": 1, "local_blocks": 2},
    "NSA-1B": {"importance": "aligned", "init_blocks": 0, "local_blocks": 1},
}
GEOMETRIES = [(32, 16, 64), (16, 16, 16), (48, 32, 64)]


def sequences(tokens, geometry, batch=2, seed=0):
    """Queries, keys and values of whole sequences, and what their windows compress to."""
    random = np.random.default_rng(seed)
    blocks = Blocks(*geometry)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    key = normal(batch, tokens, KEY_VALUE_HEADS, HEAD_SIZE)
    value = normal(batch, tokens, KEY_VALUE_HEADS, VALUE_SIZE)
    weight = normal(blocks.compress_block_size, KEY_VALUE_HEADS) / 5

    def compress(array):
        sizes = blocks.compress_block_size, blocks.compress_stride
        return jnp.stack([nsa_compress(a, weight, *sizes) for a in array])

    return {
        "query": normal(batch, tokens, HEADS, HEAD_SIZE),
        "key": key,
        "value": value,
        "compressed_key": compress(key),
        "compressed_value": compress(value),
        "gates": jax.nn.sigmoid(normal(batch, tokens, HEADS, 3)),
    }


def options(geometry, **setting):
    block, stride, select = geometry
    return {
        "scale_value": 0.25, "compress_block_size": block, "compress_stride": stride,
        "select_block_size": select, "select_block_count": 3, "window_size": 20, **setting,
    }  # fmt: skip


def paged(key, value, length):
    """A cache of one sequence with all its tokens, and a length that is less."""
    pages = -(-max(key.shape[0], 1) // PAGE)
    pools = []
    for array in (key, value):
        padded = np.full((pages * PAGE, *array.shape[1:]), np.nan, np.float32)
        padded[: len(array)] = array
        padded[length:] = np.nan
        pools.append(jnp.asarray(padded.reshape(pages, PAGE, -1)))
    table = jnp.arange(pages, dtype=jnp.int32)[None]
    return PagedKV(*pools, table, jnp.array([length], jnp.int32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_each_row_is_a_decode_step(implementation, geometry, setting):
    tokens = 150
    arrays = sequences(tokens, geometry, batch=1)
    chosen_by = options(geometry, **SETTINGS[setting])
    attention, blocks = nsa_attention(**arrays, **chosen_by, return_blocks=True, chunk_size=40)
    step = jax.jit(
        lambda query, gates, compressed, selected: nsa_decode_step(
            query, gates, compressed, selected, head_num=HEADS,
            key_value_head_num=KEY_VALUE_HEADS, implementation=implementation, **chosen_by,
        )
    )  # fmt: skip
    one = {name: np.asarray(array[0]) for name, array in arrays.items()}
    for t in range(tokens):
        compressed = int(Blocks(*geometry).compressed_length(t + 1))
        decoded, indices = step(
            arrays["query"][0, t : t + 1],
            arrays["gates"][0, t : t + 1],
            paged(one["compressed_key"], one["compressed_value"], compressed),
            paged(one["key"], one["value"], t + 1),
        )
        np.testing.assert_array_equal(indices[0], blocks[0, t], err_msg=f"token {t}")
        np.testing.assert_allclose(
            decoded[0], attention[0, t], rtol=1e-4, atol=1e-5, err_msg=f"token {t}"
        )


@pytest.mark.parametrize("tokens", [1, 31, 33, 100])
def test_chunks_do_not_matter(tokens):
    geometry = (32, 16, 64)
    arrays = sequences(tokens, geometry)
    whole = nsa_attention(**arrays, **options(geometry), chunk_size=tokens)
    for chunk_size in (1, 7, 64, 1000):
        parts = nsa_attention(**arrays, **options(geometry), chunk_size=chunk_size)
        np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("setting", SETTINGS)
def test_gradients_are_those_of_small_steps(setting):
    geometry = (16, 16, 16)
    arrays = sequences(70, geometry, batch=1)

    def loss(arrays):
        return jnp.sum(nsa_attention(**arrays, **options(geometry, **SETTINGS[setting])) ** 2)

    loss = jax.jit(loss)
    gradients = jax.jit(jax.grad(loss))(arrays)
    # Those that decide which blocks are chosen would make another choice somewhere.
    for name in ("key", "value", "compressed_value", "gates"):
        gradient = gradients[name]
        direction = jnp.asarray(np.random.default_rng(1).normal(size=gradient.shape), jnp.float32)
        small = 1e-2

        def moved(sign, name=name, direction=direction, small=small):
            return loss(arrays | {name: arrays[name] + sign * small * direction})

        slope = float((moved(1) - moved(-1)) / (2 * small))
        expected = float(jnp.vdot(gradient, direction))
        assert slope == pytest.approx(expected, rel=0.02, abs=0.1), name


def test_a_branch_without_positions_adds_nothing_whatever_its_gate():
    geometry = (32, 16, 64)
    arrays = sequences(100, geometry)
    right = nsa_attention(**arrays, **options(geometry))
    before_a_window = arrays["gates"].at[:, : geometry[0] - 1, :, 0].set(jnp.nan)
    np.testing.assert_array_equal(
        nsa_attention(**arrays | {"gates": before_a_window}, **options(geometry)), right
    )


@pytest.mark.parametrize("name", ["key", "value", "compressed_key", "compressed_value"])
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_what_a_row_does_not_see_may_be_anything(name, garbage):
    geometry = (16, 16, 16)
    arrays = sequences(70, geometry)
    right = nsa_attention(**arrays, **options(geometry))
    first = 40 if name in ("key", "value") else 3  # the window of tokens 48 to 63
    rows = slice(None, 40 if first == 40 else 63)
    spoiled = arrays | {name: arrays[name].at[:, first:].set(garbage)}
    got = nsa_attention(**spoiled, **options(geometry))
    np.testing.assert_array_equal(got[:, rows], right[:, rows])
    assert np.all(np.isnan(np.asarray(got)[:, rows.stop]))


def test_a_planted_peak_selects_the_block_that_holds_it():
    geometry = (16, 16, 16)
    arrays = sequences(640, geometry, batch=1)
    arrays["compressed_key"] = jnp.zeros_like(arrays["compressed_key"]).at[:, 20].set(3.0)
    arrays["query"] = jnp.ones_like(arrays["query"])
    for setting, block in (("fla", 20), ("NSA-1B", 20), ("cann", 19)):
        forced = 1 if setting == "NSA-1B" else 3
        _, chosen = nsa_attention(
            **arrays,
            **options(geometry, **SETTINGS[setting]) | {"select_block_count": forced + 1},
            return_blocks=True,
        )
        assert np.all(np.asarray(chosen)[0, -1, :, forced] == block), setting


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_compress_is_its_definition(dtype):
    random = np.random.default_rng(3)
    ends, size, stride = [40, 40, 107, 110], 32, 16
    tokens = jnp.asarray(random.normal(size=(110, 3, 5)), dtype)
    weight = jnp.asarray(random.normal(size=(size, 3)), jnp.float32)
    bias = jnp.asarray(random.normal(size=(3, 5)), dtype)
    windows = nsa_compress(tokens, weight, size, stride, actual_seq_len=ends, bias=bias)
    expected, begin = [], 0
    for end in ends:
        first = begin
        while first + size <= end:
            part = np.asarray(tokens[first : first + size], np.float64)
            total = (part * np.asarray(weight, np.float64)[:, :, None]).sum(axis=0)
            expected.append(total + np.asarray(bias, np.float64))
            first += stride
        begin = end
    assert windows.dtype == tokens.dtype
    assert windows.shape == (len(expected), 3, 5)
    tolerance = {"bfloat16": 5e-3, "float16": 6e-4, "float32": 1e-5}[dtype]
    np.testing.assert_allclose(
        np.asarray(windows, np.float64), expected, rtol=tolerance, atol=20 * tolerance
    )


def test_compress_is_differentiable():
    tokens = jnp.ones((64, 2, 4))
    weight = jnp.ones((32, 2))
    gradient = jax.grad(lambda t: nsa_compress(t, weight, 32, 16).sum())(tokens)
    # Each token is in as many windows as start at most 31 tokens before it, of three.
    np.testing.assert_array_equal(gradient[:, 0, 0], np.repeat([1.0, 2.0, 2.0, 1.0], 16))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": np.ones((31, 2), np.float32)}, ValueError, r"weight must have shape \(32, 2\)"),
        ({"compress_stride": 24}, ValueError, "compress_stride must be one of"),
        ({"compress_block_size": 33}, ValueError, "compress_block_size must be a multiple of 16"),
        ({"actual_seq_len": [40, 30, 64]}, ValueError, "cumulative, not decreasing"),
        ({"actual_seq_len": [40, 60]}, ValueError, r"end with input's tokens \(64\)"),
        ({"actual_seq_len": jnp.array([64])}, TypeError, "known when the call is traced"),
        ({"bias": np.ones((2, 3), np.float32)}, ValueError, r"bias must have shape \(2, 4\)"),
        ({"input": np.ones((64, 8), np.float32)}, ValueError, "input must have shape"),
    ],
)
def test_compress_refuses(changes, error, message):
    good = {
        "input": np.ones((64, 2, 4), np.float32), "weight": np.ones((32, 2), np.float32),
        "compress_block_size": 32, "compress_stride": 16,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        nsa_compress(**good | changes)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("compressed_key", np.ones((2, 9, 2, 16), np.float32), ValueError, "compressed_key must"),
        (
            "gates",
            np.ones((2, 100, 4), np.float32),
            ValueError,
            r"gates must have shape \(2, 100, 4",
        ),
        ("gates", np.ones((2, 100, 4, 3), np.float16), TypeError, "gates must have query's dtype"),
        ("query", np.ones((2, 100, 0, 16), np.float32), ValueError, "query must have heads, got"),
        ("key", np.ones((2, 100, 3, 16), np.float32), ValueError, "multiple of key's"),
        ("importance", "fla", ValueError, "importance must be one of"),
        ("window_size", 0, ValueError, "window_size must be in"),
        ("chunk_size", 1.5, TypeError, "chunk_size must be a Python integer"),
    ],
)
def test_attention_refuses(name, value, error, message):
    arguments = sequences(100, (32, 16, 64)) | options((32, 16, 64))
    with pytest.raises(error, match=message):
        nsa_attention(**arguments | {name: value})
