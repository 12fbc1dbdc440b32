"""How times and bandwidths are taken on each platform."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Sets = Sequence[tuple[jax.Array, ...]]


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call, until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


class HostTimer:
    """Calls one by one, as a decode loop makes them; the machine's noise is part of them."""

    def __init__(self, runs: dict[str, Callable], sets: Sets) -> None:
        self._runs = {name: jax.jit(run) for name, run in runs.items()}
        self._sets = sets
        for run in self._runs.values():
            jax.block_until_ready(run(*sets[0]))

    def sample(self, name: str, i: int) -> float:
        """Seconds of the i-th call, of the set whose turn it is."""
        operands = self._sets[i % len(self._sets)]
        return seconds(lambda: self._runs[name](*operands))


class DeviceTimer:
    """Programs of many calls, so that what the host does for each is hidden behind the kernels.

    Each call has operands of its own, so XLA can drop none; a device runs them one after another.
    Their results are stacked, as making many arrays of them would take the host long.
    """

    CALLS, PROGRAMS = 48, 4

    def __init__(self, runs: dict[str, Callable], sets: Sets) -> None:
        def program(run: Callable) -> Callable:
            def calls(sets: Sets, queries: jax.Array) -> list:
                results = [run(q, *sets[i % len(sets)][1:]) for i, q in enumerate(queries)]
                return [jnp.stack(r) for r in zip(*results, strict=True)]

            return jax.jit(calls)

        self._programs = {name: program(run) for name, run in runs.items()}
        self._sets = list(sets)
        query = sets[0][0]
        queries = jax.random.normal(jax.random.key(7), (self.CALLS, *query.shape), query.dtype)
        self._queries = [jax.device_put(q, query.sharding) for q in queries]
        for name in self._programs:
            self.sample(name, 0)

    def sample(self, name: str, i: int) -> float:
        """Seconds of one call, as the mean of some programs' that are dispatched at once."""
        del i
        program = self._programs[name]
        elapsed = seconds(
            lambda: [program(self._sets, self._queries) for _ in range(self.PROGRAMS)]
        )
        return elapsed / (self.PROGRAMS * self.CALLS)


class DeviceBandwidth:
    """Bytes a second that the device reads, by reductions over more than its caches hold."""

    BYTES, READS = 4 << 30, 8

    def __init__(self) -> None:
        self._data = jax.random.normal(jax.random.key(0), (8, self.BYTES // 32), jnp.float32)
        self._read = jax.jit(lambda data: jnp.max(data, axis=1))
        jax.block_until_ready(self._read(self._data))

    def sample(self) -> float:
        """Of some reductions that are dispatched at once."""
        elapsed = seconds(lambda: [self._read(self._data) for _ in range(self.READS)])
        return self.READS * self.BYTES / elapsed


_trivial = jax.jit(lambda x: x + 1)


def trivial_call() -> float:
    """Seconds of a jitted program that does next to nothing."""
    x = jnp.zeros(())
    jax.block_until_ready(_trivial(x))
    return statistics.median(seconds(lambda: _trivial(x)) for _ in range(300))


def dispatch(run: Callable, operands: tuple[jax.Array, ...], calls: int = 300) -> float:
    """Seconds of host time that a jitted call takes to return, its results still under way."""
    run = jax.jit(run)
    jax.block_until_ready(run(*operands))
    samples = []
    for _ in range(calls):
        start = time.perf_counter()
        results = run(*operands)
        samples.append(time.perf_counter() - start)
        jax.block_until_ready(results)
    return statistics.median(samples)
