"""The stand-in for CANN notices each breach of the rules of memory, streams and executors.

And of the first operator's; those of the others: test_ascend_rules.py.
"""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import pytest
from ascend.driver import Driver
from ascend.processes import run_alone

pytest_plugins = ("ascend.fixtures",)


class TestStandInIsStrict:
    """Each way to break CANN's rules, planted: the stand-in must notice it."""

    @pytest.fixture
    def driver(self, standin):
        driver = Driver(standin)
        yield driver
        driver.close()

    def test_the_rules_kept(self, driver):
        assert driver.launch() == 0
        assert driver.synchronize() == 0
        assert driver.standin.take_violations() == ""
        assert np.isfinite(driver.attention()).all()

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"query_dtype": 0}, "query has dtype 0"),
            ({"table_dtype": 9}, "blockTable has dtype 9"),
            ({"key_dtype": 1}, "key has dtype 1"),
            ({"format": 1}, "query is not ND"),
            ({"stride": 2}, "query is not contiguous"),
            ({"host_query": True}, "query is not in live device memory"),
            ({"freed_query": True}, "query is not in live device memory"),
            ({"small_query": True}, "query is not in live device memory of that size"),
            ({"other_device": True}, "query is not in live device memory"),
            ({"null_query": True}, "query is null"),
            ({"destroyed_query": True}, "query is not a live tensor"),
            ({"null_q_lengths": True}, "actualQSeqLen is null"),
            ({"null_lengths": True}, "actualCmpKvSeqLen is null"),
            ({"q_lengths": [1, 1]}, "actualQSeqLen has not one entry"),
            ({"q_lengths": [0]}, "actualQSeqLen is 0"),
            ({"q_lengths": [2]}, "T is not the sum"),
            ({"lengths": [8193]}, "actualCmpKvSeqLen is 8193"),
            ({"layout": b"BNSD"}, "layout is BNSD"),
            ({"layout": b"BSND"}, "query has rank 3"),
            ({"layout": None}, "layout is null"),
            ({"heads": 4}, "query has not numHeads heads"),
            ({"k": 99}, "topKOutput has the wrong shape"),
            ({"stride_d": 20}, "block sizes"),
            ({"sparse_mode": 1}, "sparseMode is not 0"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )  # fmt: skip
    def test_first_phase(self, driver, changes, complaint):
        assert driver.launch(**changes) in (161001, 161002)
        assert complaint in driver.standin.take_violations(expected=True)

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"freed_workspace": True}, "the workspace is not live device memory"),
            ({"host_workspace": True}, "the workspace is not live device memory"),
            ({"small_workspace": True}, "the workspace is too small"),
            ({"tensor_destroyed_early": True}, "a tensor was destroyed before"),
            ({"executor_twice": True}, "not an executor, or used before"),
            ({"destroyed_stream": True}, "is not a live stream"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_second_phase(self, driver, changes, complaint):
        assert driver.launch(**changes) != 0
        assert complaint in driver.standin.take_violations(expected=True)

    def test_workspace_freed_before_the_kernel_ran(self, driver):
        """The launch returns at once: freeing does not wait for it."""
        assert driver.launch(workspace_freed_after_launch=True) == 0
        assert driver.synchronize() != 0
        assert "freed meanwhile" in driver.standin.take_violations(expected=True)

    def test_missing_synchronize(self, driver):
        assert driver.launch() == 0
        assert not np.isfinite(driver.attention()).any()  # nothing has run
        driver.destroy_stream()
        assert "nobody waited" in driver.standin.take_violations(expected=True)

    def test_missing_order(self, driver):
        """Work on another stream sees nothing of what this stream has still to do."""
        assert driver.launch(copies_on_another_stream=True) == 0
        driver.synchronize()
        assert not np.isfinite(driver.attention()).all()
        driver.standin.take_violations(expected=True)

    def test_host_memory_reused_before_it_was_copied(self, driver):
        driver.copy_in()
        driver.pinned[0] = 7
        driver.synchronize()
        assert "changed before it was copied" in driver.standin.take_violations(expected=True)

    def test_copy_from_memory_that_is_not_pinned(self, driver):
        assert driver.copy_in(pageable=True) != 0
        assert "not pinned" in driver.standin.take_violations(expected=True)

    def test_no_device_set(self, driver):
        statuses = []
        pointer = ctypes.c_void_p()
        thread = threading.Thread(
            target=lambda: statuses.append(
                driver.acl.aclrtMalloc(ctypes.byref(pointer), ctypes.c_size_t(8), 0)
            )
        )
        thread.start()
        thread.join()
        assert statuses == [107002]
        assert "has set no device" in driver.standin.take_violations(expected=True)

    @pytest.mark.parametrize("function", ["aclrtFree", "aclrtFreeHost", "aclrtDestroyStream"])
    def test_given_back_twice(self, driver, function):
        assert getattr(driver.acl, function)(ctypes.c_void_p(4096)) != 0
        assert "not" in driver.standin.take_violations(expected=True)

    def test_device_memory_touched_by_the_host(self, driver, tmp_path):
        result = run_alone(
            driver.standin,
            """
            pointer = ctypes.c_void_p()
            standin.runtime.aclInit(None); standin.runtime.aclrtSetDevice(0)
            standin.runtime.aclrtMalloc(ctypes.byref(pointer), ctypes.c_size_t(64), 0)
            ctypes.memset(pointer, 0, 1)
            """,
        )
        assert result.returncode == -11  # a segmentation fault

    def test_leaks_at_exit(self, driver):
        result = run_alone(
            driver.standin,
            """
            pointer = ctypes.c_void_p()
            standin.runtime.aclInit(None); standin.runtime.aclrtSetDevice(0)
            standin.runtime.aclrtMalloc(ctypes.byref(pointer), ctypes.c_size_t(64), 0)
            """,
        )
        assert result.returncode == 70
        assert "leaked 64 bytes of device memory" in result.stderr
