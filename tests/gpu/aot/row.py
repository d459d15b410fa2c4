"""One kernel on one target as numbers that a gate can compare and a table can show. Called by gate.py.

Analyses are kept beside Triton's own cache under the hash of the machine code, so a run in which nothing changed does
not disassemble anything.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from tests.gpu.aot import amdgcn, sass
from tests.gpu.aot.capture import Launch
from tests.gpu.aot.targets import Target

_CACHE = Path(os.environ.get("TRITON_CACHE_DIR", "build/gpu-gates/triton")).parent / "rows"
# What an analysis depends on besides the machine code: these files.
_VERSION = hashlib.sha256(
    b"".join(Path(__file__).with_name(name).read_bytes() for name in ("row.py", "sass.py", "amdgcn.py", "targets.py"))
).hexdigest()
TENSOR_COLUMNS = 512


@dataclass(frozen=True)
class Row:
    """registers per thread. spills: bytes or registers that went to local memory, with the stack; 0 is what we want.

    shared: bytes per CTA. ctas: resident per SM, and what limits them. matrix: matrix instructions by kind. loads:
    global loads by bytes per thread (cp.async among them); bulk: TMA instructions. loop: instructions of the main loop;
    loop_loads: its global loads by bytes per thread. size: all instructions. stores: those that others can see the
    effect of. tensor_memory: columns of it per CTA (sm_100). error: what the compiler said instead.
    """

    kernel: str
    target: str
    warps: int = 0
    registers: int = 0
    spills: int = 0
    shared: int = 0
    ctas: int = 0
    limit: str = ""
    matrix: dict[str, int] = field(default_factory=dict)
    loads: dict[int, int] = field(default_factory=dict)
    bulk: int = 0
    loop: int = 0
    loop_loads: dict[int, int] = field(default_factory=dict)
    size: int = 0
    stores: int = 0
    tensor_memory: int = 0
    error: str = ""

    @property
    def wide_share(self) -> float:
        """Of the bytes that the main loop loads, those loaded 16 at a time; a loop that only TMA feeds is wide."""
        loads = self.loop_loads or ({} if self.bulk else self.loads)
        total = sum(width * count for width, count in loads.items())
        return 16 * loads.get(16, 0) / total if total else 1.0

    @property
    def matrix_kinds(self) -> list[str]:
        return sorted({name.split(".")[0] for name in self.matrix})


def analyse(launch: Launch) -> Row:
    """Compile a launch and look at its machine code; what the compiler refuses is a row with an error."""
    target = launch.target
    try:
        compiled = launch.compile()
    except Exception as error:  # CompilationError, OutOfResources, an assertion of LLVM's wrapper ...
        cause = error.__cause__ or error
        text = " ".join(str(cause).split())[-300:]
        return Row(launch.kernel, target.name, error=f"{type(error).__name__}: {text}")
    code = compiled.asm["cubin"] if target.is_cuda else compiled.asm["amdgcn"].encode()
    metadata = compiled.metadata
    columns = getattr(metadata, "tmem_size", 0) or 0
    key = f"{_VERSION} {target.name} {metadata.num_warps} {metadata.shared} {columns}".encode() + code
    path = _CACHE / f"{hashlib.sha256(key).hexdigest()}.json"
    if path.is_file():
        data = json.loads(path.read_text())
        for name in ("loads", "loop_loads"):
            data[name] = {int(width): count for width, count in data[name].items()}
        return Row(**data)
    sizes = (metadata.num_warps, metadata.shared)
    row = _cuda_row(launch, code, *sizes, columns) if target.is_cuda else _hip_row(launch, code, *sizes)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(dataclasses.asdict(row)))
    temporary.replace(path)
    return row


def _cuda_row(launch: Launch, code: bytes, warps: int, shared: int, tensor_memory: int) -> Row:
    machine = sass.disassemble(code)
    loop = machine.main_loop()
    ctas, limit = _cuda_occupancy(launch.target, machine.registers, shared, warps, tensor_memory)
    return Row(
        kernel=launch.kernel,
        target=launch.target.name,
        warps=warps,
        registers=machine.registers,
        spills=machine.stack + machine.count(("LDL", "STL")),
        shared=shared,
        ctas=ctas,
        limit=limit,
        matrix=machine.matrix(),
        loads=sass.widths(machine.instructions, sass.LOADS),
        bulk=machine.count(sass.BULK),
        loop=len(loop),
        loop_loads=sass.widths(loop, sass.LOADS),
        size=len(machine.instructions),
        stores=machine.count(sass.STORES),
        tensor_memory=tensor_memory,
    )


def _cuda_occupancy(target: Target, registers: int, shared: int, warps: int, columns: int) -> tuple[int, str]:
    """CTAs that fit an SM: registers are given to warps in units of 256, shared memory in 128 bytes after 1 KiB.

    An SM that has tensor memory has 512 columns of it, of 128 lanes of 4 bytes (PTX ISA, "Tensor Memory").
    """
    per_warp = math.ceil(max(registers, 1) * 32 / 256) * 256
    per_cta = math.ceil((shared + 1024) / 128) * 128
    limits = {
        "registers": target.registers // per_warp // 4 * 4 // warps,
        "shared": target.shared_per_sm // per_cta if shared <= target.shared_per_cta else 0,
        "warps": target.max_warps // warps,
        "ctas": target.max_ctas,
    }
    if columns:
        limits["tensor memory"] = TENSOR_COLUMNS // columns
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


def _hip_row(launch: Launch, code: bytes, warps: int, shared: int) -> Row:
    machine = amdgcn.parse(code.decode())
    waves_per_simd = min(8, 512 // max(8, math.ceil(machine.registers / 8) * 8))
    limits = {"registers": waves_per_simd * 4 // warps, "shared": launch.target.shared_per_sm // max(1, shared)}
    limits["ctas"] = launch.target.max_ctas
    limit = min(limits, key=lambda name: limits[name])
    return Row(
        kernel=launch.kernel,
        target=launch.target.name,
        warps=warps,
        registers=machine.registers,
        spills=machine.spills + machine.stack,
        shared=shared,
        ctas=limits[limit],
        limit=limit,
        matrix=machine.matrix(),
        loads=machine.widths(),
        loop=machine.main_loop()[2],
        loop_loads=machine.loop_widths(),
        size=len(machine.instructions),
        stores=machine.stores(),
    )
