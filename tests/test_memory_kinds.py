"""Where operands lie: on the host or the device, and what moves between the two."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention.calls import FLOATS, INTEGERS
from compress_attention.examples import (
    BATCHED,
    LAYOUTS,
    ONE_TOKEN,
    PACKED,
    assert_right,
    on_device,
    operator,
)
from jax.sharding import SingleDeviceSharding

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(params=["cpu", "reference"])
def implementation(request):
    return request.param


def in_host_memory(array):
    return jax.device_put(array, SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"))


class TestMemoryKinds:
    """As jnp, which computes with no mixture of memories; the message names the argument."""

    @pytest.mark.parametrize("name", [*FLOATS, *INTEGERS])
    def test_one_operand_on_the_host(self, name):
        call, arrays = operator(PACKED)
        arrays = on_device(arrays)
        arrays[name] = in_host_memory(arrays[name])
        kept, moved = {n: a for n, a in arrays.items() if n != name}, arrays[name]
        stacked = {n: np.stack([a, a]) for n, a in kept.items()}
        programs = {
            "eager": lambda: call(**arrays),
            "jit": lambda: jax.jit(lambda arrays: call(**arrays))(arrays),
            "captured": lambda: jax.jit(lambda kept: call(**kept, **{name: moved}))(kept),
            "vmap": lambda: jax.vmap(lambda kept: call(**kept, **{name: moved}))(stacked),
        }
        for way, program in programs.items():
            with pytest.raises(ValueError, match=rf"{name} must .*[Hh]ost"):
                print(way, program())

    def test_moved_within_the_program(self, implementation):
        call, arrays = operator(ONE_TOKEN, implementation)

        @jax.jit
        def program(arrays):
            return call(**arrays | {"key": jax.device_put(arrays["key"], jax.memory.Space.Host)})

        with pytest.raises(ValueError, match=r"key must .*[Hh]ost"):
            program(on_device(arrays))

    def test_all_operands_on_the_host(self, implementation):
        call, arrays = operator(ONE_TOKEN, implementation)
        arrays = {n: in_host_memory(a) for n, a in arrays.items()}
        for program in (call, jax.jit(call)):
            with pytest.raises(ValueError, match=r"query must .*[Hh]ost"):
                program(**arrays)

    def test_moved_back_within_the_program(self, implementation):
        call, arrays = operator(ONE_TOKEN, implementation)
        arrays = on_device(arrays)
        key = in_host_memory(arrays.pop("key"))

        @jax.jit
        def program(key, arrays):
            return call(key=jax.device_put(key, jax.memory.Space.Device), **arrays)

        assert_right(program(key, arrays), ONE_TOKEN)


class TestTransfers:
    """With everything on the device, an eager call moves nothing between it and the host."""

    @pytest.mark.parametrize("layout", [*LAYOUTS, "counts alone", "mask alone", "lse"])
    def test_eager(self, implementation, layout):
        geometry = (LAYOUTS | {
            "counts alone": replace(PACKED, masked=False, slack=None),
            "mask alone": replace(BATCHED, token_counts=None, lengths=(40, 37)),
            "lse": replace(PACKED, return_lse=True),
        })[layout]  # fmt: skip
        call, arrays = operator(geometry, implementation)
        arrays = on_device(arrays)
        with jax.transfer_guard("disallow"):
            results = call(**arrays)
        assert_right(results, geometry)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("mapped", ["all", "query", "all but pools"])
    def test_vmap(self, layout, mapped):
        geometry = LAYOUTS[layout]
        call, arrays = operator(geometry)
        arrays = on_device(arrays)
        axes = {
            n: 0 if mapped == "all" or n == mapped or (mapped != "query" and n not in FLOATS[1:])
            else None for n in arrays
        }  # fmt: skip
        stacked = {n: a if axes[n] is None else jnp.stack([a, a]) for n, a in arrays.items()}
        with jax.transfer_guard("disallow"):
            results = jax.vmap(lambda arrays: call(**arrays), in_axes=(axes,))(stacked)
        for i in range(2):
            assert_right([np.asarray(r)[i] for r in results], geometry)

    def test_nested_vmap(self, implementation):
        call, arrays = operator(PACKED, implementation)
        stacked = {n: jnp.stack([jnp.stack([a, a])] * 2) for n, a in on_device(arrays).items()}
        with jax.transfer_guard("disallow"):
            results = jax.vmap(jax.vmap(lambda arrays: call(**arrays)))(stacked)
        assert_right([np.asarray(r)[1, 0] for r in results], PACKED)

    def test_pools_with_an_axis_of_heads(self, implementation):
        call, arrays = operator(BATCHED, implementation)
        arrays = on_device(arrays)
        for name in ("key", "value"):
            arrays[name] = arrays[name].reshape(*arrays[name].shape[:2], 2, -1)
        with jax.transfer_guard("disallow"):
            results = call(**arrays)
        assert_right(results, BATCHED)

    def test_gradient(self):
        call, arrays = operator(PACKED, "reference")
        arrays = on_device(arrays)
        query = arrays.pop("query")
        with jax.transfer_guard("disallow"):
            gradient = jax.jit(jax.grad(lambda query: call(query=query, **arrays)[0].sum()))(query)
        assert np.all(np.isfinite(np.asarray(gradient)))

    def test_other_integers(self, implementation):
        call, arrays = operator(PACKED, implementation)
        arrays = on_device(arrays)
        small = {n: arrays[n].astype(jnp.int16) for n in INTEGERS}
        with jax.transfer_guard("disallow"):
            results = call(**arrays | small)
        assert_right(results, PACKED)
