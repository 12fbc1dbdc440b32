"""Fixtures of the tests on the stand-in for CANN, as a pytest plugin."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ascend.device_route import DeviceRoute, Harness
from ascend.standin import HERE, StandIn, build, compile_cc

from jax_nsa import backends, native

LIBRARY_PATH = "JAX_NSA_CANN_LIBRARY_PATH"


@pytest.fixture(scope="session")
def standin_libraries(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    """The stand-in, built and loaded into this process."""
    directory = tmp_path_factory.mktemp("cann")
    build(directory)
    return StandIn(directory)


@pytest.fixture
def standin(standin_libraries: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The stand-in as the CANN that jax_nsa finds; a violation that no test takes fails it."""
    monkeypatch.setenv(LIBRARY_PATH, str(standin_libraries.directory))
    standin_libraries.clear_faults()
    yield standin_libraries
    standin_libraries.clear_faults()
    assert standin_libraries.take_violations() == ""


@pytest.fixture(scope="session")
def _harness(
    standin_libraries: StandIn, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Harness]:
    library = tmp_path_factory.mktemp("harness") / "harness.so"
    compile_cc(library, [HERE / "harness.cc"], "-shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LIBRARY_PATH, str(standin_libraries.directory))
        harness = Harness(library, standin_libraries)
        yield harness
        harness.close()


@pytest.fixture(scope="module")
def harness(_harness: Harness) -> Iterator[Harness]:
    """The device route's handlers, as the implementation `DeviceRoute.NAME`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.ALL, DeviceRoute.NAME, DeviceRoute(_harness))
        yield _harness


@pytest.fixture(params=["ascend", DeviceRoute.NAME])
def implementation(request: pytest.FixtureRequest, harness: Harness) -> str:
    """Both routes."""
    return request.param


@pytest.fixture
def fresh(standin: StandIn) -> Iterator[None]:
    """Nothing is kept from calls before the test, and nothing is left by it."""
    native.module().ascend_release()
    yield
    native.module().ascend_release()
    live = standin.live()
    assert not any(live[kind] for kind in live if kind != "stream")
