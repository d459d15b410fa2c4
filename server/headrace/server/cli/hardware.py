"""What this machine has and which back ends could run on it, found without importing torch where there is no GPU.

Called by `headrace doctor`, and by the benches, which print the machine beside their numbers.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import psutil

# The instruction sets that matter for matrix products with small integers and half floats, as /proc/cpuinfo names them.
_SIMD = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
_VERSIONS = ("headrace", "grpcio", "protobuf", "numpy", "tokenizers", "torch", "triton", "flash-attn")


@dataclass(frozen=True)
class Machine:
    """The hardware as this process may use it. Memory in bytes; `cpu_limit` is the cgroup's, in CPUs."""

    system: str
    cpu: str
    simd: tuple[str, ...]
    physical_cores: int
    logical_cores: int
    usable_cores: int  # by affinity
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
        bounds.append((machine.usable_cores, "one per core that this process may use"))
    if machine.cpu_limit is not None:
        bounds.append((max(1, int(machine.cpu_limit)), f"the cgroup allows {machine.cpu_limit:g} CPUs"))
    count, why = min(bounds)
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
        physical_cores=psutil.cpu_count(logical=False) or 1,
        logical_cores=psutil.cpu_count() or 1,
        usable_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu_limit=_cgroup_cpus(),
        memory=memory.total,
        memory_available=memory.available,
        memory_limit=_cgroup_memory(),
        gpus=_gpus(),
    )


def detect_backends(machine: Machine) -> list[Backend]:
    """Every back end of Headrace, the one that a server would choose here first."""
    has_torch, has_gpu = util.find_spec("torch") is not None, bool(machine.gpus)
    backends = [
        Backend(
            "torch-cpu",
            has_torch,
            has_torch,
            "the reference operators; the only back end of this version that is finished"
            if has_torch
            else "torch is not installed: pip install 'headrace[server,torch]'",
        )
    ]
    if util.find_spec("headrace.kernels.native") is None:
        backends.append(Backend("native-cpu", False, False, "not part of this version"))
    gpu = machine.gpus[0] if has_gpu else "no NVIDIA GPU that torch can use"
    missing = [name for name in ("triton",) if util.find_spec(name) is None]
    why = f"{gpu}; {', '.join(missing)} not installed" if missing and has_gpu else gpu
    backends.append(Backend("triton-cuda", False, False, f"{why}; not part of this version" if has_gpu else why))
    has_flash = util.find_spec("flash_attn") is not None
    backends.append(
        Backend("flash-attn", has_flash and has_gpu, False, "installed" if has_flash else "flash-attn is not installed")
    )
    return backends


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


def _cgroup_files(name: str) -> Iterator[str]:
    """The contents of one control file in this process's cgroup (version 2) and all cgroups around it."""
    try:
        own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        own = "/"
    root = Path("/sys/fs/cgroup")
    here = root / own.strip().lstrip("/")
    for folder in (here, *here.parents):
        with suppress(OSError):
            yield (folder / name).read_text().strip()
        if folder == root:
            return


def _cgroup_cpus() -> float | None:
    limits = []
    for content in _cgroup_files("cpu.max"):
        quota, _, period = content.partition(" ")
        if quota != "max" and period:
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def _cgroup_memory() -> int | None:
    return min((int(content) for content in _cgroup_files("memory.max") if content != "max"), default=None)


def _gpus() -> tuple[str, ...]:
    if not Path("/dev/nvidia0").exists() or util.find_spec("torch") is None:
        return ()
    import torch  # seconds, and only on a machine with a GPU

    if not torch.cuda.is_available():
        return ()
    return tuple(
        f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}, "
        f"{torch.cuda.get_device_properties(i).total_memory / 1e9:.0f} GB)"
        for i in range(torch.cuda.device_count())
    )
