"""What all tests share: Hypothesis profiles, the dtypes of an implementation, missing hardware."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

# For pytest's workers, which share the processors: threads of NumPy's own would wait for them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import jax
import jaxlib.version
import pytest

pytest.register_assert_rewrite(
    "contract",
    "compress.calls",
    "compress.contract",
    "compress.faults",
    "compress.transformations",
    "compress_attention.agreement",
    "compress_attention.calls",
    "compress_attention.choices",
    "compress_attention.contract",
    "compress_attention.examples",
    "compress_attention.faults",
    "compress_attention.programs",
    "interleaved.pools",
    "select_attention.contract",
    "select_attention.faults",
)

# Tests of sharding need several devices.
jax.config.update("jax_num_cpu_devices", 4)

# The contract's tests are inherited by one class for each implementation.
_COMMON = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [
        hypothesis.HealthCheck.differing_executors,
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.data_too_large,
    ],
}
hypothesis.settings.register_profile("brief", max_examples=10, **_COMMON)
hypothesis.settings.register_profile("ci", max_examples=30, **_COMMON)
hypothesis.settings.register_profile("thorough", max_examples=1000, **_COMMON)
# HYPOTHESIS_PROFILE=thorough draws many more examples.
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="module")
def on_cpu() -> Iterator[None]:
    """Places a module's arrays on the CPU, whose kernels it calls, where JAX's default is a GPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds an option for who runs all tests elsewhere, and here those of another JAX."""
    parser.addoption(
        "--of-each", type=int, metavar="N",
        help="of a test's parameters, run N sets at most, the first and the last among them",
    )  # fmt: skip


def pytest_report_header() -> str:
    """Tells which JAX was tested."""
    return f"JAX {jax.__version__}, jaxlib {jaxlib.version.__version__}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a contract's tests with each `example` call, and each `dtype` of the implementation."""
    if "example" in metafunc.fixturenames:
        examples = metafunc.cls.EXAMPLES
        metafunc.parametrize("example", examples.values(), ids=examples)
    if hasattr(metafunc.cls, "domain") and "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", metafunc.cls.domain.dtypes)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips tests whose hardware this machine lacks; leaves out what --of-each does."""
    most = config.getoption("--of-each")
    if most is not None:
        few = _of_each(items, most)
        config.hook.pytest_deselected(items=[item for item in items if item not in few])
        items[:] = [item for item in items if item in few]
    missing = {}
    if not _has_nvidia_gpu():
        missing["cuda"] = (
            "JAX sees no NVIDIA GPU; run on a machine with one, after `pip install 'jax[cuda12]'`"
        )
    if shutil.which("npu-smi") is None:
        missing["ascend_hw"] = (
            "no Ascend NPU (npu-smi is not there); run on a machine with one, with CANN's "
            "set_env.sh sourced"
        )
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def _of_each(items: list[pytest.Item], most: int) -> set[pytest.Item]:
    """At most so many of the items of each test function, evenly spread over its parameters."""
    of_function: dict[str, list[pytest.Item]] = {}
    for item in items:
        of_function.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return {
        those[round(i * (len(those) - 1) / max(1, most - 1))]
        for those in of_function.values()
        for i in range(most)
    }


def _has_nvidia_gpu() -> bool:
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False
