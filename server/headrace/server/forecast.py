"""When a request would have its first token, and when its last: from what waits, and from what work costs here.

Pure. `admission.py` asks before it admits; the costs are the engine's running estimates (`headrace.engine.estimates`),
the backlog is the front end's own count, so that nothing is stale while the engine is in a long step. A forecast is 0
where nothing is known yet: without experience nobody is refused. docs/decisions/0010 says how good it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.engine.types import EngineStats


@dataclass(frozen=True)
class Capacity:
    """What the engine can do at once. kv_tokens: tokens whose keys and values it keeps."""

    max_num_seqs: int
    token_budget: int
    kv_tokens: int


@dataclass(frozen=True)
class Backlog:
    """What is ahead of a request: sequences that have begun to answer, and those that have not, with their prompts."""

    num_running: int
    num_queued: int
    num_queued_tokens: int


@dataclass(frozen=True)
class Work:
    """What a request asks for; the two lengths are of each of its sequences."""

    num_sequences: int
    num_prompt: int
    max_tokens: int


def first_token_seconds(stats: EngineStats, capacity: Capacity, backlog: Backlog, work: Work) -> float:
    """Seconds from now to the last of the request's first tokens.

    A place becomes free every residence time / places (Little's law), and prompts are computed meanwhile with what the
    running sequences leave of each step's budget; whichever takes longer is the wait. Then come its own prompt and the
    step in progress.
    """
    if not stats.token_seconds:
        return 0.0
    short = backlog.num_running + backlog.num_queued + work.num_sequences - capacity.max_num_seqs
    place_wait = max(0, short) * stats.residence_seconds / capacity.max_num_seqs
    running = min(backlog.num_running, capacity.max_num_seqs)
    prompts_wait = _prompt_seconds(stats, capacity, backlog.num_queued_tokens, running)
    own = _prompt_seconds(stats, capacity, work.num_sequences * work.num_prompt, running)
    return max(place_wait, prompts_wait) + own + stats.token_seconds


def finish_seconds(stats: EngineStats, capacity: Capacity, backlog: Backlog, work: Work) -> float:
    """Seconds from now to the end. How much of max_tokens will be generated is what others generated of theirs."""
    num_outputs = 1.0 + stats.output_share * (work.max_tokens - 1)
    first = first_token_seconds(stats, capacity, backlog, work)
    return first + (num_outputs - 1.0) * stats.token_seconds


def _prompt_seconds(stats: EngineStats, capacity: Capacity, num_tokens: int, num_running: int) -> float:
    """Seconds of the steps that compute so many tokens of prompts beside what runs."""
    missing = num_tokens * (1.0 - stats.cached_share)
    room = max(1, capacity.token_budget - num_running)
    full_steps, rest = divmod(missing, room)
    seconds = full_steps * _step_seconds(stats, capacity.token_budget)
    return seconds + (_step_seconds(stats, num_running + rest) if rest else 0.0)


def _step_seconds(stats: EngineStats, num_tokens: float) -> float:
    return stats.step_seconds + num_tokens * stats.step_token_seconds
