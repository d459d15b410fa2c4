"""The edges of paged attention in Triton: windows, tiles, bounds, NaN, and what is refused."""

from dataclasses import replace

import pytest
import torch
from headrace.kernels.paged_attention import AttentionConfig, default_config

from tests.gpu.numerics.attention_case import Shape, check, run, sequence


@pytest.mark.parametrize("window", [1, 2, 16, 17, 63, 64, 65, 500])
@pytest.mark.parametrize("soft_cap", [0.0, 0.3])
def test_window_and_soft_cap_edges(window: int, soft_cap: float, device: str) -> None:
    """Blocks before the window hold NaN: they may be another sequence's by now."""
    shape = Shape(heads=2, window=window, soft_cap=soft_cap)
    lengths = [(64, 1), (130, 1), (200, 3), (129, 40)]
    sequences = [sequence(shape, length, rows, seed) for seed, (length, rows) in enumerate(lengths)]
    check(shape, sequences, run(shape, sequences, device))


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 32, 33])
def test_as_many_rows_as_each_kernel_takes(rows: int, device: str) -> None:
    """With groups of 2: up to 8 query tokens the tile of decode, up to 32 that of verification, then prefill."""
    shape = Shape()
    sequences = [sequence(shape, rows + before, rows, before) for before in (0, 1, 63, 100)]
    check(shape, sequences, run(shape, sequences, device))


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_block_sizes(block_size: int, device: str) -> None:
    shape = Shape(block_size=block_size, config=AttentionConfig(block_n=min(64, block_size), split=128))
    lengths = [(block_size - 1, 1), (block_size, 1), (block_size + 1, 1), (3 * block_size + 5, 40)]
    sequences = [sequence(shape, length, rows, seed) for seed, (length, rows) in enumerate(lengths)]
    check(shape, sequences, run(shape, sequences, device))


def test_bounds_larger_than_the_batch_change_nothing(device: str) -> None:
    """A captured graph has the grid of the largest batch: more splits, rows and sequences than there are."""
    shape = Shape(dtype=torch.float16)
    sequences = [sequence(shape, length, 1, length) for length in (5, 70, 200)]
    tight = run(shape, sequences, device)
    loose = run(shape, sequences, device, pad_seqs=3, max_seq_len=1000, max_query_len=9)
    check(shape, sequences, tight)
    assert all(torch.equal(a, b) for a, b in zip(tight, loose, strict=True))


def test_programs_take_turns_at_splits(device: str) -> None:
    few, many = (Shape(config=AttentionConfig(block_n=16, split=32, max_programs=n)) for n in (1, 4096))
    sequences = [sequence(few, length, 1, length) for length in (33, 300)]
    outs = [run(shape, sequences, device) for shape in (few, many)]
    check(few, sequences, outs[0])
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_large_scores(device: str) -> None:
    """Scores of hundreds: without its maximum a softmax would overflow, and a masked score must stay the lowest."""
    shape = Shape(scale=40.0, dtype=torch.float16)
    sequences = [sequence(shape, length, rows, length) for length, rows in ((70, 1), (80, 50))]
    check(shape, sequences, run(shape, sequences, device))


def test_a_hot_sequence_does_not_disturb_its_neighbour(device: str) -> None:
    """NaN in a sequence's own values is its own: no other row sees it."""
    shape = Shape()
    healthy, sick = sequence(shape, 70, 3, 1), sequence(shape, 70, 3, 2)
    sick = replace(sick, v=torch.full_like(sick.v, torch.nan))
    outs = run(shape, [sick, healthy, sick], device)
    check(shape, [healthy], [outs[1]])
    assert outs[0].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 72}, "multiple of 16"),
        ({"head_dim": 272}, "multiple of 16"),
        ({"heads": 3}, "cannot be grouped"),
        ({"block_size": 24}, "no multiple of the config's block_n"),
        ({"dtype": torch.float64}, "float32, float16 or bfloat16"),
        ({"kv": torch.float16}, "KV must be"),
    ],
)
def test_refusals(change: dict[str, object], message: str, device: str) -> None:
    shape = replace(Shape(), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        run(shape, [sequence(shape, 5, 1, 0)], device)


def test_config_refusals() -> None:
    for parameters in ({"block_n": 48}, {"block_n": 8}, {"split": 100}, {"split_warps": 3}, {"max_programs": 0}):
        with pytest.raises(ValueError, match=next(iter(parameters))):
            AttentionConfig(**parameters)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("compute_bytes", [2, 4])
def test_default_configs_sum_alike_on_every_gpu(head_dim: int, compute_bytes: int) -> None:
    """What changes a row's bits follows from the model, not from the GPU it happens to run on."""
    for kv_bytes in (1, compute_bytes):
        shape = {"head_dim": head_dim, "compute_bytes": compute_bytes, "kv_bytes": kv_bytes, "block_size": 64}
        configs = [default_config(**shape, arch=arch) for arch in ("", "sm_80", "sm_90", "sm_100", "gfx942")]
        assert len({(config.block_n, config.split) for config in configs}) == 1
