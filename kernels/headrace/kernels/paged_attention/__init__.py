"""Op: causal attention over KV blocks, for any mix of prefill chunks, decode rows and speculative verification.

reference.py defines the meaning (torch, float32, slots of one head beside the next); triton.py runs it on a GPU for
`headrace.kernels.gpu`, and flash.py is the same contract over flash-attn. Importing this package imports neither
Triton nor flash-attn.

The contract of the GPU implementations (`triton.paged_attention`, `flash.paged_attention`):

- q: [T, num_heads, head_dim] in the compute dtype, the last axis dense; head h reads KV head h // group.
- k_cache, v_cache: [num_blocks + 1, num_kv_heads, block_size, head_dim], a (block, head) dense: the compute dtype,
  float8_e4m3fn (or its bits in uint8, for GPUs older than sm_89) or int8, the last two with float32 scales
  [num_kv_heads] for k and for v.
- out: as q; every row of a sequence is written, nothing else is.
- cu_seqlens_q [B + 1], seq_lens [B], block_tables [B, W]: int32 on the device, as in `batch.StepBatch`. A sequence's
  last query row stands at position seq_lens - 1, the others before it; a sequence without rows costs nothing.
- Whatever slots past a sequence's end or blocks of nobody hold, NaN included, reaches no output.
- A row's bits (of `triton`, not of `flash`) depend on its sequence, the position of its query and the model's
  `AttentionConfig` alone: not on its neighbours in the batch, nor on how many rows its sequence has in this step. So a
  token is the same whether its KV was computed in one prompt, in chunks, as decode rows or found in the prefix cache.
"""

from headrace.kernels.paged_attention.config import AttentionConfig, default_config
from headrace.kernels.paged_attention.reference import (
    MAX_GROUP_SCORES,
    AttentionGroup,
    AttentionShape,
    kv_write,
    paged_attention,
    plan_attention,
)

__all__ = [
    "MAX_GROUP_SCORES",
    "AttentionConfig",
    "AttentionGroup",
    "AttentionShape",
    "default_config",
    "kv_write",
    "paged_attention",
    "plan_attention",
]
