"""Compiles kernels/csrc into the native library. Run by `make native`, by the package's build (kernels/hatch_build.py,
which imports this file by its path) and by tests; needs the standard library only.

Each `isa_<name>.cpp` is compiled with the flags of that instruction set, every other source with none: one library runs
on every CPU of its architecture. Objects are named by a hash of the source, the headers that it includes, the flags and
the compiler, so that a second build compiles what has changed and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"  # in a source checkout; an installed package has none
LIBRARY = HERE / "_native.so"
COMPILER_HINT = (
    "Debian or Ubuntu: apt install g++; Fedora: dnf install gcc-c++; Alpine: apk add g++; macOS: xcode-select --install"
)

_COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
# The same bits on every instruction set: no multiply-add that the source does not spell out.
_COMMON += ["-ffp-contract=off", "-fno-math-errno"]
# GCC 12 otherwise turns a chain of accumulations into a tree, hoists all products and spills them (2.4 times slower).
_GCC = ["-fno-tree-reassoc"]
_SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
# Checks of addresses as calls rather than in place: GCC 12 compiles AVX2's kernels in 9 s instead of 12 (with -g: 20).
_GCC_ADDRESS = ["--param=asan-instrumentation-with-call-threshold=0"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
# Instruction set -> (architecture or "" for any, flags).
_ISAS: dict[str, tuple[str, list[str]]] = {
    # The oracle of the others. At -O3 GCC 12 miscompiles its tiles: a part of a block is lost (-fno-tree-vrp and clang
    # are right too).
    "generic": ("", ["-O2"]),
    "avx2": ("x86_64", _AVX2),
    "avx512": ("x86_64", _AVX512),
    "avx512vnni": ("x86_64", [*_AVX512, "-mavx512vnni"]),
    "neon": ("aarch64", ["-march=armv8.2-a+dotprod+fp16"]),
}
_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}
_SANITIZERS = ("address", "undefined", "thread")


class BuildError(Exception):
    """The library cannot be built. The message is for whoever runs the build."""


class NoCompilerError(BuildError):
    """There is no C++ compiler."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler. `architecture` is that of the machine it compiles for, as `uname -m` says it on Linux."""

    command: tuple[str, ...]
    version: str
    is_clang: bool
    architecture: str


@dataclass(frozen=True)
class Unit:
    """One source to compile: `arguments` are complete but for the output."""

    source: Path
    arguments: tuple[str, ...]
    object: Path


def build(
    *,
    output: Path = LIBRARY,
    csrc: Path = CSRC,
    build_dir: Path | None = None,
    sanitize: Sequence[str] = (),
    target: str = "",
    cxx: str = "",
    werror: bool | None = None,
    program: Path | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Path:
    """Compile and link what is not up to date; returns `output`, which is replaced in one piece.

    sanitize: any of address, undefined, thread. target: an architecture to cross-compile for ("aarch64").
    werror: warnings are errors; None: where HEADRACE_NATIVE_WERROR is set (developers and CI).
    build_dir: where objects are kept; one is chosen under build/native. program: a folder of more sources, which make
    `output` a program instead of a library, static so that an emulator needs nothing else. Raises BuildError.
    """
    compiler = find_compiler(cxx, target)
    if werror is None:
        werror = os.environ.get("HEADRACE_NATIVE_WERROR", "") not in ("", "0")
    name = "-".join([compiler.architecture, *sanitize, *(["werror"] if werror else [])])
    build_dir = build_dir or csrc.parents[1] / "build" / "native" / name
    build_dir.mkdir(parents=True, exist_ok=True)
    with _locked(build_dir):
        flags = [*_COMMON, *(["-Werror"] if werror else []), *([] if compiler.is_clang else _GCC)]
        if sanitize:
            flags += [f"-fsanitize={','.join(sanitize)}", *_SANITIZED]
            flags += _GCC_ADDRESS if "address" in sanitize and not compiler.is_clang else []
        units = _units(compiler, csrc, flags, build_dir, program)
        missing = [unit for unit in units if not unit.object.exists()]
        if missing:
            log(f"compiling {len(missing)} of {len(units)} sources with {compiler.version}")
        _compile(missing, log)
        _link(compiler, units, output, build_dir, is_program=program is not None, sanitize=sanitize, log=log)
    return output


def source_hash(csrc: Path = CSRC) -> str:
    """Of the names and contents of all sources: the library embeds it, so that a stale one is found out."""
    digest = hashlib.sha256()
    for path in sorted([*csrc.glob("*.cpp"), *csrc.glob("*.h")]):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def is_checkout() -> bool:
    """Whether this package lies beside its C++ sources."""
    return (CSRC / "headrace_native.h").is_file()


def find_compiler(cxx: str = "", target: str = "") -> Compiler:
    """`cxx`, else $CXX, else the first of c++, g++, clang++ that works; for a foreign target its cross compilers.

    Raises NoCompilerError.
    """
    if cxx:
        candidates = [cxx]
    elif target and target != host_architecture():
        candidates = [f"{target}-linux-gnu-g++", f"{target}-linux-gnu-clang++"]
    else:
        cxx = os.environ.get("CXX", "")
        candidates = [cxx] if cxx else ["c++", "g++", "clang++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            compiler = _probe(command)
            if compiler is not None and (not target or compiler.architecture == target):
                return compiler
    if cxx:
        raise NoCompilerError(f"{cxx} is no C++ compiler" + (f" for {target}" if target else ""))
    if target and target != host_architecture():
        raise NoCompilerError(f"no cross compiler for {target}: on Debian, apt install g++-{target}-linux-gnu")
    raise NoCompilerError(f"a C++ compiler is missing. {COMPILER_HINT}")


def host_architecture() -> str:
    """Of this machine, as `uname -m` says it on Linux."""
    machine = platform.machine().lower()
    return _ARCHITECTURES.get(machine, machine)


def _probe(command: list[str]) -> Compiler | None:
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
        machine = subprocess.run([*command, "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # macOS has a c++ that only asks to install the real one
        return None
    architecture = machine.strip().partition("-")[0]
    architecture = _ARCHITECTURES.get(architecture, architecture)
    return Compiler(tuple(command), version.partition("\n")[0], "clang" in version, architecture)


def _units(compiler: Compiler, csrc: Path, flags: list[str], build_dir: Path, program: Path | None) -> list[Unit]:
    sources = sorted(csrc.glob("*.cpp"))
    if not sources:
        raise BuildError(f"no sources in {csrc}")
    units = []
    for source in [*sources, *(sorted(program.glob("*.cpp")) if program is not None else [])]:
        own = [*flags, f"-I{csrc}"]
        if source.name.startswith("isa_"):
            isa = source.stem.removeprefix("isa_")
            if isa not in _ISAS:
                raise BuildError(f"{source.name}: no flags are known for this instruction set")
            architecture, isa_flags = _ISAS[isa]
            if architecture not in ("", compiler.architecture):
                continue
            own += [*isa_flags, "-fno-exceptions"]
        text = source.read_text()
        if "HR_SOURCE_HASH" in text:  # only there: any change would otherwise compile everything again
            own.append(f'-DHR_SOURCE_HASH="{source_hash(csrc)}"')
        digest = hashlib.sha256(repr((compiler, own)).encode())
        for path in _closure(source, csrc):
            digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
        arguments = (*compiler.command, *own, "-c", str(source))
        units.append(Unit(source, arguments, build_dir / f"{source.stem}-{digest.hexdigest()[:16]}.o"))
    return units


def _closure(source: Path, csrc: Path) -> list[Path]:
    """The source and every header of ours that it may include, whatever the preprocessor then leaves out."""
    seen, waiting = {source}, [source]
    while waiting:
        text = waiting.pop().read_text()
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
            for path in (source.parent / name, csrc / name):
                if path.is_file() and path not in seen:
                    seen.add(path)
                    waiting.append(path)
    return sorted(seen)


def _compile(units: list[Unit], log: Callable[[str], None]) -> None:
    def compile_one(unit: Unit) -> str:
        partial = unit.object.with_suffix(f".{os.getpid()}.part")
        done = subprocess.run([*unit.arguments, "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            partial.unlink(missing_ok=True)
            raise BuildError(f"{unit.source.name} does not compile:\n{shlex.join(unit.arguments)}\n{done.stderr}")
        partial.replace(unit.object)
        return done.stderr

    from concurrent.futures import ThreadPoolExecutor  # the server imports this file for `source_hash`

    units = sorted(units, key=lambda unit: not unit.source.name.startswith("isa_"))  # the long ones first
    with ThreadPoolExecutor(_num_jobs()) as pool:
        for warnings in pool.map(compile_one, units):
            if warnings:
                log(warnings.rstrip())


def _link(
    compiler: Compiler,
    units: list[Unit],
    output: Path,
    build_dir: Path,
    *,
    is_program: bool,
    sanitize: Sequence[str],
    log: Callable[[str], None],
) -> None:
    arguments = [*compiler.command, "-pthread", *([] if is_program else ["-shared"])]
    arguments += [str(unit.object) for unit in units]
    if sanitize:
        arguments.append(f"-fsanitize={','.join(sanitize)}")
    elif is_program and sys.platform == "linux":
        arguments.append("-static")
    elif sys.platform == "linux":
        # Whichever libstdc++ another package has loaded, ours is inside, and nothing but the C ABI shows.
        exports = build_dir / "exports.map"
        exports.write_text("{ global: hr_*; local: *; };\n")
        arguments += [f"-Wl,--version-script={exports}", "-Wl,--no-undefined", "-static-libgcc"]
        if os.sep in _output([*compiler.command, "-print-file-name=libstdc++.a"]):  # Fedora has it in another package
            arguments.append("-static-libstdc++")
    stamp = build_dir / f"{output.name}.stamp"
    wanted = f"{output}\n{shlex.join(arguments)}\n"
    if output.exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.{os.getpid()}.part")
    done = subprocess.run([*arguments, "-o", str(partial)], capture_output=True, text=True)
    if done.returncode:
        partial.unlink(missing_ok=True)
        raise BuildError(f"the native library does not link:\n{shlex.join(arguments)}\n{done.stderr}")
    partial.replace(output)  # never written in place: a running server has it mapped
    stamp.write_text(wanted)
    log(f"built {output.name}")
    keep = {unit.object for unit in units}
    stems = {unit.source.stem for unit in units}
    for path in build_dir.glob("*.o"):  # older ones of the same sources
        if path not in keep and path.name.rpartition("-")[0] in stems:
            path.unlink()


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _num_jobs() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _locked(build_dir: Path) -> Iterator[None]:
    """One build at a time, where the system has locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (build_dir / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Entry point of `make native`. Returns the exit status."""
    import argparse

    parser = argparse.ArgumentParser(description="Compile the native library of Headrace.")
    parser.add_argument("--sanitize", default="", help="address,undefined or thread")
    parser.add_argument("--target", default="", help="cross-compile for this architecture, e.g. aarch64")
    parser.add_argument("--cxx", default="", help="the compiler; default: $CXX, c++, g++ or clang++")
    parser.add_argument("--output", type=Path, help="default: in place, or under build/native")
    parser.add_argument("--program", type=Path, help="a folder of more sources: makes a program")
    parser.add_argument("--werror", action="store_true", default=None, help="warnings are errors")
    options = parser.parse_args()
    sanitize = tuple(name for name in options.sanitize.split(",") if name)
    unknown = set(sanitize) - set(_SANITIZERS)
    if unknown:
        parser.error(f"--sanitize takes {', '.join(_SANITIZERS)}, not {', '.join(sorted(unknown))}")
    output = options.output
    if output is None:
        is_foreign = options.target not in ("", host_architecture())
        variant = "-".join([*([options.target] if is_foreign else []), *sanitize])
        output = CSRC.parents[1] / "build" / "native" / f"_native-{variant}.so" if variant else LIBRARY
    try:
        built = build(
            output=output,
            sanitize=sanitize,
            target=options.target,
            cxx=options.cxx,
            werror=options.werror,
            program=options.program,
            log=lambda line: print(line, flush=True),
        )
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, NoCompilerError) and not options.target:
            print("Without one, the slow torch reference still serves: make serve BACKEND=torch", file=sys.stderr)
        return 1
    if built != LIBRARY:
        print(built)
    return 0


if __name__ == "__main__":
    sys.exit(main())
