"""Pools by themselves: which shapes are legal, what each refusal says, what lies where in a row."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest

from jax_nsa import pools

HEADS, PAGE = 2, 32


def zeros(*shape):
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("rows", "legal"), [(0, False), (-16, False), (8, False), (16, True), (17, False), (48, True),
                        (256, True), (257, False), (272, False)],
)  # fmt: skip
def test_page_sizes(rows, legal):
    assert pools.is_page_size(rows) == legal


@pytest.mark.parametrize(
    ("value_size", "head_size", "legal"),
    [(128, 128, True), (128, 192, True), (129, 192, False), (64, 64, True), (65, 64, False)],
)
def test_value_sizes(value_size, head_size, legal):
    assert pools.is_value_size(value_size, head_size) == legal


class TestLayout:
    def test_each_layout(self):
        assert pools.is_interleaved("interleaved", None)
        assert not pools.is_interleaved("separate", zeros(1))

    def test_interleaved_values(self):
        with pytest.raises(ValueError, match=r'^v must be None .*"interleaved".* got ndarray$'):
            pools.is_interleaved("interleaved", zeros(1), "v")

    def test_separate_values_left_out(self):
        with pytest.raises(TypeError, match=r'^v must be .*"separate".* got NoneType$'):
            pools.is_interleaved("separate", None, "v")


class TestRows:
    @pytest.mark.parametrize("shape", [(5, 3, 2), (4, 7, 3, 2)], ids=str)
    def test_in_turn_and_back(self, shape):
        """Each head's value lies behind its key."""
        keys = np.arange(np.prod(shape)).reshape(shape)
        values = keys + 1000
        both = np.asarray(pools.in_turn(keys, values, axis=len(shape) - 1))
        assert both.shape == (*shape[:-2], 2 * shape[-2], shape[-1])
        np.testing.assert_array_equal(both[..., 0::2, :], keys)
        np.testing.assert_array_equal(both[..., 1::2, :], values)
        rows = jnp.asarray(both.reshape(*shape[:-1], 2 * shape[-1]))
        split = pools.keys_and_values(rows, rows, interleaved=True)
        np.testing.assert_array_equal(split[0], keys)
        np.testing.assert_array_equal(split[1], values)

    def test_heads_on_an_inner_axis(self):
        keys = np.arange(24).reshape(2, 3, 4)
        both = np.asarray(pools.in_turn(keys, -keys, axis=1))
        assert both.shape == (4, 3, 4)
        np.testing.assert_array_equal(both, np.stack([keys[0], -keys[0], keys[1], -keys[1]]))

    def test_separate_rows_stay(self):
        keys, values = jnp.zeros((2, 6)), jnp.zeros((2, 4))
        split = pools.keys_and_values(keys, values, interleaved=False)
        assert split[0] is keys
        assert split[1] is values

    def test_sizes(self):
        assert pools.value_size(12, interleaved=True) == 6
        assert pools.value_size(12, interleaved=False) == 12


def of_each(key, value, head_size=8):
    return pools.of_each(key, value, key_value_heads=HEADS, page=PAGE, head_size=head_size)


def of_both(key, head_size=8, heads=HEADS):
    return pools.of_both(key, key_value_heads=heads, page=PAGE, head_size=head_size)


class TestLegalPools:
    @pytest.mark.parametrize("key", [zeros(3, PAGE, 16), zeros(3, PAGE, 2, 8)], ids=np.shape)
    @pytest.mark.parametrize("value", [zeros(3, PAGE, 12), zeros(3, PAGE, 2, 6)], ids=np.shape)
    def test_of_each(self, key, value):
        shapes = [pool.shape for pool in of_each(key, value)]
        assert shapes == [(3, PAGE, 16), (3, PAGE, 12)]

    @pytest.mark.parametrize("row", [(4, 8), (2, 2, 8), (32,)], ids=str)
    def test_of_both(self, row):
        assert of_both(zeros(3, PAGE, *row)).shape == (3, PAGE, 32)

    def test_of_both_of_one_page_and_one_head(self):
        assert of_both(zeros(1, PAGE, 2, 8), heads=1).shape == (1, PAGE, 16)

    def test_of_both_of_the_largest_heads(self):
        assert of_both(zeros(1, PAGE, 4, 128), head_size=128).shape == (1, PAGE, 512)

    def test_one_page(self):
        assert of_each(zeros(1, PAGE, 16), zeros(1, PAGE, 16))[1].shape == (1, PAGE, 16)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((zeros(3, PAGE), zeros(3, PAGE, 12)),
         "key must have shape [pages, page_block_size, 2 * 8] or [pages, page_block_size, 2, 8], "
         "got (3, 32)"),
        ((zeros(3, PAGE, 16), zeros(3, PAGE)),
         "value must have shape [pages, page_block_size, 2 * head_size] or [pages, "
         "page_block_size, 2, head_size], got (3, 32)"),
        ((zeros(2, 3, PAGE, 2, 8), zeros(3, PAGE, 12)), "got (2, 3, 32, 2, 8); [sequences, pages,"),
        ((zeros(0, PAGE, 16), zeros(0, PAGE, 12)), "key must not be empty, got shape (0, 32, 16)"),
        ((zeros(3, PAGE, 16), zeros(3, PAGE, 0)), "value must not be empty, got shape (3, 32, 0)"),
        ((zeros(3, 16, 16), zeros(3, PAGE, 12)),
         "key's second axis must be page_block_size (32), got shape (3, 16, 16)"),
        ((zeros(3, PAGE, 16), zeros(3, 16, 12)),
         "value's second axis must be page_block_size (32), got shape (3, 16, 12)"),
        ((zeros(3, PAGE, 4, 8), zeros(3, PAGE, 12)),
         "key's third axis must be its 2 heads (key_value_head_num), got shape (3, 32, 4, 8)"),
        ((zeros(3, PAGE, 16), zeros(3, PAGE, 1, 6)), "value's third axis must be its 2 heads"),
        ((zeros(3, PAGE, 24), zeros(3, PAGE, 12)),
         "key's last axis must be key_value_head_num * head_size = 2 * 8 = 16, got 24 in shape "
         "(3, 32, 24)"),
        ((zeros(3, PAGE, 13), zeros(3, PAGE, 12)), "head_size = 2 * 8 = 16, got 13 in shape"),
        ((zeros(3, PAGE, 16), zeros(3, PAGE, 13)),
         "value's last axis must be a multiple of key_value_head_num (2), got 13 in shape "
         "(3, 32, 13)"),
        ((zeros(3, PAGE, 16), zeros(3, PAGE, 18)),
         "value's head size must be at most 128 and at most query's (8), got 9"),
        ((zeros(3, PAGE, 2 * 192), zeros(3, PAGE, 2 * 129), 192), "query's (192), got 129"),
        ((zeros(3, PAGE, 16), zeros(4, PAGE, 12)),
         "key and value must have as many pages, got 3 and 4"),
    ],
)  # fmt: skip
def test_illegal_pools(arrays, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        of_each(*arrays)


@pytest.mark.parametrize(
    ("shape", "head_size", "message"),
    [
        ((3, 16, 4, 8), 8,
         "key must have shape [pages, 32, 4, 8] or [pages, 32, 2, 2, 8] or [pages, 32, 32] with "),
        ((3, PAGE, 2, 8), 8, "got (3, 32, 2, 8)"),
        ((3, PAGE, 16), 8, "got (3, 32, 16)"),
        ((0, PAGE, 4, 8), 8, "got (0, 32, 4, 8)"),
        ((3, PAGE), 8, "got (3, 32)"),
        ((3,), 8, "got (3,)"),
        ((3, PAGE, 4, 129), 129, "head size must be at most 128 with"),
    ],
)  # fmt: skip
def test_illegal_pools_of_both(shape, head_size, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        of_both(zeros(*shape), head_size)


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [
        ((2, 3, PAGE, 4, 8), "[sequences, pages, page, heads, size] become pages"),
        ((3, 4, PAGE, 8), "where heads come before rows"),
        ((3, 4, 8, PAGE), ""),  # of which the third axis is no page
        ((3, PAGE, 4, 8), ""),
        ((3, 5, PAGE, 8), ""),  # nor is the second heads
        ((3, 4, 4, 8), ""),
        ((3, 257, 4, 8), "a dense [sequences, tokens, heads, size] becomes pages"),
        ((3, 256, 4, 8), ""),
        ((3, 257, PAGE), "a dense [sequences, tokens, heads * size] becomes pages"),
        ((3, 256, PAGE), ""),
        ((4, 257, PAGE), "[heads, tokens, size] become pages by"),
        ((3, 257), ""),
        ((3, 4, PAGE, 8, 8, 8), ""),
    ],
)  # fmt: skip
def test_remedies(shape, remedy):
    """Of an array whose heads are four."""
    told = pools.remedy(shape, 4)
    assert told.startswith(f"; {remedy}" if remedy else "")
    assert bool(told) == bool(remedy)


def test_a_remedy_of_as_many_pages_as_heads_tells_of_both():
    assert "a dense [sequences, tokens, heads * size]" in pools.remedy((4, 257, PAGE), 4)
    assert pools.remedy((16, 16, 16, 8), 16) == ""
