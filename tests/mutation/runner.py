"""Runs the tests of a mutant, which is never written into the working tree.

Python's tests run in a child of one process that has imported JAX; the child imports the mutant
instead of the file. Headers are compiled into tests of tests/cc, sources into a compiled module,
from those objects of a build that stay the same.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import pathlib
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator, Sequence

from mutation.mutants import Mutant
from mutation.targets import HEADERS, LINKED, PROGRAMS, TESTS, Program

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SECONDS, PROGRAM_SECONDS = 300, 20  # of processor time that pytest and a program may take
PROGRAM_KILOBYTES = 2**20  # of memory that a program without sanitizers may take

NATIVE = "jax_nsa._native"


class Runner:
    """Applies mutants and runs tests.

    Attributes:
        build: the build directory of the module and its tests, for mutants of sources; made by
            `cmake -S cc -B <build> -G Ninja -DJAX_NSA_TESTS=ON && ninja -C <build>`.
    """

    def __init__(self, build: pathlib.Path) -> None:
        self.build = build
        self.scratch = pathlib.Path(tempfile.mkdtemp(prefix="mutation"))
        self.clean: set[pathlib.Path] = set()  # objects without a mutant in them
        self.sound: set[Program] = set()  # programs that ran here without one

    def close(self) -> None:
        """Removes what was compiled."""
        shutil.rmtree(self.scratch)

    def run(self, mutant: Mutant | None, path: str) -> str:
        """The fate of a mutant of a file, or of the file as it is.

        "killed", "survived", or "invalid" where it does not compile.
        """
        source = (ROOT / path).read_text()
        if mutant is not None:
            source = mutant.apply(source)
        if path in HEADERS:
            return self._run_programs(path, source)
        if path in LINKED:
            program = self._link(path, source, LINKED[path])
            if program is None:
                return "invalid"
            failed = _quietly(str(program), seconds=PROGRAM_SECONDS, kilobytes=PROGRAM_KILOBYTES)
            return "killed" if failed else "survived"
        arguments = TESTS[path]
        if path.endswith(".py"):
            try:
                code = compile(source, str(ROOT / path), "exec")
            except SyntaxError:
                return "invalid"
            name = ".".join(pathlib.Path(path).with_suffix("").parts)
            return self._run_pytest(arguments, {name: code})
        module = self._link(path, source, "_native")
        return "invalid" if module is None else self._run_pytest(arguments, {NATIVE: module})

    def _run_programs(self, path: str, source: str) -> str:
        for program in map(PROGRAMS.get, HEADERS[path]):
            if program not in self.sound:
                if self._fate(program, path, (ROOT / path).read_text()) != "survived":
                    raise RuntimeError(f"{program.test} fails here without a mutant")
                self.sound.add(program)
            fate = self._fate(program, path, source)
            if fate != "survived":
                return fate
        return "survived"

    def _fate(self, program: Program, path: str, source: str) -> str:
        made = self._build(program, path, source)
        if made is None:
            return "invalid"
        sanitized = any("sanitize" in option for option in program.options)
        limit = "unlimited" if sanitized else PROGRAM_KILOBYTES
        failed = _quietly(str(made), seconds=PROGRAM_SECONDS, kilobytes=limit)
        return "killed" if failed else "survived"

    def _build(self, program: Program, path: str, source: str) -> pathlib.Path | None:
        """A program of tests/cc, one file changed; None where it does not compile."""
        tree, objects = self.scratch / "tree", []
        for directory in ("cc", "tests/cc"):
            shutil.copytree(ROOT / directory, tree / directory, dirs_exist_ok=True)
        (tree / path).write_text(source)
        gxx = ("g++", "-std=c++17", *program.options)
        for unit in (f"tests/cc/{program.test}", *program.sources):
            made = self.scratch / f"{hash(program)}" / f"{unit}.o"
            objects.append(str(made))
            if made in self.clean and not _includes(made, path):
                continue
            self.clean.discard(made)
            made.parent.mkdir(parents=True, exist_ok=True)
            command = (*gxx, "-Itests/cc", "-Icc", "-MD", "-c", unit, "-o", str(made))
            if _quietly(*command, cwd=tree):
                return None
            if not _includes(made, path):
                self.clean.add(made)
        linked = self.scratch / "program"
        return None if _quietly(*gxx, *objects, "-o", str(linked)) else linked

    def _link(self, path: str, source: str, target: str) -> pathlib.Path | None:
        """What the build links as `target`, one source changed; None where it does not compile."""
        listed = subprocess.run(
            ["ninja", "-C", str(self.build), "-t", "commands"],
            check=True, capture_output=True, text=True,
        ).stdout.splitlines()  # fmt: skip
        compiles = next(c for c in listed if c.endswith(str(ROOT / path)))
        link = next(c for c in listed if f" -o {target}" in c).split("&&")[1]
        mutated, unit = self.scratch / "mutant.cc", self.scratch / "mutant.o"
        mutated.write_text(source)
        words = shlex.split(compiles)
        at = words.index("-o")
        words = [w for w in words[:at] if not w.startswith(("-O", "-flto"))]
        include = f"-I{(ROOT / path).parent}"
        if _quietly(*words, "-O0", include, "-o", str(unit), "-c", str(mutated), cwd=self.build):
            return None
        words = shlex.split(link)
        at = words.index("-o")
        linked = self.scratch / pathlib.Path(words[at + 1]).name
        # Before the archives, which then have no more to give for it.
        words = [*words[:at], "-o", str(linked), str(unit), *words[at + 2 :]]
        own = path.removeprefix("cc/") + ".o"
        words = [w for w in words if not w.endswith(f"_native.dir/{own}")]
        assert _quietly(*words, cwd=self.build) == 0, shlex.join(words)
        return linked

    def _run_pytest(
        self, arguments: Sequence[str], instead: dict[str, types.CodeType | pathlib.Path]
    ) -> str:
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            return "survived" if status == 0 else "killed"
        with contextlib.suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            os.chdir(ROOT / "tests")
            sys.meta_path.insert(0, _Finder(instead))
            import pytest

            os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments]))
        os._exit(3)


class _Finder:
    """Finds these modules before the import system finds others of their names."""

    def __init__(self, instead: dict[str, types.CodeType | pathlib.Path]) -> None:
        self.instead = instead

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        found = self.instead.get(name)
        if isinstance(found, types.CodeType):
            spec = importlib.util.spec_from_loader(name, _Loader(found), origin=found.co_filename)
            spec.has_location = True
            return spec
        if found is None:
            return None
        loader = importlib.machinery.ExtensionFileLoader(name, str(found))
        return importlib.util.spec_from_file_location(name, str(found), loader=loader)


class _Loader:
    """Loads what is compiled already."""

    def __init__(self, code: types.CodeType) -> None:
        self.code = code

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        exec(self.code, module.__dict__)


def _includes(made: pathlib.Path, path: str) -> bool:
    """Whether an object is made of a file, by the list that its compiler wrote beside it."""
    return path in made.with_suffix(".d").read_text().split()


def _quietly(
    *command: str, cwd: pathlib.Path | None = None, seconds: int = SECONDS,
    kilobytes: int | str = "unlimited",
) -> int:  # fmt: skip
    limit = f"ulimit -t {seconds} -v {kilobytes}; exec {shlex.join(command)}"
    return subprocess.run(
        ["bash", "-c", limit], capture_output=True, cwd=cwd, check=False
    ).returncode


@contextlib.contextmanager
def prepared(build: pathlib.Path) -> Iterator[Runner]:
    """A runner in a process that its children may start from."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    # Most of a test's programs are those of the test before.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(build / "jax-cache"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    import hypothesis  # noqa: F401
    import jax  # noqa: F401

    runner = Runner(build)
    try:
        yield runner
    finally:
        runner.close()
