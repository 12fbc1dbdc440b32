"""A hundred thousand calls leave no memory behind."""

import sys

import pytest
import soak


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory a process has")
def test_memory_is_flat():
    calls, gained = soak.soak(100_000)
    assert calls >= 100_000
    # 64 bytes a call, or a block that a thread's allocator keeps now and did not before.
    assert gained < 8 << 20, f"{calls} calls took {gained} bytes"
