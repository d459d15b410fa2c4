"""Which GPU there is and whether the back end runs on it: asked once, at start, with a clear answer for the operator.

`probe` imports neither torch nor triton and may be called by the front end and `headrace doctor`; it asks the driver
through its own library (libcuda.so.1, whose C ABI is stable). The engine process asks torch again (`check_torch`).
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from importlib import util

MIN_CAPABILITY = (8, 0)  # Ampere: bf16 and asynchronous copies, which the kernels are written for
INTERPRET_VARIABLE = "TRITON_INTERPRET"

_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _NUM_SMS = 75, 76, 16  # CUdevice_attribute of cuda.h
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_DRIVER_MISMATCH = 803  # CUDA_ERROR_SYSTEM_DRIVER_MISMATCH


class GpuUnavailableError(RuntimeError):
    """There is no GPU that can be used; the message says why and what would help. is_broken: as in Probe."""

    def __init__(self, message: str, *, is_broken: bool = False) -> None:
        super().__init__(message)
        self.is_broken = is_broken


@dataclass(frozen=True)
class Gpu:
    """The first GPU that this process may use. memory in bytes; driver as CUDA's version, e.g. (13, 0)."""

    name: str
    capability: tuple[int, int]
    memory: int
    num_sms: int
    driver: tuple[int, int]

    @property
    def arch(self) -> str:
        """ "sm_90", as tuning tables name it."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True)
class Probe:
    """What was found: a GPU or why there is none. interprets: kernels run on the CPU in Triton's interpreter.
    is_broken: there is a GPU, and what keeps it from being used could be mended, or is its age."""

    gpu: Gpu | None
    why: str
    interprets: bool = False
    is_broken: bool = False

    @property
    def is_usable(self) -> bool:
        return self.interprets or self.gpu is not None


def interprets() -> bool:
    """Whether the environment asks for Triton's interpreter on the CPU."""
    return os.environ.get(INTERPRET_VARIABLE, "") not in ("", "0")


def probe() -> Probe:
    """Look for packages, driver and GPU. Never raises."""
    missing = [name for name in ("torch", "triton") if util.find_spec(name) is None]
    if missing:
        return Probe(None, f"{' and '.join(missing)} not installed: pip install 'headrace[server,gpu]'")
    if interprets():
        return Probe(None, f"{INTERPRET_VARIABLE}=1: kernels are interpreted on the CPU, for tests only", True)
    try:
        gpu = _ask_driver()
    except GpuUnavailableError as error:
        return Probe(None, str(error), is_broken=error.is_broken)
    problem = too_old(gpu)
    if problem:
        return Probe(None, problem, is_broken=True)
    major, minor = gpu.driver
    return Probe(gpu, f"{gpu.name}, {gpu.arch}, {gpu.memory / (1 << 30):.0f} GiB, driver for CUDA {major}.{minor}")


def too_old(gpu: Gpu) -> str:
    """Why the kernels cannot run on this GPU, or ""."""
    if gpu.capability >= MIN_CAPABILITY:
        return ""
    has, least = (".".join(map(str, numbers)) for numbers in (gpu.capability, MIN_CAPABILITY))
    return (
        f"{gpu.name} has compute capability {has}; the kernels need {least} or newer (Ampere: A100, RTX 30 and later)"
    )


def _ask_driver() -> Gpu:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise GpuUnavailableError("no NVIDIA driver (libcuda.so.1 cannot be loaded)") from None
    code = int(cuda.cuInit(0))
    if code:
        raise GpuUnavailableError(_init_failure(code), is_broken=code != _NO_DEVICE)
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    if count.value == 0:
        raise GpuUnavailableError(
            f"the driver shows no GPU (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')!r})"
        )
    device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    cuda.cuDeviceGetName(name, 256, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    return Gpu(
        name=name.value.decode(errors="replace"),
        capability=(attribute(_CAPABILITY_MAJOR), attribute(_CAPABILITY_MINOR)),
        memory=memory.value,
        num_sms=attribute(_NUM_SMS),
        driver=(version.value // 1000, version.value % 1000 // 10),
    )


def _init_failure(code: int) -> str:
    if code == _NO_DEVICE:
        return f"the driver shows no GPU (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')!r})"
    if code == _DRIVER_MISMATCH:
        return (
            "the kernel module and libcuda are of different driver versions (CUDA error 803): reboot or reload the "
            "module; in a container, use the host's libcuda"
        )
    return f"the NVIDIA driver does not start: CUDA error {code} from cuInit"


def driver_mismatch(driver: tuple[int, int], built_for: str | None) -> str:
    """Why a torch built for this CUDA version ("13.0", None: CPU only) cannot run on this driver, or ""."""
    if built_for is None:
        return "this torch was built without CUDA: install one that has it (pip install torch --index-url of CUDA)"
    wanted = tuple(int(part) for part in built_for.split(".")[:2])
    # A driver runs everything of its own major version (minor version compatibility, CUDA 11 and later).
    if driver[0] >= wanted[0]:
        return ""
    return (
        f"the driver is for CUDA {driver[0]}.{driver[1]} and this torch for CUDA {built_for}: update the driver, or "
        f"install a torch for CUDA {driver[0]}"
    )
