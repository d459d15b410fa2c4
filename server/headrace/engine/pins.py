"""Which cached blocks a conversation keeps from eviction between two turns, and until when. Used by the block manager.

A pin is no ownership: pinned blocks count as free, and are handed out when nothing else is left; the pin that was put
down longest ago goes first, as a whole. Who comes back later computes them again and does not notice.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pin:
    """Blocks, first of the prefix first, and the time (seconds, on the engine's clock) until which they are kept."""

    blocks: tuple[int, ...]
    until: float


class Pins:
    """At most one pin per key; a block may be in several."""

    def __init__(self) -> None:
        self.pins: OrderedDict[int, Pin] = OrderedDict()  # put down longest ago first
        self.counts: dict[int, int] = {}  # block -> pins that it is in
        self.next_end = math.inf  # no pin's time is over before

    def put(self, key: int, blocks: Iterable[int], until: float) -> list[int]:
        """Pin blocks under `key`, in the place of what it had. Returns the blocks that are in no pin any more."""
        pin = Pin(tuple(blocks), until)
        for block in pin.blocks:
            self.counts[block] = self.counts.get(block, 0) + 1
        released = self.drop(key)
        if pin.blocks:
            self.pins[key] = pin
            self.next_end = min(self.next_end, until)
        return released

    def drop(self, key: int) -> list[int]:
        """Take a pin away. Returns the blocks that are in no pin any more, in their order. Unknown: no change."""
        pin = self.pins.pop(key, None)
        if pin is None:
            return []
        released = []
        for block in pin.blocks:
            self.counts[block] -= 1
            if not self.counts[block]:
                del self.counts[block]
                released.append(block)
        return released

    def oldest(self) -> int:
        """The key whose pin was put down longest ago. There must be one."""
        return next(iter(self.pins))

    def ended(self, now: float) -> list[int]:
        """Keys whose time is over; the caller drops them."""
        if now < self.next_end:
            return []
        self.next_end = min((pin.until for pin in self.pins.values() if pin.until > now), default=math.inf)
        return [key for key, pin in self.pins.items() if pin.until <= now]

    def keys_of(self, block: int) -> list[int]:
        """Keys of the pins that a block is in."""
        return [key for key, pin in self.pins.items() if block in pin.blocks] if block in self.counts else []
