"""Which back end computes here, and why: chosen once, when the engine process loads the model.

Called by engine_main, which makes the executor of the choice, and by `headrace doctor`. torch is looked for, and
imported only where it was chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import util
from typing import Literal

from headrace.kernels.gpu import device, quantization
from headrace.kernels.native import library
from headrace.kernels.native.library import NativeInfo, NativeLibraryError
from headrace.kernels.program import StepProgram
from headrace.models.errors import ModelError

KvDtype = Literal["fp32", "fp16", "bf16", "int8"]
BackendName = Literal["native", "triton", "torch"]

_BYTES: dict[KvDtype, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
_ALIGN = 64  # bytes: each KV head's part of a block is a multiple (kernels/csrc/kv.h)
_INSTALL_TORCH = "pip install 'headrace[server,torch]'"


@dataclass(frozen=True)
class Choice:
    """The back end that was chosen. is_fallback: nobody asked for it; it is what is left, and `why` says so."""

    name: BackendName
    why: str
    is_fallback: bool


def choose(wanted: str = "auto") -> Choice:
    """`wanted`: "native", "triton", "torch", or "auto" for the best that runs here. Raises ModelError with what to
    install. auto never takes the CPU where there is a GPU that the kernels could use but for its driver or age."""
    if wanted not in ("auto", "native", "triton", "torch"):
        raise ModelError(f"there is no back end {wanted}: native, triton, torch or auto")
    if wanted in ("auto", "triton"):
        found = device.probe()
        if found.gpu is not None or (found.interprets and wanted == "triton"):
            return Choice("triton", found.why, False)
        if wanted == "triton":
            raise ModelError(f"the triton back end cannot run: {found.why}")
        if found.is_broken:
            raise ModelError(f"the GPU cannot be used: {found.why}; --backend native serves on the CPU")
    if wanted == "torch":
        if has_torch():
            return Choice("torch", "asked for", False)
        raise ModelError(f"the torch back end needs torch: {_INSTALL_TORCH}")
    try:
        return Choice("native", describe(library.info()), False)
    except NativeLibraryError as error:
        if wanted == "native":
            raise ModelError(str(error)) from None
        if has_torch():
            why = f"{error}; the torch reference computes instead, which is many times slower"
            return Choice("torch", why, True)
        raise ModelError(f"{error}; or install the slow torch reference: {_INSTALL_TORCH}") from None


def describe(info: NativeInfo) -> str:
    """The native library's instruction sets, for people."""
    unusable = [name for name in info.compiled if name not in info.usable]
    rest = f"; not this CPU's: {', '.join(unusable)}" if unusable else ""
    return f"computes with {info.isa} (compiled for {', '.join(info.compiled)}{rest})"


def has_torch() -> bool:
    """Whether torch is installed."""
    return util.find_spec("torch") is not None


def choose_kv_dtype(backend: str, wanted: str) -> KvDtype:
    """How `backend` keeps keys and values. Raises ModelError where it cannot keep them as wanted."""
    if backend == "torch":
        if wanted not in ("auto", "fp32"):
            raise ModelError(f"the torch back end keeps keys and values in fp32 only, not in {wanted}")
        return "fp32"
    if wanted == "fp8":
        raise ModelError("the native back end keeps keys and values in fp32, fp16, bf16 or int8, not in fp8")
    chosen: dict[str, KvDtype] = {"auto": "fp16", **{name: name for name in _BYTES}}
    return chosen[wanted]


def check_quantization(backend: str, wanted: str) -> None:
    """Raises ModelError where `backend`, or the GPU, cannot quantise as wanted at load."""
    if wanted == "none":
        return
    if backend != "triton":
        raise ModelError(
            f"the {backend} back end serves weights as the file stores them, so --quantization {wanted} needs "
            "--backend triton (a GPU); on a CPU, serve a GGUF file of the wanted type (Q8_0, Q4_1, ...)"
        )
    gpu = device.probe().gpu
    problem = "" if gpu is None else quantization.problem_of(wanted, gpu.capability, gpu.name)
    if problem:
        raise ModelError(problem)


def token_budget(backend: str, wanted: int, max_num_seqs: int) -> int:
    """Tokens of one step (EngineConfig.max_num_batched_tokens); wanted 0: what suits the back end.

    On a CPU a step of 128 prompt tokens is already as fast per token as a longer one (docs/LOG.md), and every stream
    waits for the whole step: prompts go in chunks of about 128, with room for a token of every running sequence.
    """
    if wanted:
        return wanted
    return 128 + max_num_seqs if backend.startswith("native") else max(512, max_num_seqs)


def kv_block_bytes(program: StepProgram, block_size: int, dtype: KvDtype) -> int:
    """Bytes of one KV block of `block_size` tokens, all layers together, K and V."""
    total = 0
    for layer in program.kv:
        per_token = layer.head_dim * _BYTES[dtype] + (4 if dtype == "int8" else 0)  # int8: a float32 scale each
        head_bytes = 2 * block_size * per_token
        total += layer.num_kv_heads * (-(-head_bytes // _ALIGN) * _ALIGN)
    return total
