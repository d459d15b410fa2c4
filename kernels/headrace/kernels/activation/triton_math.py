"""Device functions of the element-wise non-linearities. Called by `triton.py` and `triton_quantize.py`."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh of float32, to a few units of the last place; NaN stays NaN. The polynomial is Cephes' tanhf (Moshier)."""
    z = x * x
    small = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    small = (small * z - 3.33332819422e-1) * z * x + x
    power = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - power) / (1.0 + power)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0.0, -large, large))


@triton.jit
def act_and_multiply(gate, up, IS_SILU: tl.constexpr):
    """SiLU(gate) * up, or the tanh form of GELU; float32."""
    if IS_SILU:
        gate = gate / (1.0 + tl.exp(-gate))
    else:
        gate = 0.5 * gate * (1.0 + tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    return gate * up
