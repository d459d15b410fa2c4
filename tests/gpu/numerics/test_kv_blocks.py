"""KV blocks moved within the caches and through a staging buffer, against the reference."""

import pytest
import torch
from headrace.kernels.kv_blocks import copy_blocks as reference_copy
from headrace.kernels.kv_blocks import gather_blocks as reference_gather
from headrace.kernels.kv_blocks import scatter_blocks as reference_scatter
from headrace.kernels.kv_blocks.triton import CacheSet, copy_blocks, gather_blocks, scatter_blocks, swap_in, swap_out

NUM_BLOCKS = 9


def caches_of(dtype: torch.dtype, device: str, head_dim: int = 64) -> list[torch.Tensor]:
    """k and v of three layers: random bytes, NaN among them."""
    shape = (6, NUM_BLOCKS, 3, 16, head_dim * dtype.itemsize)
    generator = torch.Generator().manual_seed(head_dim)
    return list(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device).view(dtype))


def numbers(values: list[int] | list[list[int]], device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def bits(caches: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([cache.cpu().view(torch.uint8) for cache in caches])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_copy(head_dim: int, dtype: torch.dtype, device: str) -> None:
    caches = caches_of(dtype, device, head_dim)
    expected = [cache.cpu().clone() for cache in caches]
    pairs = numbers([[0, 5], [3, 1], [-1, 2], [4, -1], [7, 8]], device)
    copy_blocks(CacheSet.of(caches), pairs)
    reference_copy(expected, pairs.cpu())
    assert torch.equal(bits(caches), bits(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_gather_and_scatter(dtype: torch.dtype, device: str) -> None:
    caches = caches_of(dtype, device)
    plain = [cache.cpu().clone() for cache in caches]
    every = CacheSet.of(caches)
    staging = torch.full((4, 6, every.block_words * 4), 0xAB, dtype=torch.uint8, device=device)
    gather_blocks(every, numbers([8, 0, -1, 3], device), staging)
    expected = reference_gather(plain, torch.tensor([8, 0, -1, 3]))
    assert torch.equal(staging.cpu()[[0, 1, 3]], expected[[0, 1, 3]])
    assert (staging[2] == 0xAB).all()
    scatter_blocks(every, numbers([2, -1, 4, 7], device), staging)
    reference_scatter(plain, torch.tensor([2, -1, 4, 7]), staging.cpu())
    assert torch.equal(bits(caches), bits(plain))


@pytest.mark.parametrize("room", [1, 2, 8])
def test_a_swap_brings_blocks_back_elsewhere(room: int, device: str) -> None:
    caches = caches_of(torch.float16, device)
    before = bits(caches)
    every = CacheSet.of(caches)
    is_cuda = device == "cuda" and torch.backends.cuda.is_built()  # a CPU that plays one has no pinned memory
    host = torch.zeros((7, 6, every.block_words * 4), dtype=torch.uint8, pin_memory=is_cuda)
    places = [2, 3, 6]  # of which two are one copy
    staging = torch.zeros((room, 6, every.block_words * 4), dtype=torch.uint8, device=device)
    swap_out(every, numbers([6, 1, 4], device), staging, host, places)
    if is_cuda:
        torch.cuda.synchronize()
    for cache in caches:
        cache.view(torch.uint8).fill_(0x7F)  # the blocks now belong to others
    swap_in(every, numbers([0, 8, 5], device), staging, host, places)
    after = bits(caches)
    assert torch.equal(after[:, [0, 8, 5]], before[:, [6, 1, 4]])
    assert (after[:, [1, 2, 3, 4, 6, 7]] == 0x7F).all()
    assert not host[[0, 1, 4, 5]].any()


def test_bytes_of_a_block(device: str) -> None:
    assert CacheSet.of(caches_of(torch.float16, device)).block_bytes == 6 * 3 * 16 * 64 * 2


def test_nothing_to_move_and_what_does_not_fit(device: str) -> None:
    caches = caches_of(torch.float16, device)
    every = CacheSet.of(caches)
    copy_blocks(every, torch.zeros((0, 2), dtype=torch.int32, device=device))
    staging = torch.zeros((1, 6, every.block_words * 4), dtype=torch.uint8, device=device)
    one = numbers([1], device)
    for wrong in (
        lambda: copy_blocks(every, one),
        lambda: copy_blocks(every, numbers([[1, 2]], device).long()),
        lambda: gather_blocks(every, one.long(), staging),
        lambda: scatter_blocks(every, one, staging[:, :5]),
        lambda: CacheSet.of([caches[0], caches[1].clone()]),
        lambda: CacheSet.of([caches[0], caches[1][:5]]),
        lambda: CacheSet.of([caches[0].transpose(1, 2)]),
        lambda: CacheSet.of([torch.zeros(4, 3, device=device)]),
    ):
        with pytest.raises(ValueError, match=r"kv_blocks|copy_blocks"):
            wrong()
