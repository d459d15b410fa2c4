"""What this machine has and which back ends could run on it, found without importing torch.

Called by `headrace doctor` and `headrace serve`, by the engine process where nobody chose its threads, and by the
benches, which print the machine beside their numbers.
"""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import psutil
from headrace.kernels.gpu import device
from headrace.kernels.native import library
from headrace.models.errors import ModelError
from headrace.server import backends
from headrace.server.cli import cgroups

# The instruction sets that matter for matrix products with small integers and half floats, as /proc/cpuinfo names them.
_SIMD = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
_VERSIONS = ("headrace", "grpcio", "protobuf", "numpy", "tokenizers", "torch", "triton", "flash-attn")


@dataclass(frozen=True)
class Machine:
    """The hardware as this process may use it. Memory in bytes; `cpu_limit` is the cgroup's, in CPUs.

    usable_cores: physical ones that this process's affinity touches.
    """

    system: str
    cpu: str
    simd: tuple[str, ...]
    physical_cores: int
    logical_cores: int
    usable_cores: int
    numa_nodes: int
    cpu_limit: float | None
    memory: int
    memory_available: int
    memory_limit: int | None
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class Backend:
    """Something that can run a step program, and why it is or is not chosen."""

    name: str
    is_available: bool
    is_chosen: bool
    why: str


@dataclass(frozen=True)
class Threads:
    """How many threads compute, and why."""

    count: int
    why: str


def choose_threads(machine: Machine) -> Threads:
    """One thread per physical core that this process may use: the work is bound by arithmetic units and memory."""
    bounds = [(machine.physical_cores, "one per physical core")]
    if machine.usable_cores < machine.physical_cores:
        bounds.append((machine.usable_cores, "one per physical core that this process may run on"))
    if machine.cpu_limit is not None:
        bounds.append((max(1, int(machine.cpu_limit)), f"the cgroup allows {machine.cpu_limit:g} CPUs"))
    count, why = min(bounds, key=lambda bound: bound[0])
    if machine.numa_nodes > 1:
        why += f"; {machine.numa_nodes} NUMA nodes, of which threads know nothing: numactl keeps them on one"
    return Threads(count, why)


def detect_machine() -> Machine:
    """Looks at /proc, the cgroup and, only where the NVIDIA driver is loaded, at CUDA."""
    fields = _cpu_fields()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    memory = psutil.virtual_memory()
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=fields.get("model name", platform.processor() or platform.machine()),
        simd=tuple(name for name in _SIMD if name in flags),
        physical_cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        logical_cores=psutil.cpu_count() or 1,
        usable_cores=_usable_cores(),
        numa_nodes=max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))),
        cpu_limit=cgroups.cpu_limit(),
        memory=memory.total,
        memory_available=memory.available,
        memory_limit=cgroups.memory_limit(),
        gpus=_gpus(),
    )


def detect_backends(machine: Machine) -> list[Backend]:
    """Every back end of Headrace, the one that a server would choose here first."""
    wanted = os.environ.get("HEADRACE_BACKEND") or "auto"
    chosen, why_fallback = "", ""
    with suppress(ModelError):  # then no back end is chosen, and each says why not
        choice = backends.choose(wanted)
        chosen, why_fallback = choice.name, choice.why if choice.is_fallback else ""
    found = [_native(chosen == "native"), _torch(chosen == "torch", why_fallback)]
    triton = _triton(chosen == "triton")
    found.sort(key=lambda backend: not backend.is_chosen)
    flash = "flash-attn is installed; --attention flash takes it" if _has_flash() else "flash-attn is not installed"
    rest = [triton, Backend("flash-attn", triton.is_available and _has_flash(), False, flash)]
    return [triton, *found, rest[1]] if triton.is_chosen else [*found, *rest]


def _triton(is_chosen: bool) -> Backend:
    found = device.probe()
    name = "triton-interpreter" if found.interprets else "triton-cuda"
    return Backend(name, found.is_usable, is_chosen, found.why)


def _has_flash() -> bool:
    return util.find_spec("flash_attn") is not None


def _native(is_chosen: bool) -> Backend:
    try:
        info = library.info()
    except library.NativeLibraryError as error:
        return Backend("native", False, False, str(error))
    return Backend(f"native-{info.isa}", True, is_chosen, backends.describe(info))


def _torch(is_chosen: bool, why_fallback: str) -> Backend:
    if not backends.has_torch():
        return Backend("torch-cpu", False, False, "torch is not installed: pip install 'headrace[server,torch]'")
    return Backend(
        "torch-cpu", True, is_chosen, why_fallback or "the reference: slow, and what the others must agree with"
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter; what is absent is left out."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _cpu_fields() -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return fields
    for line in lines:
        if not line.strip():
            break
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    return fields


def _usable_cores() -> int:
    """Physical cores among the CPUs of this process's affinity."""
    if not hasattr(os, "sched_getaffinity"):
        return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def _gpus() -> tuple[str, ...]:
    """As NVIDIA's own tool names them: name, compute capability, memory."""
    if not Path("/dev/nvidia0").exists():
        return ()
    query = ("--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader")
    try:
        done = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip())
