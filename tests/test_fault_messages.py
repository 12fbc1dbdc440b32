"""Messages name what the user passed, whatever became of it on the way."""

from __future__ import annotations

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention.calls import FLOATS, INTEGERS
from compress_attention.examples import (
    FOUR,
    FOUR_BATCHED,
    FOUR_PACKED,
    layout_of,
    message_of,
    on_device,
    operator,
)

from jax_nsa import nsa_compress_attention_infer

REPOSITORY = pathlib.Path(__file__).parent.parent


def stacked(arrays, names, axis=0, count=3):
    """These arrays `count` times along a new axis, in host memory; and in_axes."""
    axes = {n: axis if n in names else None for n in arrays}
    return {
        n: np.stack([a] * count, axis=axis) if n in names else a for n, a in arrays.items()
    }, axes


EVERYTHING = (*FLOATS, *INTEGERS)


class TestMessages:
    @pytest.mark.parametrize(
        "mapped",
        [("block_table",), ("key", "value", "block_table"), EVERYTHING],
        ids=["table", "pools and table", "all"],
    )
    @pytest.mark.parametrize(
        "geometry", [FOUR, FOUR_PACKED, FOUR_BATCHED], ids=["TND", "packed", "BSND"]
    )
    @pytest.mark.parametrize("value", [77, -3])
    def test_page_under_vmap(self, geometry, mapped, value):
        call, arrays = operator(geometry)
        pages = len(arrays["key"])
        many, axes = stacked(arrays, mapped)
        many["block_table"][2, 1, 0] = value
        many = on_device(many)
        program = jax.vmap(lambda arrays: call(**arrays), in_axes=(axes,))
        for function in (program, jax.jit(program)):
            message = message_of(function, many)
            assert (
                f"block_table[1, 0] at index 2 of jax.vmap must be in [0, {pages}), the pages of "
                f"key and value, got {value}" in message
            ), message

    def test_pool_that_is_mapped_beside_a_whole_table(self):
        call, arrays = operator(FOUR)
        arrays["block_table"][1, 0] = 77
        many, axes = stacked(arrays, ("key", "value"))
        program = jax.vmap(lambda arrays: call(**arrays), in_axes=(axes,))
        message = message_of(program, on_device(many))
        assert re.search(
            r"block_table\[1, 0\] at index \d of jax.vmap must be in \[0, \d+\), .*, got 77",
            message,
        ), message
        assert f"[0, {len(arrays['key'])})" in message

    def test_first_page_past_a_mapped_pool(self):
        """Nor does it reach into a neighbour's."""
        call, arrays = operator(FOUR)
        pages = len(arrays["key"])
        many, axes = stacked(arrays, EVERYTHING)
        many["block_table"][0, 3, 1] = pages
        program = jax.vmap(lambda arrays: call(**arrays), in_axes=(axes,))
        message = message_of(program, on_device(many))
        assert f"block_table[3, 1] at index 0 of jax.vmap must be in [0, {pages})" in message
        assert f"got {pages}" in message

    @pytest.mark.parametrize("axis", [1, -1])
    def test_other_axes(self, axis):
        call, arrays = operator(FOUR)
        many, axes = stacked(arrays, ("block_table",), axis=axis)
        table = np.moveaxis(many["block_table"], axis, 0)
        table[1, 2, 0] = 77
        program = jax.vmap(lambda arrays: call(**arrays), in_axes=(axes,))
        message = message_of(program, on_device(many))
        assert "block_table[2, 0] at index 1 of jax.vmap must" in message

    @pytest.mark.parametrize(
        ("geometry", "name", "at", "value"),
        [
            (FOUR, "actual_cmp_seq_kvlen", (1, 2), -7),
            (FOUR, "actual_cmp_seq_kvlen", (2, 3), 1000),
            (FOUR_PACKED, "actual_cmp_seq_kvlen", (2, 1), 1000),
            (FOUR_PACKED, "actual_sel_seq_kvlen", (1, 3), 3),
            (FOUR_BATCHED, "actual_sel_seq_kvlen", (0, 1), 3),
            (FOUR_BATCHED, "actual_seq_qlen", (2, 1), 4),
            (FOUR_PACKED, "actual_seq_qlen", (1, 3), 9),
            (FOUR_PACKED, "actual_seq_qlen", (1, 0), -1),
        ],
        ids=layout_of,
    )
    def test_integers_of_sequences_under_vmap(self, geometry, name, at, value):
        call, arrays = operator(geometry)
        for mapped in ((name,), EVERYTHING):
            many, axes = stacked(arrays, mapped)
            many[name][at] = value
            program = jax.vmap(lambda arrays: call(**arrays), in_axes=(axes,))
            message = message_of(program, on_device(many))
            assert f"{name}[{at[1]}] at index {at[0]} of jax.vmap must be in" in message, message
            if name in ("actual_cmp_seq_kvlen", "block_table"):  # others are combined first
                assert f"got {value}" in message

    @pytest.mark.parametrize(
        "geometry", [FOUR, FOUR_PACKED, FOUR_BATCHED], ids=["TND", "packed", "BSND"]
    )
    @pytest.mark.parametrize("mapped", [("block_table",), EVERYTHING], ids=["table", "all"])
    def test_nested_vmap(self, geometry, mapped):
        """The outermost index first."""
        call, arrays = operator(geometry)
        many, axes = stacked(arrays, mapped, count=4)
        many, outer = stacked(many, mapped, count=3)
        many["block_table"][1, 2, 3, 0] = 77
        program = jax.vmap(
            jax.vmap(lambda arrays: call(**arrays), in_axes=(axes,)), in_axes=(outer,)
        )
        message = message_of(program, on_device(many))
        assert "block_table[3, 0] at indices (1, 2) of jax.vmap must be in [0, " in message, message
        assert f"[0, {len(arrays['key'])}), the pages of key and value, got 77" in message

    def test_levels_that_map_different_arrays(self):
        call, arrays = operator(FOUR)
        pools, inner = stacked(arrays, ("key", "value"), count=2)
        many, outer = stacked(pools, ("block_table",), count=3)
        many["block_table"][2, 1, 0] = 77
        program = jax.vmap(
            jax.vmap(lambda arrays: call(**arrays), in_axes=(inner,)), in_axes=(outer,)
        )
        message = message_of(program, on_device(many))
        assert re.search(r"block_table\[1, 0\] at indices \(2, \d\) of jax.vmap", message), message
        assert f"[0, {len(arrays['key'])})" in message
        assert "got 77" in message

    def test_without_vmap(self):
        call, arrays = operator(FOUR)
        arrays["block_table"][1, 0] = 77
        message = message_of(lambda: call(**on_device(arrays)))
        assert "block_table[1, 0] must be in" in message
        assert "vmap" not in message

    def test_scan_is_not_vmap(self):
        call, arrays = operator(FOUR)
        tables = np.stack([arrays.pop("block_table")] * 3)
        tables[2, 1, 0] = 77
        arrays = on_device(arrays)
        message = message_of(
            lambda: jax.lax.scan(
                lambda c, table: (c, call(block_table=table, **arrays)), 0, jnp.asarray(tables)
            )
        )
        assert "block_table[1, 0] must be in" in message


def test_maps_are_told_from_the_part_of_one_device():
    """Sequences stay outermost where maps fold into them, so a part still knows its maps."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    table = np.zeros((3, 4, 2), np.int32)
    table[2, 3, 0] = 77
    query = np.ones((3, 4, 4, 16), np.float32)
    pool = np.ones((3, 16, 32), np.float32)

    def call(query, table):
        return nsa_compress_attention_infer(
            query, pool, pool, 0.25, 4, 2, 64, 1, 16, 32, 16, block_table=table,
            actual_cmp_seq_kvlen=jnp.full(4, 20), on_fault="fail", implementation="cpu",
        )  # fmt: skip

    placed = [
        jax.device_put(
            array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
        )
        for array in (query, table)
    ]
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(jax.jit(jax.vmap(call))(*placed))
    message = str(caught.value)
    assert (
        "block_table[1, 0] of one device's part at index 2 of jax.vmap must be in [0, 3)" in message
    )
    assert "got 77" in message
