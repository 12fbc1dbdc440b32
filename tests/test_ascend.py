"""The Ascend route on the stand-in for CANN: what it computes, refuses, reports and keeps."""

from __future__ import annotations

import pytest
from ascend.standin import standin, standin_libraries  # noqa: F401
from contract import CompressAttentionContract
from problems import Domain

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
    """The contract through host JAX: buffers staged to the device and back."""

    implementation = "ascend"
    domain = CANN
    fails_on_faults = True
