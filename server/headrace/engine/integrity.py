"""Proof, between two steps, that the engine's books balance. Run by `Engine.check_integrity` in every test's teardown.

The numbers are those of the invariants in tests/engine/test_state_machine.py.
"""

from __future__ import annotations

from itertools import pairwise

from headrace.engine.block_manager import NULL_BLOCK, BlockManager
from headrace.engine.scheduler import Scheduler
from headrace.engine.sequence import Sequence, Status
from headrace.engine.urgency import standing


def check_integrity(scheduler: Scheduler) -> None:
    """Raises AssertionError naming the first thing that is wrong."""
    _check_places(scheduler)
    owners = _owners(scheduler)
    _check_blocks(scheduler.blocks, owners)
    _check_pins(scheduler.blocks)
    _check_sharing(scheduler.blocks, owners)
    _check_cache(scheduler)
    _check_host(scheduler)


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
    assert all(a.order < b.order for a, b in pairwise(scheduler.waiting)), "waiting is out of order"
    assert all(standing(a) < standing(b) for a, b in pairwise(scheduler.running)), "running is out of order"
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
    assert len(seq.outputs) <= seq.credit, f"sequence {seq.id} has more outputs than credit"
    assert seq.may_run == (seq.status is not Status.PARKED), f"sequence {seq.id} is {seq.status} and should not be"
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


def _check_host(scheduler: Scheduler) -> None:
    """Every host block is free or in one table, and only who has lost its blocks has any."""
    host, size = scheduler.host, scheduler.config.block_size
    assert not host.decided, "a swap was decided and not handed to the executor"
    used: list[int] = []
    for seq in scheduler.live.values():
        used += seq.host_table
        assert len(seq.host_table) == -(-seq.num_swapped // size), f"sequence {seq.id} has KV outside its host blocks"
        assert not seq.host_table or not seq.block_table, f"sequence {seq.id} holds blocks and host blocks"
        assert seq.num_swapped <= seq.num_to_compute, f"sequence {seq.id} kept KV of tokens that it does not have"
    assert len(set(used)) == len(used), "a host block is used twice"
    assert len(set(host.free)) == len(host.free), "a host block is free twice"
    assert sorted([*host.free, *used]) == list(range(host.num_blocks)), "a host block is lost, or free and used"


def _owners(scheduler: Scheduler) -> dict[int, list[tuple[Sequence, int]]]:
    """Block -> (sequence, index in its table) of all who hold it."""
    owners: dict[int, list[tuple[Sequence, int]]] = {}
    for seq in scheduler.live.values():
        for index, block in enumerate(seq.block_table):
            owners.setdefault(block, []).append((seq, index))
    return owners


def _check_blocks(blocks: BlockManager, owners: dict[int, list[tuple[Sequence, int]]]) -> None:
    """free + referenced + evictable + resting = all, and reference counts are those of the tables."""
    free, evictable, used = set(blocks.free), set(blocks.evictable) | set(blocks.resting), set(owners)
    num_evictable = len(blocks.evictable) + len(blocks.resting)
    assert len(free) == len(blocks.free), "a block is free twice"
    assert len(free) + num_evictable + len(used) == blocks.num_blocks - 1, "a block is lost or in two places"
    assert free | evictable | used == set(range(1, blocks.num_blocks)), "a block is lost, or the null block is used"
    assert blocks.ref_counts[NULL_BLOCK] == 0, "the null block has an owner"
    counts = [len(owners.get(block, ())) for block in range(blocks.num_blocks)]
    assert counts == blocks.ref_counts, "reference counts are not those of the tables"
    assert all(blocks.contents[block] is not None for block in evictable), "an evictable block is not cached"
    assert all(blocks.contents[block] is None for block in free), "a free block is cached"


def _check_pins(blocks: BlockManager) -> None:
    """A pinned block is cached; one that nobody owns rests, and nothing else does."""
    counts: dict[int, int] = {}
    for pin in blocks.pins.pins.values():
        assert pin.until >= blocks.pins.next_end, "the end of a lease would be missed"
        assert len(set(pin.blocks)) == len(pin.blocks), "a block is pinned twice under one key"
        for block in pin.blocks:
            counts[block] = counts.get(block, 0) + 1
    assert counts == blocks.pins.counts, "the counts of pins are not those of the pins"
    assert all(blocks.contents[block] is not None for block in counts), "a pinned block is not cached"
    idle = {block for block in counts if not blocks.ref_counts[block]}
    assert idle == set(blocks.resting), "the blocks that rest are not the pinned ones without an owner"


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
