"""Derivatives: of the reference, and how kernels refuse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention.examples import operator_on_device as operator
from compress_attention.problems import Geometry

GEOMETRY = Geometry(lengths=(60, 17, 0, 33), key_value_heads=4, hostile=False, return_lse=True)


class TestDifferentiation:
    def test_kernels_refuse_and_name_the_road(self):
        call, arrays = operator(GEOMETRY, None)
        with pytest.raises(NotImplementedError, match=r'inference.*implementation="reference"'):
            jax.grad(lambda query: call(query, *arrays[1:])[0].sum())(arrays[0])

    def test_reference_has_the_right_derivative(self):
        call, arrays = operator(GEOMETRY, "reference")
        rng = np.random.default_rng(0)
        weights = rng.standard_normal(call(*arrays)[0].shape)
        with jax.enable_x64(True):
            # Central differences along a random direction.
            def loss(*floats):
                attention, _, lse = call(*floats, *arrays[3:])
                finite = jnp.where(jnp.isfinite(lse), lse, 0.0)
                return (attention * weights.astype(np.float32)).sum() + finite.sum()

            floats = arrays[:3]
            gradients = jax.grad(loss, argnums=(0, 1, 2))(*floats)
            directions = [rng.standard_normal(a.shape).astype(np.float32) for a in floats]
            step = 1e-2
            ahead, behind = (
                loss(*(a + s * step * d for a, d in zip(floats, directions, strict=True)))
                for s in (1, -1)
            )
        slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
        np.testing.assert_allclose(float(slope), float(ahead - behind) / (2 * step), rtol=2e-3)

    def test_garbage_has_no_derivative(self):
        call, arrays = operator(
            Geometry(lengths=(40, 0, 7), hostile=True, head_size=8, value_size=8), "reference"
        )
        gradients = jax.grad(
            lambda *floats: call(*floats, *arrays[3:])[0].sum(), argnums=(0, 1, 2)
        )(*arrays[:3])
        assert all(bool(jnp.all(jnp.isfinite(g))) for g in gradients)
