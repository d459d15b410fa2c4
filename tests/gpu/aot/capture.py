"""Records kernel launches instead of running them, and compiles them for any target. Needs no GPU and no driver.

    with capture(TARGETS["cuda:90"]) as launches:
        linear(x, weight, out, ...)            # a host wrapper, on meta tensors
    compiled = launches[0].compile()

The driver is a stand-in that only names the target, so Triton's own binder specialises each launch (16-byte
alignment, arguments equal to 1, constexprs) as it would on that GPU. Alignment of a meta tensor is that of its offset
into its storage: real allocations start at 256 bytes or better.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tests.gpu.aot.targets import Target

_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


class _StandIn:
    """What JITFunction.run asks of a driver before it launches."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(self._target.backend, self._target.arch, self._target.warp_size)

    def get_current_device(self) -> str:
        return self._target.name  # the key of a JITFunction's caches

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("no kernel is tuned at run time")


@dataclass(frozen=True)
class Launch:
    """One launch: positional and keyword arguments as the wrapper gave them, and the grid."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grid: tuple[int, ...]
    target: Target

    @property
    def kernel(self) -> str:
        return str(self.function.fn.__name__)

    @property
    def constants(self) -> dict[str, Any]:
        """Constexprs and compile options, for messages."""
        named = {param.name: self.kwargs.get(param.name) for param in self.function.params if param.is_constexpr}
        return {**named, **{name: self.kwargs[name] for name in _OPTIONS if name in self.kwargs}}

    def arguments(self) -> dict[str, Any]:
        """Every argument by its name."""
        names = [param.name for param in self.function.params]
        return {**dict(zip(names, self.args, strict=False)), **{k: v for k, v in self.kwargs.items() if k in names}}

    def compile(self) -> Any:
        """triton's CompiledKernel, never loaded. Raises what the compiler raises."""
        with _active(self.target):
            return _run(self.function, *self.args, grid=self.grid, warmup=True, **self.kwargs)


_run = JITFunction.run


@contextlib.contextmanager
def _active(target: Target) -> Iterator[None]:
    before = driver._active
    driver.set_active(_StandIn(target))
    try:
        yield
    finally:
        driver._active = before


@contextlib.contextmanager
def capture(target: Target) -> Iterator[list[Launch]]:
    """Launches inside the block are recorded in the list that this gives; nothing runs, outputs stay untouched."""
    launches: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if callable(grid):
            names = [param.name for param in self.params]
            grid = grid({**dict(zip(names, args, strict=False)), **kwargs})
        launches.append(Launch(self, args, dict(kwargs), tuple(int(size) for size in grid), target))

    JITFunction.run = record
    try:
        with _active(target):
            yield launches
    finally:
        JITFunction.run = _run
