"""Proof, between two steps, that the engine's books balance. Run by `Engine.check_integrity` in every test's teardown.

The numbers are those of the invariants in tests/engine/test_state_machine.py.
"""

from __future__ import annotations

from itertools import pairwise

from headrace.engine.block_manager import NULL_BLOCK, BlockManager
from headrace.engine.scheduler import Scheduler
from headrace.engine.sequence import Sequence, Status


def check_integrity(scheduler: Scheduler) -> None:
    """Raises AssertionError naming the first thing that is wrong."""
    _check_places(scheduler)
    owners = _owners(scheduler)
    _check_blocks(scheduler.blocks, owners)
    _check_sharing(scheduler.blocks, owners)
    _check_cache(scheduler)


def _check_places(scheduler: Scheduler) -> None:
    """Every live sequence is in exactly one place, in order, within the limits; nothing else is remembered."""
    config = scheduler.config
    places = [*scheduler.waiting, *scheduler.running, *scheduler.parked.values()]
    assert len(places) == len(scheduler.live), "a live sequence is in no place or in two"
    for status, seqs in (
        (Status.WAITING, scheduler.waiting),
        (Status.RUNNING, scheduler.running),
        (Status.PARKED, list(scheduler.parked.values())),
    ):
        for seq in seqs:
            assert scheduler.live.get(seq.id) is seq, f"sequence {seq.id} is {status} but not live"
            assert seq.status is status, f"sequence {seq.id} is {seq.status} but stands with {status}"
    for name, line in (("waiting", scheduler.waiting), ("running", scheduler.running)):
        assert all(a.order < b.order for a, b in pairwise(line)), f"{name} is out of order"
    assert len(scheduler.running) <= config.max_num_seqs, "too many sequences run"
    holders = {seq.id for seq in places if seq.block_table and seq.status is not Status.RUNNING}
    assert set(scheduler.idle_holders) == holders, (
        "idle_holders is not the set of those that hold blocks and do not run"
    )
    for seq in places:
        _check_sequence(seq, scheduler)


def _check_sequence(seq: Sequence, scheduler: Scheduler) -> None:
    size = scheduler.config.block_size
    assert len(seq.tokens) == len(seq.prompt) + len(seq.outputs), f"sequence {seq.id} lost tokens"
    assert len(seq.outputs) < seq.max_tokens or seq.is_score, f"sequence {seq.id} should have finished"
    assert seq.num_computed <= seq.num_to_compute, f"sequence {seq.id} computed tokens that it does not have"
    assert len(seq.full_blocks) <= len(seq.tokens) // size, f"sequence {seq.id} has hashed blocks that are not full"
    assert seq.num_registered <= seq.num_computed // size, (
        f"sequence {seq.id} registered a block before it was computed"
    )
    if seq.block_table:
        assert seq.num_computed <= len(seq.block_table) * size, f"sequence {seq.id} has KV outside its blocks"
        # The last token's block is granted in the step that computes it.
        missing = seq.num_new_blocks(size)
        assert missing == 0 or (missing == 1 and (seq.outputs or seq.has_pending)), (
            f"the table of sequence {seq.id} is {missing} blocks short"
        )
    else:
        assert seq.status is not Status.RUNNING, f"sequence {seq.id} runs without blocks"
        assert seq.num_computed == 0, f"sequence {seq.id} has KV without blocks"


def _owners(scheduler: Scheduler) -> dict[int, list[tuple[Sequence, int]]]:
    """Block -> (sequence, index in its table) of all who hold it."""
    owners: dict[int, list[tuple[Sequence, int]]] = {}
    for seq in scheduler.live.values():
        for index, block in enumerate(seq.block_table):
            owners.setdefault(block, []).append((seq, index))
    return owners


def _check_blocks(blocks: BlockManager, owners: dict[int, list[tuple[Sequence, int]]]) -> None:
    """free + referenced + evictable = all, and reference counts are those of the tables."""
    free, evictable, used = set(blocks.free), set(blocks.evictable), set(owners)
    assert len(free) == len(blocks.free), "a block is free twice"
    assert len(free) + len(evictable) + len(used) == blocks.num_blocks - 1, "a block is lost or in two places"
    assert free | evictable | used == set(range(1, blocks.num_blocks)), "a block is lost, or the null block is used"
    assert blocks.ref_counts[NULL_BLOCK] == 0, "the null block has an owner"
    counts = [len(owners.get(block, ())) for block in range(blocks.num_blocks)]
    assert counts == blocks.ref_counts, "reference counts are not those of the tables"
    assert all(blocks.contents[block] is not None for block in evictable), "an evictable block is not cached"
    assert all(blocks.contents[block] is None for block in free), "a free block is cached"


def _check_sharing(blocks: BlockManager, owners: dict[int, list[tuple[Sequence, int]]]) -> None:
    """A shared block is full, computed by all owners, at one place of the same tokens under the same salt."""
    size = blocks.block_size
    for block, shares in owners.items():
        if len(shares) == 1:
            continue
        first, index = shares[0]
        end = (index + 1) * size
        assert len({id(seq) for seq, _ in shares}) == len(shares), f"block {block} is twice in one table"
        for seq, other in shares:
            assert other == index, f"block {block} stands at different places"
            assert seq.num_computed >= end, f"block {block} is shared but not full"
            assert seq.salt == first.salt, f"block {block} is shared across salts"
            assert seq.tokens[:end] == first.tokens[:end], f"block {block} is shared by different tokens"


def _check_cache(scheduler: Scheduler) -> None:
    """The map of hashes and the contents of blocks mirror each other; nothing is pending that nobody computes."""
    blocks = scheduler.blocks
    registered = {block: content.hash for block, content in enumerate(blocks.contents) if content is not None}
    assert {block: block_hash for block_hash, block in blocks.cached.items()} == registered, "the cache maps disagree"
    assert len(registered) == len(blocks.cached), "two hashes name one block"
    running = {seq.id: seq for seq in scheduler.running}
    for block_hash, sequence_id in blocks.pending.items():
        owner = running.get(sequence_id)
        assert owner is not None, "a block is pending of a sequence that does not run"
        unsettled = {content.hash for content in owner.full_blocks[owner.num_registered :]}
        assert block_hash in unsettled, "a block is pending that is settled"
