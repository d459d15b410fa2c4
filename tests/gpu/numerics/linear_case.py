"""Matrices, and one call of the product against float64. Used by test_linear*.py.

`out` and the workspace hold NaN before the call (the counters zero, as the contract asks, and again after it).
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from headrace.kernels.linear import PackedLinear, pack
from headrace.kernels.linear.config import LinearConfig
from headrace.kernels.linear.triton import COUNTER_BYTES, linear, workspace_bytes
from headrace.kernels.quant import QuantTensor, pack_int4

# Relative error of the whole output, by norm: it, and with a norm x times its weight, is rounded to 24, 11 or 8 bits.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 9e-4, torch.bfloat16: 7e-3}


def quant(kind: str, rows: int, cols: int, group: int, zeros: str, seed: int = 0) -> QuantTensor:
    """zeros: "none", "any", or "centre" (int4's -8 * scale, which packs as none). Scales and zeros are float16's."""
    rng = np.random.default_rng(seed * 1000 + rows + cols)
    shape = (rows, cols // group)
    q = rng.integers(0, 16, (rows, cols)) if kind == "int4" else rng.integers(-128, 128, (rows, cols))
    scales = rng.uniform(0.001, 0.02, shape).astype(np.float16).astype(np.float32)
    offsets = {
        "none": None,
        "any": rng.normal(0, 0.05, shape).astype(np.float16).astype(np.float32),
        "centre": scales * np.float32(-8),
    }
    packed = pack_int4(q.astype(np.uint8)) if kind == "int4" else q.astype(np.int8)
    return QuantTensor(kind, packed, scales, offsets[zeros], group)


@dataclass(frozen=True)
class Case:
    """A matrix and what surrounds it; `weight` is its float64 value, gate above up where gated."""

    packed: PackedLinear
    weight: torch.Tensor
    norm: bool = False
    bias: bool = False
    residual: bool = False
    activation: str | None = None
    config: LinearConfig | None = None
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(5))

    def rows(self, m: int, device: str) -> torch.Tensor:
        x = torch.randn(m, self.packed.shape[1], generator=self.generator) * 0.5
        return x.to(device, self.packed.dtype)

    def extras(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm's weight and the bias, float32: the same for every call."""
        generator = torch.Generator().manual_seed(9)
        norm = torch.rand(self.packed.shape[1], generator=generator) + 0.5
        return norm.to(device), torch.randn(self.packed.shape[0], generator=generator).to(device)

    def residual_of(self, m: int, device: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(10)
        return torch.randn(m, self.packed.out_features, generator=generator).to(device, self.packed.dtype)

    def run(
        self, x: torch.Tensor, x_scale: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The product, into columns of a wider, poisoned buffer."""
        device, m = x.device, x.shape[0]
        norm, bias = self.extras(str(device))
        wide = torch.full((m, self.packed.out_features + 8), float("nan"), dtype=self.packed.dtype, device=device)
        out = wide[:, : self.packed.out_features]
        size = workspace_bytes(self.packed, m, self.config, has_norm=self.norm)
        workspace = torch.zeros(size, dtype=torch.uint8, device=device)
        workspace[COUNTER_BYTES:] = 0xFF  # NaN in every float type
        if self.residual and residual is None:
            residual = self.residual_of(m, str(device))
        linear(
            x,
            self.packed.to(device),
            out,
            norm=(norm, 1e-5) if self.norm else None,
            bias=bias if self.bias else None,
            residual=residual,
            activation=self.activation,
            x_scale=x_scale,
            workspace=workspace,
            config=self.config,
        )
        assert not workspace[:COUNTER_BYTES].any(), "counters must be back at zero"
        assert wide[:, self.packed.out_features :].isnan().all(), "columns beyond the product's were written"
        return out

    def want(self, x: torch.Tensor) -> torch.Tensor:
        """float64 [M, out_features]; x: the values, float."""
        norm, bias = self.extras("cpu")
        x = x.double().cpu()
        if self.norm:
            x = x / torch.sqrt((x * x).mean(1, keepdim=True) + 1e-5) * norm.to(self.packed.dtype).double()
        y = x @ self.weight.T
        if self.bias:
            y = y + bias.double()
        if self.activation is not None:
            gate, up = y.chunk(2, 1)
            silu = self.activation == "silu"
            y = (torch.nn.functional.silu(gate) if silu else torch.nn.functional.gelu(gate, approximate="tanh")) * up
        return y + self.residual_of(x.shape[0], "cpu").double() if self.residual else y

    def check(self, m: int, device: str) -> None:
        x = self.rows(m, device)
        assert error(self.run(x), self.want(x)) < TOLERANCE[self.packed.dtype]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative, by norm; NaN if anything is."""
    return float((got.double().cpu() - want).norm() / want.norm())


def quant_case(
    kind: str,
    rows: int,
    cols: int,
    group: int,
    zeros: str,
    dtype: torch.dtype,
    activation: str | None = None,
    **extras: bool | LinearConfig,
) -> Case:
    sources = [quant(kind, rows, cols, group, zeros, seed) for seed in range(2 if activation else 1)]
    weight = torch.cat([torch.from_numpy(source.dequantize()) for source in sources]).double()
    packed = pack(sources, dtype=dtype, is_gated=activation is not None)
    return Case(packed, weight, activation=activation, **extras)  # type: ignore[arg-type]


def dense_case(
    rows: int, cols: int, dtype: torch.dtype, activation: str | None = None, **extras: bool | LinearConfig
) -> Case:
    generator = torch.Generator().manual_seed(rows)
    count = 2 if activation else 1
    sources = [(torch.randn(rows, cols, generator=generator) * 0.1).to(dtype) for _ in range(count)]
    packed = pack(sources, dtype=dtype, is_gated=activation is not None)
    return Case(packed, torch.cat(sources).double(), activation=activation, **extras)  # type: ignore[arg-type]
