"""Blocks and the prefix cache, by hand: 4 usable blocks of 2 tokens unless said otherwise."""

from __future__ import annotations

import hashlib
from array import array

import pytest
from headrace.engine import block_manager
from headrace.engine.block_manager import NO_HIT, BlockManager
from headrace.engine.sequence import Sequence

from tests.engine.support import request


def sequence(number: int, prompt: list[int], salt: str = "") -> Sequence:
    return Sequence(request(number, prompt, salt=salt), number, 0.0)


def compute(blocks: BlockManager, seq: Sequence) -> Sequence:
    """Admit a sequence and compute all of it."""
    blocks.allocate(seq, blocks.lookup(seq))
    seq.num_computed = len(seq.tokens)
    blocks.register_computed(seq)
    return seq


def test_blocks_are_handed_out_once_and_never_the_null_block() -> None:
    blocks = BlockManager(5, 2, True)
    first, second = sequence(1, [1, 2, 3]), sequence(2, [4, 5, 6, 7])
    blocks.allocate(first, NO_HIT)
    blocks.allocate(second, NO_HIT)
    assert sorted(first.block_table + second.block_table) == [1, 2, 3, 4]
    assert blocks.shortage(sequence(3, [1]), NO_HIT) == 1
    blocks.release(first)
    assert blocks.shortage(sequence(3, [1]), NO_HIT) == -1


def test_hashes_are_a_chain_of_sha256_from_the_salt() -> None:
    blocks = BlockManager(5, 2, True)
    seq = compute(blocks, sequence(1, [1, 2, 3, 4, 5], salt="tenant"))
    root = hashlib.sha256(b"tenant").digest()
    first = hashlib.sha256(root + array("i", [1, 2]).tobytes()).digest()
    second = hashlib.sha256(first + array("i", [3, 4]).tobytes()).digest()
    assert [content.hash for content in seq.full_blocks] == [first, second]
    assert blocks.cached == {first: seq.block_table[0], second: seq.block_table[1]}
    assert seq.num_registered == 2, "settled blocks are not looked at again in every step"


def test_a_hit_shares_the_full_blocks_of_an_equal_prefix() -> None:
    blocks = BlockManager(5, 2, True)
    first = compute(blocks, sequence(1, [1, 2, 3, 4, 5]))
    second = sequence(2, [1, 2, 3, 9])
    hit = blocks.lookup(second)
    assert hit.blocks == tuple(first.block_table[:1])
    blocks.allocate(second, hit)
    assert (second.num_computed, second.num_registered, second.block_table[0]) == (2, 1, first.block_table[0])
    assert blocks.ref_counts[first.block_table[0]] == 2
    blocks.release(first)
    assert blocks.ref_counts[second.block_table[0]] == 1


@pytest.mark.parametrize("prompt", [[3, 4, 1, 2], [9, 2, 3, 4], [1, 9, 3, 4]])
def test_another_prefix_is_no_hit(prompt: list[int]) -> None:
    blocks = BlockManager(9, 2, True)
    compute(blocks, sequence(1, [1, 2, 3, 4, 5]))
    assert blocks.lookup(sequence(2, prompt)) == NO_HIT


@pytest.mark.parametrize(("salt", "num_hits"), [("a", 2), ("b", 0), ("", 0), ("a\udc80", 0)])
def test_salts_do_not_share(salt: str, num_hits: int) -> None:
    blocks = BlockManager(9, 2, True)
    compute(blocks, sequence(1, [1, 2, 3, 4, 5], salt="a"))
    assert len(blocks.lookup(sequence(2, [1, 2, 3, 4, 5], salt=salt)).blocks) == num_hits


def test_a_hash_collision_is_no_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_manager, "hash_block", lambda parent, tokens: b"always the same")
    blocks = BlockManager(9, 2, True)
    compute(blocks, sequence(1, [1, 2, 3]))
    assert blocks.lookup(sequence(2, [3, 4, 5])).blocks == ()
    assert len(blocks.lookup(sequence(3, [1, 2, 5])).blocks) == 1


def test_only_computed_full_blocks_are_shared() -> None:
    blocks = BlockManager(9, 2, True)
    seq = sequence(1, [1, 2, 3, 4, 5])
    blocks.allocate(seq, NO_HIT)
    assert blocks.lookup(sequence(2, [1, 2, 3, 4, 5])).blocks == ()
    seq.num_computed = 3
    blocks.register_computed(seq)
    assert len(blocks.lookup(sequence(2, [1, 2, 3, 4, 5])).blocks) == 1


def test_the_last_token_is_never_a_hit() -> None:
    blocks = BlockManager(9, 2, True)
    compute(blocks, sequence(1, [1, 2, 3, 4]))
    assert len(blocks.lookup(sequence(2, [1, 2, 3, 4])).blocks) == 1
    assert len(blocks.lookup(sequence(2, [1, 2, 3, 4, 5])).blocks) == 2


def test_the_least_recently_released_is_evicted_first_tails_before_heads() -> None:
    blocks = BlockManager(5, 2, True)
    old, new = compute(blocks, sequence(1, [1, 2, 3, 4])), compute(blocks, sequence(2, [5, 6, 7, 8]))
    blocks.release(old)
    blocks.release(new)
    assert blocks.num_free == 4
    blocks.allocate(sequence(3, [9]), NO_HIT)
    assert len(blocks.lookup(sequence(4, [1, 2, 3, 4, 0])).blocks) == 1
    blocks.allocate(sequence(5, [9]), NO_HIT)
    assert len(blocks.lookup(sequence(4, [1, 2, 3, 4, 0])).blocks) == 0
    assert len(blocks.lookup(sequence(4, [5, 6, 7, 8, 0])).blocks) == 2


def test_a_hit_is_not_evicted_for_its_own_sequence() -> None:
    blocks = BlockManager(4, 2, True)
    blocks.release(compute(blocks, sequence(1, [1, 2, 3, 4, 5, 6])))
    seq = sequence(2, [1, 2, 9, 9, 9])
    hit = blocks.lookup(seq)
    assert (len(hit.blocks), hit.num_idle, blocks.shortage(seq, hit)) == (1, 1, 0)
    blocks.allocate(seq, hit)
    assert len(set(seq.block_table)) == 3
    assert seq.block_table[0] == hit.blocks[0]


def test_free_blocks_are_used_before_cached_ones() -> None:
    blocks = BlockManager(5, 2, True)
    blocks.release(compute(blocks, sequence(1, [1, 2, 3, 4])))
    blocks.allocate(sequence(2, [7, 7, 7, 7]), NO_HIT)
    assert len(blocks.lookup(sequence(3, [1, 2, 3, 4, 5])).blocks) == 2


def test_the_second_to_compute_a_block_keeps_its_own() -> None:
    blocks = BlockManager(5, 2, True)
    first, second = sequence(1, [1, 2]), sequence(2, [1, 2])
    blocks.allocate(first, NO_HIT)
    blocks.allocate(second, NO_HIT)
    for seq in (first, second):
        seq.num_computed = 2
        blocks.register_computed(seq)
    assert list(blocks.cached.values()) == first.block_table
    blocks.release(second)
    assert len(blocks.free) == 3


def test_forgotten_blocks_are_no_hits_and_are_free_after_release() -> None:
    blocks = BlockManager(5, 2, True)
    seq = compute(blocks, sequence(1, [1, 2, 3, 4, 5]))
    blocks.forget(seq)
    assert blocks.lookup(sequence(2, [1, 2, 3, 4, 5])).blocks == ()
    blocks.release(seq)
    assert len(blocks.free) == 4


def test_without_a_prefix_cache_nothing_is_remembered() -> None:
    blocks = BlockManager(5, 2, False)
    seq = compute(blocks, sequence(1, [1, 2, 3, 4, 5]))
    assert blocks.lookup(sequence(2, [1, 2, 3, 4, 5])) == NO_HIT
    blocks.release(seq)
    assert (len(blocks.free), seq.full_blocks, blocks.cached) == (4, [], {})


def test_tables_grow_by_what_is_missing() -> None:
    blocks = BlockManager(5, 2, True)
    seq = compute(blocks, sequence(1, [1, 2, 3, 4]))
    seq.tokens.append(5)
    table = seq.block_table
    blocks.allocate(seq, NO_HIT)
    assert seq.block_table is table, "batches rely on a table being one list until it is released"
    assert len(table) == 3
    blocks.allocate(seq, NO_HIT)
    assert len(table) == 3
    blocks.release(seq)
    assert seq.block_table is not table
