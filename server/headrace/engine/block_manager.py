"""Who owns which KV block, and which blocks hold a prefix that others may share. Called by the scheduler only.

A block is in exactly one place: the null block (block 0, padding target, never handed out), free, evictable (cached,
owned by nobody, taken back least recently used first), resting (the same, but pinned by a conversation (`pins.py`):
taken back last), or in the tables of `ref_counts[block]` sequences.

Prefix cache: the hash of a full block is SHA-256 over (hash of the block before it, its tokens); the salt is the root.
A block is registered only after the step that computed its KV has succeeded, and is never written again while it is
registered. Hits are whole blocks, so a sequence only ever writes to blocks that are its own: no copy on write.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from dataclasses import dataclass

from headrace.engine.pins import Pins
from headrace.engine.sequence import BlockContent, Sequence

NULL_BLOCK = 0


@dataclass(frozen=True)
class PrefixHit:
    """Leading blocks of a sequence that are cached, in order.

    num_idle: how many of them nobody owns now. is_pending: a running sequence is about to compute the next one.
    """

    blocks: tuple[int, ...]
    num_idle: int
    is_pending: bool


NO_HIT = PrefixHit((), 0, False)


class BlockManager:
    """Blocks 1 .. num_blocks - 1 of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_cache: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_cache = enable_prefix_cache
        self.ref_counts = [0] * num_blocks
        self.free = list(range(num_blocks - 1, NULL_BLOCK, -1))  # a stack; low numbers first
        self.evictable: OrderedDict[int, None] = OrderedDict()  # least recently released first
        self.resting: dict[int, None] = {}
        self.pins = Pins()
        self.num_pins_lost = 0  # released because their blocks were needed
        self.cached: dict[bytes, int] = {}
        self.contents: list[BlockContent | None] = [None] * num_blocks
        self.pending: dict[bytes, int] = {}  # block hash -> id of the running sequence that will compute it

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now."""
        return len(self.free) + len(self.evictable) + len(self.resting)

    def lookup(self, seq: Sequence) -> PrefixHit:
        """Find the cached prefix of a sequence without a table. Its last token is never a hit: it must be computed for
        its logits."""
        if not self.enable_prefix_cache:
            return NO_HIT
        blocks: list[int] = []
        num_idle = 0
        is_pending = False
        for content in self._full_blocks(seq)[: (len(seq.tokens) - 1) // self.block_size]:
            block = self.cached.get(content.hash)
            if block is None or self.contents[block] != content:
                is_pending = content.hash in self.pending
                break
            blocks.append(block)
            num_idle += self.ref_counts[block] == 0
        return PrefixHit(tuple(blocks), num_idle, is_pending)

    def shortage(self, seq: Sequence, hit: PrefixHit) -> int:
        """How many blocks `allocate` lacks; at most 0 where it fits, then minus the blocks that it would leave."""
        return seq.num_new_blocks(self.block_size) - len(hit.blocks) - (self.num_free - hit.num_idle)

    def allocate(self, seq: Sequence, hit: PrefixHit) -> None:
        """Complete the table for all of its tokens: the hit's blocks first, then fresh ones. Must fit."""
        for block in hit.blocks:  # before any eviction, which could take them
            if self.ref_counts[block] == 0:
                del (self.resting if block in self.resting else self.evictable)[block]
            self.ref_counts[block] += 1
        if hit.blocks:
            seq.block_table.extend(hit.blocks)
            seq.num_registered = len(hit.blocks)
            seq.num_computed = len(hit.blocks) * self.block_size
        for _ in range(seq.num_new_blocks(self.block_size)):
            seq.block_table.append(self._take_block())

    def announce(self, seq: Sequence) -> None:
        """Tell waiting sequences which blocks this one, now running, is about to compute."""
        if self.enable_prefix_cache:
            for content in self._full_blocks(seq)[seq.num_registered : seq.num_to_compute // self.block_size]:
                self.pending.setdefault(content.hash, seq.id)

    def withdraw(self, seq: Sequence) -> None:
        """Take back what `announce` said: the sequence no longer runs."""
        for content in seq.full_blocks[seq.num_registered :]:
            self._settle(content, seq)

    def register_computed(self, seq: Sequence) -> None:
        """Let others share the blocks that are full and computed. Call only after a step has succeeded."""
        num_full = seq.num_computed // self.block_size
        if not self.enable_prefix_cache or seq.num_registered >= num_full:
            return
        contents = self._full_blocks(seq)
        for index in range(seq.num_registered, num_full):
            content, block = contents[index], seq.block_table[index]
            self._settle(content, seq)
            if content.hash not in self.cached:  # else another sequence computed the same: ours stays private
                self.cached[content.hash] = block
                self.contents[block] = content
        seq.num_registered = num_full

    def forget(self, seq: Sequence) -> None:
        """Take a sequence's blocks out of the prefix cache (their KV is suspect); those who share them keep them."""
        for block in seq.block_table:
            self._unregister(block)

    def release(self, seq: Sequence) -> None:
        """Give all of a sequence's blocks back. The tail goes first, so that it is evicted before what it hangs on."""
        self.withdraw(seq)
        for block in reversed(seq.block_table):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                if self.contents[block] is None:
                    self.free.append(block)
                elif block in self.pins.counts:
                    self.resting[block] = None
                else:
                    self.evictable[block] = None
        seq.block_table = []
        seq.num_computed = seq.num_registered = 0

    def pin(self, key: int, seq: Sequence, until: float) -> None:
        """Keep the cached prefix of a sequence that ends under `key`, in the place of what was kept under it."""
        if not self.enable_prefix_cache:
            return
        blocks: list[int] = []
        for content in self._full_blocks(seq):
            block = self.cached.get(content.hash)
            if block is None or self.contents[block] != content:
                break
            blocks.append(block)
            if block in self.evictable:
                del self.evictable[block]
                self.resting[block] = None
        self._unpin(self.pins.put(key, blocks, until))

    def unpin(self, key: int) -> None:
        """What was kept under `key` may be evicted like anything else. Unknown: no change."""
        self._unpin(self.pins.drop(key))

    def end_leases(self, now: float) -> None:
        """Unpin what was to be kept until now."""
        for key in self.pins.ended(now):
            self.unpin(key)

    def _unpin(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            if block in self.resting:
                del self.resting[block]
                self.evictable[block] = None

    def _take_block(self) -> int:
        if self.free:
            block = self.free.pop()
        else:
            while not self.evictable:
                self.num_pins_lost += 1
                self.unpin(self.pins.oldest())
            block, _ = self.evictable.popitem(last=False)
            self._unregister(block)
        self.ref_counts[block] = 1
        return block

    def _unregister(self, block: int) -> None:
        content = self.contents[block]
        if content is not None:
            for key in self.pins.keys_of(block):
                self.unpin(key)
            del self.cached[content.hash]
            self.contents[block] = None

    def _settle(self, content: BlockContent, seq: Sequence) -> None:
        if self.pending.get(content.hash) == seq.id:
            del self.pending[content.hash]

    def _full_blocks(self, seq: Sequence) -> list[BlockContent]:
        """The contents of all full blocks of a sequence; each is hashed once in its life."""
        size, contents = self.block_size, seq.full_blocks
        for index in range(len(contents), len(seq.tokens) // size):
            parent = contents[-1].hash if contents else hash_salt(seq.salt)
            tokens = array("i", seq.tokens[index * size : (index + 1) * size]).tobytes()
            contents.append(BlockContent(hash_block(parent, tokens), parent, tokens))
        return contents


def hash_salt(salt: str) -> bytes:
    """Root of the chain, 32 bytes: blocks of different salts never have equal parents."""
    return hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest()


def hash_block(parent: bytes, tokens: bytes) -> bytes:
    """Chained hash of a full block, 32 bytes."""
    return hashlib.sha256(parent + tokens).digest()
