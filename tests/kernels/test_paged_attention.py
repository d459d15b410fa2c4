"""Paged attention against a plain float64 computation per query, for mixed batches over scattered blocks."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from headrace.kernels.batch import StepBatch
from headrace.kernels.paged_attention import AttentionShape, kv_write, paged_attention, plan_attention
from headrace.kernels.paged_attention import reference as op

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
CPU = torch.device("cpu")


@dataclass
class Case:
    """Sequences of which `computed` positions are in the blocks already and `new` ones come with this step."""

    computed: list[int]
    new: list[int]
    block_size: int = 4

    def __post_init__(self) -> None:
        rng = np.random.default_rng(8)
        totals = [a + b for a, b in zip(self.computed, self.new, strict=True)]
        per_sequence = [math.ceil(total / self.block_size) for total in totals]
        num_blocks = sum(per_sequence) + 3
        order = rng.permutation(np.arange(1, num_blocks)).tolist()  # block 0 stays garbage
        tables = np.zeros((len(totals), max(per_sequence)), np.int32)
        for row, count in zip(tables, per_sequence, strict=True):
            row[:count] = [order.pop() for _ in range(count)]
        self.k = [rng.standard_normal((total, KV_HEADS, HEAD_DIM)).astype(np.float32) for total in totals]
        self.v = [rng.standard_normal((total, KV_HEADS, HEAD_DIM)).astype(np.float32) for total in totals]
        self.q = rng.standard_normal((sum(self.new), HEADS * HEAD_DIM)).astype(np.float32)
        # What freed blocks hold is garbage, and garbage must not matter.
        shape = (num_blocks + 1, self.block_size, KV_HEADS, HEAD_DIM)
        self.k_blocks, self.v_blocks = torch.full(shape, math.nan), torch.full(shape, math.nan)
        self.zero_slot = num_blocks * self.block_size
        for blocks, values in ((self.k_blocks, self.k), (self.v_blocks, self.v)):
            blocks[-1] = 0
            for table, rows in zip(tables, values, strict=True):
                slots = torch.from_numpy(self.slots(table, np.arange(len(rows))))
                kv_write(blocks, torch.from_numpy(rows).reshape(len(rows), -1), slots)
        positions = [np.arange(a, a + b) for a, b in zip(self.computed, self.new, strict=True)]
        slot_mapping = [self.slots(table, p) for table, p in zip(tables, positions, strict=True)]
        self.batch = StepBatch(
            token_ids=np.zeros(len(self.q), np.int32),
            positions=np.concatenate(positions).astype(np.int32),
            slot_mapping=np.concatenate(slot_mapping).astype(np.int32),
            cu_seqlens_q=np.cumsum([0, *self.new]).astype(np.int32),
            seq_lens=np.array(totals, np.int32),
            block_tables=tables,
            logit_rows=np.zeros(0, np.int32),
            sampling=(),
        )

    def slots(self, table: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return table[positions // self.block_size].astype(np.int64) * self.block_size + positions % self.block_size

    def run(self, window: int = 0, soft_cap: float = 0.0) -> np.ndarray:
        shape = AttentionShape(HEADS, KV_HEADS, window, self.block_size, self.zero_slot)
        groups = plan_attention(self.batch, shape, CPU)
        return paged_attention(torch.from_numpy(self.q), self.k_blocks, self.v_blocks, groups, 0.3, soft_cap).numpy()

    def expected(self, window: int = 0, soft_cap: float = 0.0) -> np.ndarray:
        out = []
        for i, (computed, new) in enumerate(zip(self.computed, self.new, strict=True)):
            for j in range(new):
                position = computed + j
                first = max(position - window + 1, 0) if window else 0
                query = self.q[len(out)].reshape(HEADS, HEAD_DIM).astype(np.float64)
                heads = []
                for head in range(HEADS):
                    kv_head = head // (HEADS // KV_HEADS)
                    scores = self.k[i][first : position + 1, kv_head] @ query[head] * 0.3
                    if soft_cap:
                        scores = soft_cap * np.tanh(scores / soft_cap)
                    weights = np.exp(scores - scores.max())
                    heads.append(weights / weights.sum() @ self.v[i][first : position + 1, kv_head])
                out.append(np.concatenate(heads))
        return np.array(out)


CASES = {
    "one decode row": Case([9], [1]),
    "first token": Case([0], [1]),
    "decode rows of many lengths": Case([0, 3, 4, 62, 63, 64, 65, 200], [1] * 8),
    "whole prompts": Case([0, 0, 0], [5, 4, 9]),
    "chunks": Case([8, 3, 5], [7, 1, 4]),
    "everything at once": Case([0, 17, 40, 6, 128, 2], [11, 1, 8, 1, 1, 3]),
    "one slot to a block": Case([5, 0, 9], [1, 4, 3], block_size=1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("window", [0, 1, 3, 64])
@pytest.mark.parametrize("soft_cap", [0.0, 0.7])
def test_matches_dense_attention(name: str, window: int, soft_cap: float) -> None:
    case = CASES[name]
    np.testing.assert_allclose(case.run(window, soft_cap), case.expected(window, soft_cap), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("window", [0, 5])
def test_long_chunks_are_tiled_without_a_seam(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([10, 3], [33, 1])
    whole = case.run(window)
    monkeypatch.setattr(op, "MAX_GROUP_SCORES", HEADS * 43 * 4)  # four rows to a tile: 33 is no multiple
    shape = AttentionShape(HEADS, KV_HEADS, window, case.block_size, case.zero_slot)
    assert len(plan_attention(case.batch, shape, CPU)) == 1 + 9
    np.testing.assert_allclose(case.run(window), whole, rtol=1e-5, atol=1e-6)


def test_write_touches_its_slots_alone() -> None:
    blocks = torch.full((4, 2, KV_HEADS, HEAD_DIM), -1.0)
    values = torch.arange(2 * KV_HEADS * HEAD_DIM, dtype=torch.float32).view(2, -1)
    kv_write(blocks, values, torch.tensor([5, 2]))
    flat = blocks.view(8, -1)
    assert torch.equal(flat[5], values[0])
    assert torch.equal(flat[2], values[1])
    assert (flat[[0, 1, 3, 4, 6, 7]] == -1).all()
