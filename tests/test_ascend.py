"""The contract through both routes to CANN's operator, on the stand-in for CANN."""

from __future__ import annotations

import pytest
from ascend.device_route import DeviceRoute, Harness
from ascend.standin import standin, standin_libraries  # noqa: F401
from contract import CompressAttentionContract
from problems import Domain

from jax_nsa import backends

# What CANN's kernel can do of the legal calls.
CANN = Domain(
    dtypes=("bfloat16", "float16"),
    least_length=1,
    least_tokens=1,
    most_tokens=4,
    pads_selection=False,
    returns_lse=False,
)


@pytest.mark.usefixtures("standin")
class TestHostRoute(CompressAttentionContract):
    """Under host JAX: buffers staged to the device and back."""

    implementation = "ascend"
    domain = CANN
    fails_on_faults = True


@pytest.fixture(scope="module")
def device_route(standin_libraries, tmp_path_factory):  # noqa: F811
    harness = Harness(tmp_path_factory.mktemp("harness"), standin_libraries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_NSA_CANN_LIBRARY_PATH", str(standin_libraries.directory))
        patch.setitem(backends.ALL, DeviceRoute.NAME, DeviceRoute(harness))
        yield
        harness.close()


@pytest.mark.usefixtures("standin", "device_route")
class TestDeviceRoute(CompressAttentionContract):
    """Under an Ascend PJRT plugin: buffers on the device, XLA's stream."""

    implementation = DeviceRoute.NAME
    domain = CANN
    fails_on_faults = True
