"""The contract through both routes to CANN's operator, on the stand-in for CANN."""

from __future__ import annotations

import pytest
from ascend.device_route import DeviceRoute
from ascend.domain import CANN
from compress_attention.contract import CompressAttentionContract

pytest_plugins = ("ascend.fixtures",)


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
