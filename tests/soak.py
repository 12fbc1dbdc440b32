"""Calls all operators from several threads, and tells how much memory the process has gained.

    python soak.py --calls 100000000

Run it in tests/. Loops are inside of programs, so that it is kernels that work, not Python.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import compress.problems as compress_problems
import jax
import jax.numpy as jnp
import numpy as np
from step.problems import Step, arguments_of

from jax_nsa import nsa_compress_infer, nsa_decode_step

THREADS, ROUNDS = 4, 200
CALLS = 4  # of kernels in a round: compression, the compressed and the selected branch, the window


def resident_bytes() -> int:
    """Memory of this process, on Linux."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def program(lengths: tuple[int, ...]) -> Callable[[], Any]:
    """A program of `ROUNDS` rounds over sequences of these lengths."""
    step = Step(
        replace(Step().original, lengths=lengths, head_size=8, value_size=4), window_page=16
    )
    arguments = arguments_of(step)
    names = ("query", "gates", "compressed", "selected", "window")
    static = {n: v for n, v in arguments.items() if n not in names}
    arrays = jax.tree.map(jnp.asarray, {n: arguments[n] for n in names})
    window = compress_problems.build(compress_problems.Geometry())
    cache = jnp.asarray(window.pop("cache"))

    @jax.jit
    def run(arrays: Any, cache: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one_round(carry: Any, _: None) -> tuple[Any, None]:
            query, cache = carry
            attention, _ = nsa_decode_step(**{**arrays, "query": query}, **static)
            # The next round has another query, so that no compiler makes one call of them.
            return (query + 1e-3 * attention.sum(), nsa_compress_infer(cache=cache, **window)), None

        return jax.lax.scan(one_round, (arrays["query"], cache), length=ROUNDS)[0]

    return lambda: jax.block_until_ready(run(arrays, cache))


def soak(calls: int) -> tuple[int, int]:
    """Makes so many calls of kernels, or a few more; returns how many, and the bytes gained."""
    programs = [program((40, 17)), program((150,)), program((300, 5, 80))]
    runs = -(-calls // (CALLS * ROUNDS))
    began, shown, warm = time.monotonic(), 0.0, None
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        turns = itertools.islice(itertools.cycle(programs), runs)
        for done, outcome in enumerate(pool.map(lambda run: run(), turns), 1):
            assert np.all(np.isfinite(outcome[0]))
            if warm is None and done >= runs // 5:
                warm = resident_bytes()
            if sys.stderr.isatty() and time.monotonic() > shown + 0.2:
                shown = time.monotonic()
                bar = "#" * (20 * done // runs)
                print(f"\r[{bar:20}] {done * CALLS * ROUNDS} calls, {shown - began:.0f} s, "
                      f"{resident_bytes() >> 20} MiB", end="", file=sys.stderr)  # fmt: skip
    return runs * CALLS * ROUNDS, resident_bytes() - (warm or 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=1_000_000)
    made, gained = soak(parser.parse_args().calls)
    print(f"\n{made} calls, {gained / 2**20:+.1f} MiB after the first fifth")
