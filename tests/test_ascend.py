"""The contract through both routes to CANN's operator, on the stand-in for CANN."""

from __future__ import annotations

import pytest
from ascend.device_route import DeviceRoute
from contract import CompressAttentionContract
from problems import Domain

pytest_plugins = ("ascend.fixtures",)

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


@pytest.mark.usefixtures("standin", "harness")
class TestDeviceRoute(CompressAttentionContract):
    """Under an Ascend PJRT plugin: buffers on the device, XLA's stream."""

    implementation = DeviceRoute.NAME
    domain = CANN
    fails_on_faults = True
