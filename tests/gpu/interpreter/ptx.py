"""Inline PTX in the interpreter: the instructions that our kernels use. Installed by tests/gpu/interpreter/__init__.py.

Registers are arrays of 32-bit words, one word per call of the assembly text (`pack` elements of a tensor share a call).
An instruction that is not in the table raises NotImplementedError: add it here, with a test against its definition in
the PTX ISA (docs.nvidia.com, "Parallel Thread Execution ISA"), chapter "Instruction Set".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as stock

from tests.gpu.interpreter.numbers import from_float32, handle, to_float32

Words = np.ndarray  # uint32


def _lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    """Bit i of the table is the result where (a, b, c) spell i in binary."""
    lut, out = int(table.flat[0]), np.zeros_like(a)
    for index in range(8):
        if lut >> index & 1:
            out |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return out


def _prmt(a: Words, b: Words, selector: Words) -> Words:
    """Byte j of the result is byte (selector >> 4j) & 7 of the pair b:a; bit 3 replicates that byte's sign."""
    pair = [((a if i < 4 else b) >> np.uint32(8 * (i & 3))) & np.uint32(0xFF) for i in range(8)]
    out = np.zeros_like(a)
    for position in range(4):
        select = (selector >> np.uint32(4 * position)) & np.uint32(0xF)
        byte = np.choose(select & np.uint32(7), pair)
        byte = np.where(select & np.uint32(8), np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0)), byte)
        out |= byte.astype(np.uint32) << np.uint32(8 * position)
    return out


def _dp4a(a: Words, b: Words, c: Words) -> Words:
    products = a.view(np.int8).reshape(-1, 4).astype(np.int32) * b.view(np.int8).reshape(-1, 4).astype(np.int32)
    return (products.sum(axis=1, dtype=np.int32) + c.view(np.int32)).view(np.uint32)


def _halves(words: Words, dtype: Any) -> np.ndarray:
    """Float32 [n, 2] of the two 16-bit floats in each word, low half first."""
    bits = np.ascontiguousarray(words).view(np.uint16).reshape(-1, 2)
    return bits.view(np.float16).astype(np.float32) if dtype == tl.float16 else to_float32(bits, dtype)


def _words(values: np.ndarray, dtype: Any) -> Words:
    bits = np.ascontiguousarray(from_float32(values, dtype))
    return bits.view(np.uint32).reshape(-1)


def _packed(function: Callable[..., np.ndarray], dtype: Any) -> Callable[..., Words]:
    """An instruction on f16x2 or bf16x2: computed in double (exact for fma's product) and rounded once."""

    def run(*operands: Words) -> Words:
        halves = [_halves(words, dtype).astype(np.float64) for words in operands]
        return _words(function(*halves).astype(np.float32), dtype)

    return run


def _single(function: Callable[..., np.ndarray]) -> Callable[..., Words]:
    def run(*operands: Words) -> Words:
        return function(*(words.view(np.float32) for words in operands)).astype(np.float32).view(np.uint32)

    return run


def _shift(
    function: Callable[[Words, Words], Words], fill: Callable[[Words], Words]
) -> Callable[[Words, Words], Words]:
    """PTX clamps a shift to 32; C and numpy leave it undefined."""
    return lambda a, b: np.where(b > 31, fill(a), function(a, np.minimum(b, np.uint32(31)))).astype(np.uint32)


def _from_fp8(words: Words) -> Words:
    """cvt.rn.f16x2.e4m3x2: the low 16 bits hold two fp8 numbers."""
    low = np.ascontiguousarray(words).view(np.uint8).reshape(-1, 4)[:, :2]
    return _words(to_float32(low, tl.float8e4nv), tl.float16)


def _to_fp8(high: Words, low: Words) -> Words:
    """cvt.rn.satfinite.e4m3x2.f32 d, a, b: a goes to the upper byte."""
    pair = [from_float32(words.view(np.float32), tl.float8e4nv).astype(np.uint32) for words in (low, high)]
    return pair[0] | pair[1] << np.uint32(8)


def _to_pair(dtype: Any) -> Callable[[Words, Words], Words]:
    """cvt.rn.{f16x2,bf16x2}.f32 d, a, b: a goes to the upper half."""
    return lambda high, low: _words(np.stack([low.view(np.float32), high.view(np.float32)], axis=1), dtype)


def _zero(words: Words) -> Words:
    return np.zeros_like(words)


INSTRUCTIONS: dict[str, Callable[..., Words]] = {
    **dict.fromkeys(("mov.b32", "mov.u32"), lambda a: a),
    "not.b32": lambda a: ~a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": _shift(np.left_shift, _zero),
    **dict.fromkeys(("shr.u32", "shr.b32"), _shift(np.right_shift, _zero)),
    "shr.s32": lambda a, b: (a.view(np.int32) >> np.minimum(b, np.uint32(31)).astype(np.int32)).view(np.uint32),
    **dict.fromkeys(("add.u32", "add.s32"), lambda a, b: a + b),
    **dict.fromkeys(("sub.u32", "sub.s32"), lambda a, b: a - b),
    **dict.fromkeys(("mul.lo.u32", "mul.lo.s32"), lambda a, b: a * b),
    **dict.fromkeys(("mad.lo.u32", "mad.lo.s32"), lambda a, b, c: a * b + c),
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "dp4a.s32.s32": _dp4a,
    "cvt.rn.f16x2.e4m3x2": _from_fp8,
    "cvt.rn.satfinite.e4m3x2.f32": _to_fp8,
    "cvt.rn.f16x2.f32": _to_pair(tl.float16),
    "cvt.rn.bf16x2.f32": _to_pair(tl.bfloat16),
    **dict.fromkeys(("ex2.approx.f32", "ex2.approx.ftz.f32"), _single(np.exp2)),
    **dict.fromkeys(("rcp.approx.f32", "rcp.approx.ftz.f32"), _single(np.reciprocal)),
    **dict.fromkeys(("rsqrt.approx.f32", "rsqrt.approx.ftz.f32"), _single(lambda a: 1 / np.sqrt(a))),
    "tanh.approx.f32": _single(np.tanh),
    "cvt.rni.f32.f32": _single(np.rint),
}
for _name, _dtype in (("f16x2", tl.float16), ("bf16x2", tl.bfloat16)):
    for _op, _function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
        INSTRUCTIONS[f"{_op}.{_name}"] = INSTRUCTIONS[f"{_op}.rn.{_name}"] = _packed(_function, _dtype)
    INSTRUCTIONS[f"fma.rn.{_name}"] = _packed(lambda a, b, c: a * b + c, _dtype)

_NO_OPERATION = ("griddepcontrol.wait", "griddepcontrol.launch_dependents")  # programs run one after the other


def run(text: str, inputs: Sequence[Words], num_outputs: int) -> list[Words]:
    """Execute `text` on registers $num_outputs, $num_outputs + 1 ...; returns $0 ... $(num_outputs - 1)."""
    registers = {f"${num_outputs + index}": words for index, words in enumerate(inputs)}
    shape = inputs[0].shape if inputs else (1,)

    def operand(name: str) -> Words:
        if name in registers:
            return registers[name]
        if name.startswith("0f"):
            return np.full(shape, int(name[2:], 16), dtype=np.uint32)
        return np.full(shape, int(name, 0) & 0xFFFFFFFF, dtype=np.uint32)

    body = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    for statement in (part.strip(" \t\n{}") for part in body.split(";")):
        if not statement or statement.startswith(".reg") or statement in _NO_OPERATION:
            continue
        name, _, rest = statement.partition(" ")
        target, *sources = (part.strip() for part in rest.split(","))
        if name not in INSTRUCTIONS:
            # The table holds what the kernels use; a guess at another instruction would make a test pass for nothing.
            raise NotImplementedError(f"PTX instruction {name!r} is not emulated; see {__name__}")
        with np.errstate(all="ignore"):
            registers[target] = INSTRUCTIONS[name](*(operand(source) for source in sources))
    return [registers.get(f"${index}", np.zeros(shape, dtype=np.uint32)) for index in range(num_outputs)]


class _Result:
    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def get_result(self, index: int) -> Any:
        return self._handles[index]


def _inline_asm(self: Any, text: str, constraints: str, values: Any, types: Any, is_pure: bool, pack: int) -> _Result:
    """`pack` consecutive elements fill one or more 32-bit registers, the first in the lowest bits."""
    inputs: list[Words] = []
    for value in values:
        data = np.ascontiguousarray(value.data).reshape(-1, pack)
        raw = data.view(np.uint8).reshape(data.shape[0], -1)
        raw = np.pad(raw, ((0, 0), (0, -raw.shape[1] % 4)))
        words = np.ascontiguousarray(raw).view(np.uint32)
        inputs += [np.ascontiguousarray(words[:, column]) for column in range(words.shape[1])]
    num_outputs = sum(part.strip().startswith("=") for part in constraints.split(","))
    outputs = run(text, inputs, num_outputs)
    shape = values[0].data.shape if values else (1,)
    results, first = [], 0
    for dtype in (kind.scalar for kind in types):
        numpy_type = stock._get_np_dtype(dtype)
        num_bytes = pack * numpy_type.itemsize
        num_words = max(1, num_bytes // 4)
        words = np.stack(outputs[first : first + num_words], axis=1)
        first += num_words
        raw = np.ascontiguousarray(np.ascontiguousarray(words).view(np.uint8)[:, :num_bytes])
        results.append(handle(raw.view(numpy_type).reshape(shape), dtype))
    return _Result(results)


def install() -> None:
    stock.InterpreterBuilder.create_inline_asm = _inline_asm
