"""Runs a kernel's program instances one after the other. Installed by tests/gpu/interpreter/__init__.py.

What differs from the stock loop: triton.language is patched once per process and not again for every nested call (2x
faster); a pointer carries the number of its argument in its upper 16 bits (memory.py takes it off), so that an access
is judged against the tensor that it was derived from; program instances run in the order that `program_order` names;
`range` gives int32 tensors; numpy's warnings about overflow and NaN are off, because a GPU has none.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as stock
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.gpu.interpreter import sanitizer
from tests.gpu.interpreter.numbers import handle

TAG_SHIFT = 48  # user-space addresses of x86-64 and Arm Linux have 47 bits or fewer (48 on some Arm kernels' top half)

Order = Callable[[list[tuple[int, int, int]]], None]
_order: Order | None = None


class InterpreterFault(Exception):
    """A kernel failed in the interpreter; says which program instance, and where in the kernel."""


@contextlib.contextmanager
def program_order(name: str, seed: int = 0) -> Iterator[None]:
    """Run program instances "forward" (the default), "reverse" or "shuffled" (with `seed`) inside the block.

    A result must not depend on it: the last-arriving program of a split-K product is another one each time.
    """
    global _order
    orders: dict[str, Order | None] = {
        "forward": None,
        "reverse": lambda programs: programs.reverse(),
        "shuffled": lambda programs: random.Random(seed).shuffle(programs),
    }
    before, _order = _order, orders[name]
    try:
        yield
    finally:
        _order = before


class Grid(stock.GridExecutor):  # type: ignore[misc]
    """One launch: stock's constructor, our call."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        names = inspect.getfullargspec(self.fn).args
        bound = inspect.getcallargs(self.fn, *args, **{key: value for key, value in kwargs.items() if key in names})
        tensors: list[tuple[str, torch.Tensor]] = []
        call = {
            name: value if name in self.constexprs else _convert(name, value, tensors) for name, value in bound.items()
        }
        grid = tuple(int(size) for size in (self.grid(bound) if callable(self.grid) else self.grid))
        grid += (1,) * (3 - len(grid))
        programs = list(itertools.product(*(range(size) for size in grid)))
        if _order is not None:
            _order(programs)
        stock.interpreter_builder.set_grid_dim(*grid)
        with sanitizer.launch(self.fn.__name__, tensors) as watch, np.errstate(all="ignore"):
            for program in programs:
                stock.interpreter_builder.set_grid_idx(*program)
                watch.start_program(program)
                self._run_one(call, program)

    def _run_one(self, call: dict[str, Any], program: tuple[int, int, int]) -> None:
        try:
            self.fn(**call)
        except (sanitizer.MemoryFault, InterpreterFault):
            raise
        except Exception as error:
            raise InterpreterFault(f"{self.fn.__name__}, program {program}: {type(error).__name__}: {error}") from error


def _convert(name: str, value: Any, tensors: list[tuple[str, torch.Tensor]]) -> Any:
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise InterpreterFault(f"argument {name} is on {value.device}: the interpreter works on CPU tensors")
        tensors.append((name, value))
        converted = stock._implicit_cvt(value)
        converted.handle.data = converted.handle.data | np.uint64(len(tensors) << TAG_SHIFT)
        return converted
    if isinstance(value, TensorDescriptor):
        base = _convert(name, value.base, tensors)
        semantic = stock.interpreter_semantic
        strides = [stock._implicit_cvt(stride) for stride in value.strides[:-1]] + [tl.constexpr(1)]
        shape = [stock._implicit_cvt(size) for size in value.shape]
        blocks = [tl.constexpr(size) for size in value.block_shape]
        return semantic.make_tensor_descriptor(
            base=base, shape=shape, strides=strides, block_shape=blocks, padding_option=value.padding
        )
    if isinstance(value, tuple):
        items = [_convert(f"{name}[{index}]", item, tensors) for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return stock._implicit_cvt(value)


def _gpu_range(*bounds: Any, **_: Any) -> Iterator[Any]:
    """`range` and `tl.range` in a kernel: the loop variable is a tensor (int64 where a bound is), not Python's int."""
    wide = any(isinstance(bound, tl.tensor) and bound.dtype == tl.int64 for bound in bounds)
    dtype, kind = (tl.int64, np.int64) if wide else (tl.int32, np.int32)
    for index in range(*(int(getattr(bound, "value", bound)) for bound in bounds)):
        yield tl.tensor(handle(np.array([index], dtype=kind), dtype), dtype)


class _Transformer(stock.ASTTransformer):  # type: ignore[misc]
    def visit_For(self, node: ast.For) -> ast.AST:
        call = node.iter
        if isinstance(call, ast.Call):
            called = call.func
            if (isinstance(called, ast.Name) and called.id == "range") or (
                isinstance(called, ast.Attribute) and called.attr == "range"
            ):
                call.func = ast.copy_location(ast.Name(id="_gpu_range", ctx=ast.Load()), called)
        return self.generic_visit(node)


def _call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self.rewrite()(*args, **kwargs)


def _patch_language_once() -> None:
    """All of triton.language, for good: in this process nothing is ever compiled."""

    def sees_everything() -> None: ...

    function = type(sees_everything)(sees_everything.__code__, {"tl": tl, "core": tl.core})
    stock._patch_lang(function)
    tl.tensor.__index__ = lambda self: self.handle.data.item()
    tl.tensor.__bool__ = lambda self: bool(self.handle.data.item()) if self.handle.data.size == 1 else True

    class NoScope:
        def restore(self) -> None: ...

    stock._patch_lang = lambda function: NoScope()


def install() -> None:
    if stock.GridExecutor is Grid:
        return
    stock._gpu_range = _gpu_range  # the rewriter gives a kernel's module every global of the interpreter's
    stock.FunctionRewriter.ast_transformer = _Transformer()
    stock.InterpretedFunction.__call__ = _call_device_function
    _patch_language_once()
    stock.GridExecutor = Grid
