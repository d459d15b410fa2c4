"""How the native library is compiled, packed into a wheel, found and refused: build.py, hatch_build.py and library.py.

The compiler is real; most tests compile a source tree of a few lines, so that they take milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from headrace.kernels.native import build, library

ROOT = Path(__file__).parents[2]
API = 'extern "C" __attribute__((visibility("default"))) '
SOURCES = {
    "value.h": "#pragma once\nconstexpr int kValue = 1;\n",
    "api.cpp": f'#include "value.h"\n{API}int hr_value() {{ return kValue; }}\n'
    f"{API}const char* hr_hash() {{ return HR_SOURCE_HASH; }}\n",
    "isa_generic.cpp": f"{API}int hr_generic_has_avx2() {{\n#ifdef __AVX2__\nreturn 1;\n#else\nreturn 0;\n#endif\n}}\n",
    "isa_avx2.cpp": f"#ifndef __AVX2__\n#error wrong flags\n#endif\n{API}int hr_only_x86() {{ return 1; }}\n",
    "isa_neon.cpp": f"#ifndef __ARM_FEATURE_DOTPROD\n#error wrong\n#endif\n{API}int hr_only_arm() {{ return 1; }}\n",
}


class Tree:
    """A small csrc, and what building it says."""

    def __init__(self, root: Path) -> None:
        self.csrc = root / "kernels" / "csrc"
        self.output = root / "out" / "_native.so"
        self.csrc.mkdir(parents=True)
        for name, text in SOURCES.items():
            (self.csrc / name).write_text(text)

    def write(self, name: str, text: str) -> None:
        (self.csrc / name).write_text(text)

    def build(self, **options: object) -> list[str]:
        lines: list[str] = []
        build.build(csrc=self.csrc, output=self.output, log=lines.append, **options)  # type: ignore[arg-type]
        return lines

    def load(self) -> ctypes.CDLL:
        """A copy, as a library that is loaded already would not be loaded again."""
        copy = self.output.with_name(f"copy{len(list(self.output.parent.iterdir()))}.so")
        shutil.copy(self.output, copy)
        return ctypes.CDLL(str(copy))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_each_instruction_set_gets_its_flags_and_no_other(tree: Tree) -> None:
    tree.build(werror=True)
    native = tree.load()
    assert native.hr_generic_has_avx2() == 0
    assert hasattr(native, "hr_only_x86") == (build.host_architecture() == "x86_64")
    assert hasattr(native, "hr_only_arm") == (build.host_architecture() == "aarch64")


def test_an_instruction_set_without_flags_is_refused(tree: Tree) -> None:
    tree.write("isa_sse9.cpp", "")
    with pytest.raises(build.BuildError, match=r"isa_sse9\.cpp"):
        tree.build()


def test_a_build_compiles_what_has_changed_and_nothing_else(tree: Tree) -> None:
    num_sources = 2 + (build.host_architecture() in ("x86_64", "aarch64"))
    first = tree.build()
    assert f"compiling {num_sources} of {num_sources} sources" in first[0]
    before = tree.output.stat().st_mtime_ns
    assert tree.build() == []
    assert tree.output.stat().st_mtime_ns == before
    tree.write("value.h", SOURCES["value.h"].replace("1", "2"))
    assert f"compiling 1 of {num_sources} sources" in tree.build()[0]
    assert tree.load().hr_value() == 2
    tree.write("value.h", SOURCES["value.h"])
    tree.build()
    assert tree.load().hr_value() == 1
    assert f"compiling {num_sources} of" in tree.build(sanitize=("undefined",), build_dir=tree.csrc / "ubsan")[0]


def test_the_library_knows_its_sources(tree: Tree) -> None:
    tree.build()
    native = tree.load()
    native.hr_hash.restype = ctypes.c_char_p
    before = build.source_hash(tree.csrc)
    assert native.hr_hash().decode() == before
    for name, text in (("value.h", "#pragma once\nconstexpr int kValue = 3;\n"), ("isa_neon.cpp", ""), ("new.h", "")):
        tree.write(name, text)
        assert build.source_hash(tree.csrc) != before, name
        before = build.source_hash(tree.csrc)


def test_a_mistake_names_the_file_and_leaves_the_old_library(tree: Tree) -> None:
    tree.build()
    before = tree.output.read_bytes()
    tree.write("api.cpp", "int broken( { }")
    with pytest.raises(build.BuildError, match=r"api\.cpp does not compile[\s\S]*error: "):
        tree.build()
    tree.write("api.cpp", "int missing(); int user() { return missing(); }")
    with pytest.raises(build.BuildError, match=r"does not link[\s\S]*missing"):
        tree.build()
    assert tree.output.read_bytes() == before
    assert [path.name for path in tree.output.parent.iterdir()] == [tree.output.name]


def test_warnings_are_errors_where_that_is_asked_for(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRACE_NATIVE_WERROR", raising=False)
    tree.write("api.cpp", "static int unused() { return 1; }")
    assert any("unused" in line for line in tree.build())
    monkeypatch.setenv("HEADRACE_NATIVE_WERROR", "1")
    with pytest.raises(build.BuildError, match="unused"):
        tree.build()


def test_without_a_compiler_it_is_said_what_to_install(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.NoCompilerError, match=r"Debian.*g\+\+.*Fedora.*Alpine.*macOS"):
        tree.build()
    with pytest.raises(build.NoCompilerError, match=r"apt install g\+\+-riscv64-linux-gnu"):
        tree.build(target="riscv64")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.NoCompilerError, match="no-such-compiler"):
        tree.build()


def test_a_compiler_with_arguments_is_taken_from_the_environment(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.write("api.cpp", f"{API}int hr_value() {{ return FROM_CXX; }}")
    monkeypatch.setenv("CXX", f"{' '.join(build.find_compiler().command)} -DFROM_CXX=7")
    tree.build()
    assert tree.load().hr_value() == 7


ABI = f"""
#include <cstdlib>
{API}int hr_abi_version() {{ return {library.ABI_VERSION}; }}
{API}const char* hr_source_hash() {{ return HR_SOURCE_HASH; }}
{API}const char* hr_isa_name() {{ return std::getenv("HEADRACE_NATIVE_ISA") ? "" : "generic"; }}
{API}const char* hr_isa_names_compiled() {{ return "avx2,generic"; }}
{API}const char* hr_isa_names_usable() {{ return "generic"; }}
{API}const char* hr_last_error() {{ return ""; }}
"""


class Checkout(Tree):
    """A copy of this package's loader over a small csrc, used as a user would: in a process of its own."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.root = root / "kernels"
        self.package = self.root / "headrace" / "kernels" / "native"
        self.output = self.package / "_native.so"
        self.package.mkdir(parents=True)
        for path in (library.__file__, build.__file__):
            shutil.copy(path, self.package)
        self.write("headrace_native.h", "#pragma once\n")
        self.write("api.cpp", ABI)

    def ask(self, **environment: str) -> str:
        """What `library.info()` says: its names, or the error."""
        code = (
            f"import sys; sys.path.insert(0, {str(self.root)!r})\n"
            "from headrace.kernels.native import library\n"
            f"assert library.__file__.startswith({str(self.root)!r})\n"
            "try:\n    print(library.load().hr_abi_version(), library.info())\n"
            "except library.NativeLibraryError as error:\n    print(error)"
        )
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
        command = [sys.executable, "-S", "-c", code]
        return subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_a_library_that_fits_is_loaded_and_described(checkout: Checkout) -> None:
    checkout.build()
    said = checkout.ask()
    assert f"{library.ABI_VERSION} NativeInfo(" in said
    assert "isa='generic', compiled=('avx2', 'generic'), usable=('generic',)" in said


def test_an_instruction_set_that_cannot_run_is_refused(checkout: Checkout) -> None:
    checkout.build()
    said = checkout.ask(HEADRACE_NATIVE_ISA="avx2")
    assert "HEADRACE_NATIVE_ISA=avx2 cannot run here" in said
    assert "this CPU runs generic" in said


def test_a_missing_library_says_what_to_do(checkout: Checkout) -> None:
    said = checkout.ask()
    assert "make native" in said
    assert "apt install g++" in said
    shutil.rmtree(checkout.csrc)  # an installed package has no sources
    said = checkout.ask()
    assert "make" not in said
    assert "apt install g++" in said
    assert "install headrace again" in said


def test_a_stale_library_is_refused(checkout: Checkout) -> None:
    checkout.build()
    checkout.write("value.h", "#pragma once\n")
    assert "make native" in checkout.ask()
    checkout.build()
    assert "NativeInfo(" in checkout.ask()


def test_a_library_of_another_abi_is_refused(checkout: Checkout) -> None:
    checkout.write("api.cpp", ABI.replace(f"return {library.ABI_VERSION};", "return 99;"))
    checkout.build()
    assert f"ABI is 99, not {library.ABI_VERSION}: run `make native`" in checkout.ask()


def test_another_library_can_be_named(checkout: Checkout, tmp_path: Path) -> None:
    checkout.build()
    elsewhere = tmp_path / "elsewhere.so"
    checkout.output.rename(elsewhere)
    checkout.write("value.h", "#pragma once\n")  # a sanitizer build is the caller's choice, as it is
    assert f"PosixPath('{elsewhere}')" in checkout.ask(HEADRACE_NATIVE_LIBRARY=str(elsewhere))
    assert "no such file" in checkout.ask(HEADRACE_NATIVE_LIBRARY=str(tmp_path / "nowhere.so"))
    elsewhere.write_bytes(b"not a library")
    assert "cannot be loaded" in checkout.ask(HEADRACE_NATIVE_LIBRARY=str(elsewhere))


# ---- this checkout's own library ---------------------------------------------------------------------------------


def test_the_abi_version_is_that_of_the_header() -> None:
    header = (build.CSRC / "headrace_native.h").read_text()
    assert f"#define HR_ABI_VERSION {library.ABI_VERSION}\n" in header


def test_only_the_c_abi_is_visible() -> None:
    """Another package's libstdc++ in the same process must neither see ours nor be used by it."""
    listed = subprocess.run(["nm", "-D", "--defined-only", build.LIBRARY], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert "hr_abi_version" in names
    assert [name for name in names if not name.startswith("hr_")] == []


def test_code_for_one_instruction_set_cannot_be_linked_into_another(tmp_path: Path) -> None:
    """An inline function outside the set's own namespace exists once per library: whichever copy the linker keeps runs
    on every CPU, AVX-512 instructions included."""
    host, root = build.host_architecture(), build.CSRC.parents[1] / "build" / "native"
    objects = [*root.glob(f"{host}/isa_*.o"), *root.glob(f"{host}-werror/isa_*.o")]
    assert objects
    shared = []
    for path in objects:
        isa = path.stem.split("-")[0].removeprefix("isa_")
        listed = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True)
        for line in listed.stdout.splitlines():
            _, kind, name = line.split(maxsplit=2)
            if kind in "WVu" and f"headrace::{isa}::" not in name:
                shared.append(f"{isa}: {name}")
    assert shared == []


def build_wheel(directory: Path, **environment: str) -> Path:
    """Build this checkout's wheel as pip would, offline; what is compiled already is not compiled again."""
    code = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(directory)]
    done = subprocess.run(command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (directory / "log").write_text(done.stdout + done.stderr)
    return directory / done.stdout.splitlines()[-1]


def test_the_wheel_holds_a_library_that_runs_without_the_checkout(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    _, _, python, abi, platform = wheel.stem.split("-")
    assert (python, abi) == ("py3", "none")
    assert platform.endswith(build.host_architecture())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        info = next(name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert "Root-Is-Purelib: false" in archive.read(info).decode()
        assert [name for name in archive.namelist() if "csrc" in name or name.endswith((".cpp", ".o"))] == []
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "from headrace.kernels.native import library; print(library.info().path, library.info().isa)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path, isa = done.stdout.split()
    assert Path(path).is_relative_to(tmp_path)
    assert isa


@pytest.mark.parametrize("reason", ["HEADRACE_NO_NATIVE", "PATH"])
def test_without_a_compiler_the_wheel_is_pure_python_and_says_so(tmp_path: Path, reason: str) -> None:
    environment = {"HEADRACE_NO_NATIVE": "1"} if reason == "HEADRACE_NO_NATIVE" else {"PATH": str(tmp_path), "CXX": ""}
    wheel = build_wheel(tmp_path, **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "headrace/kernels/native/library.py" in archive.namelist()
        assert [name for name in archive.namelist() if name.endswith(".so")] == []
    said = (tmp_path / "log").read_text()
    assert "WITHOUT THE NATIVE LIBRARY" in said
    assert ("apt install g++" in said) == (reason == "PATH")


def test_the_source_distribution_can_be_compiled(tmp_path: Path) -> None:
    code = "import sys; from hatchling.build import build_sdist; print(build_sdist(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in build.CSRC.iterdir() if path.suffix in (".cpp", ".h")}
    assert sources <= names
    assert "kernels/hatch_build.py" in names
    assert [name for name in names if name.endswith((".so", ".o"))] == []
