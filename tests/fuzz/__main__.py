"""Fuzzes every operator for as long as wanted.

    python -m fuzz                                    a minute
    python -m fuzz --seconds 3600 --only compress     an hour of one operator
    python -m fuzz --problems 300 --first 1           so many, the same each time
    python -m fuzz --seed 12345                       that problem again, alone

Run it in tests/. A failure prints the command that reproduces it.
"""

from __future__ import annotations

import argparse
import itertools
import secrets
import sys
import time

import jax
import numpy as np


def run(seed: int, operators: list[str], implementations: list[str]) -> str:
    """Draws and checks the problem of a seed; returns what it was."""
    from fuzz import illegal, legal

    random = np.random.default_rng(seed)
    operator = legal.pick(random, *operators)
    implementation = legal.pick(random, *implementations)
    kind = illegal if operator != "cache" and random.random() < 0.3 else legal
    try:
        return f"{operator} by {implementation}: {kind.check(operator, implementation, random)}"
    except Exception as error:
        again = f"python -m fuzz --seed {seed} --only {' '.join(operators)} --on "
        error.add_note(f"{operator} by {implementation}; again: {again}{' '.join(implementations)}")
        raise


def main() -> int:
    """The command line."""
    from fuzz import legal

    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--problems", type=int, help="how many, however long they take")
    parser.add_argument("--first", type=int, default=secrets.randbits(30), help="seed of the first")
    parser.add_argument("--seed", type=int, help="one problem, alone")
    parser.add_argument("--only", nargs="+", choices=legal.OPERATORS, default=[*legal.OPERATORS])
    parser.add_argument("--on", nargs="+", default=["cpu", "cpu", "reference"],
                        help="implementations, drawn in this proportion")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.seed is not None:
        print(run(arguments.seed, arguments.only, arguments.on))
        return 0
    print(f"seeds from {arguments.first}")
    began = time.monotonic()
    for done in itertools.count():
        passed = time.monotonic() - began
        if arguments.problems is None:
            part = passed / arguments.seconds
        else:
            part = done / max(1, arguments.problems)
        if sys.stderr.isatty() or done % 100 == 0:
            bar = "#" * int(20 * min(1, part))
            start, end = ("\r", "") if sys.stderr.isatty() else ("", "\n")
            print(f"{start}[{bar:20}] {done} problems, {passed:.0f} s", end=end, file=sys.stderr,
                  flush=True)  # fmt: skip
        if part >= 1:
            break
        run(arguments.first + done, arguments.only, arguments.on)
    print(f"\n{done} problems, none wrong")
    return 0


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    sys.exit(main())
