"""Mutates files, one change at a time, and lists the changes that no test notices.

    python -m mutation                                all of them: hours
    python -m mutation jax_nsa/paged.py cc/blocks.h   these files
    python -m mutation --sample 40 --seed 7           that many of each, drawn

Run it in tests/. It goes on where it was stopped; what is known of a file is forgotten when the
file changes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import random
import sys

from mutation import mutants
from mutation.runner import ROOT, prepared
from mutation.targets import HEADERS, LINKED, TESTS

FATES = ("killed", "survived", "invalid")


class Journal:
    """The fates that are known, in a file with a line for each."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else ()
        self.fates = {entry["key"]: entry["fate"] for entry in map(json.loads, lines)}

    def add(self, key: str, mutant: mutants.Mutant | None, fate: str) -> None:
        """Keeps a fate."""
        self.fates[key] = fate
        with open(self.path, "a") as file:
            file.write(json.dumps({"key": key, "mutant": str(mutant), "fate": fate}) + "\n")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mutation", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("files", nargs="*", default=[*HEADERS, *LINKED, *TESTS])
    parser.add_argument("--sample", type=int, help="mutants of each file, drawn; else all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build" / "mutation",
                        help="build directory of the module, for the sources in cc/")  # fmt: skip
    arguments = parser.parse_args()
    journal = Journal(arguments.build / "fates.jsonl")
    survivors: list[mutants.Mutant] = []
    counts = dict.fromkeys(FATES, 0)
    with prepared(arguments.build) as runner:
        for path in arguments.files:
            source = (ROOT / path).read_text()
            chosen = mutants.of(path, source)
            if arguments.sample is not None and arguments.sample < len(chosen):
                chosen = random.Random(f"{arguments.seed} {path}").sample(chosen, arguments.sample)
            digest = hashlib.sha256(source.encode()).hexdigest()[:12]
            if journal.fates.get(f"{path} {digest}") != "survived":
                fate = runner.run(None, path)
                if fate != "survived":
                    raise SystemExit(f"the tests of {path} fail as it is")
                journal.add(f"{path} {digest}", None, fate)
            for n, mutant in enumerate(sorted(chosen, key=lambda m: m.start)):
                _show(path, n, len(chosen))
                key = f"{path} {digest} {mutant.start} {mutant.wrong}"
                fate = journal.fates.get(key) or runner.run(mutant, path)
                if key not in journal.fates:
                    journal.add(key, mutant, fate)
                counts[fate] += 1
                if fate == "survived":
                    survivors.append(mutant)
                    print(f"\r{mutant}", flush=True)
    print("\r" + ", ".join(f"{count} {fate}" for fate, count in counts.items()))
    return int(bool(survivors))


def _show(path: str, done: int, all_of_them: int) -> None:
    bar = "#" * (20 * done // all_of_them)
    if sys.stderr.isatty():
        print(f"\r[{bar:20}] {done}/{all_of_them} {path}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
