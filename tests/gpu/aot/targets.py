"""The GPUs that kernels are compiled for, with the limits that decide occupancy and the speeds that decide floors.

Sources: NVIDIA's CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability" (registers, warps,
blocks, shared memory); the data sheets of A100 80GB SXM, L40S, H100 SXM and B200 (memory bandwidth, dense tensor
throughput); AMD's CDNA3 ISA guide and the MI300X data sheet.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One compile target.

    registers: per SM, 32 bit. max_warps, max_ctas: resident per SM. shared_per_sm, shared_per_cta: bytes.
    bandwidth: bytes/s of DRAM. tensor_flops: dense 16-bit operations/s, 2 per multiply-add; 8-bit ones are twice that.
    """

    name: str
    gpu: str
    backend: str
    arch: int | str
    warp_size: int
    registers: int
    max_warps: int
    max_ctas: int
    shared_per_sm: int
    shared_per_cta: int
    num_sms: int
    bandwidth: float
    tensor_flops: float

    @property
    def is_cuda(self) -> bool:
        return self.backend == "cuda"


def _cuda(
    arch: int, gpu: str, max_warps: int, max_ctas: int, shared_kib: int, sms: int, tbs: float, tflops: float
) -> Target:
    shared = shared_kib << 10
    return Target(
        f"cuda:{arch}", gpu, "cuda", arch, 32, 65536, max_warps, max_ctas, shared, shared - 1024, sms, tbs * 1e12,
        tflops * 1e12,
    )  # fmt: skip


_ALL = (
    _cuda(80, "A100 80GB SXM", 64, 32, 164, 108, 2.039, 312),
    _cuda(89, "L40S", 48, 24, 100, 142, 0.864, 362),
    _cuda(90, "H100 SXM", 64, 32, 228, 132, 3.35, 989),
    _cuda(100, "B200", 64, 32, 228, 148, 8.0, 2250),
    # A CU has 4 SIMDs of 8 waves and 512 vector registers a lane each; 64 KiB of LDS.
    Target(
        "hip:gfx942", "MI300X", "hip", "gfx942", 64, 65536, 32, 32, 65536, 65536, 304, 5.3e12, 1307e12
    ),
)  # fmt: skip
TARGETS = {target.name: target for target in _ALL}
