"""The engine's limits, checked once and all together. Made by `headrace.server` and by tests."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.engine.errors import ConfigError

INT32_MAX = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that the scheduler may spend.

    num_blocks: KV blocks of the executor's pool. Block 0 is the null block (padding), so one fewer can be used.
    max_model_len: most tokens of prompt and output together (the model's limit or the server's).
    block_size: tokens per block.
    max_num_batched_tokens: the token budget of one step.
    max_num_seqs: most sequences running at once.
    max_logit_rows: most rows of logits in one step; bounds memory (rows x vocabulary x 4 bytes).
    max_waiting_seqs, max_waiting_tokens: what may be accepted and not running: waiting, preempted or parked.
    enable_prefix_cache: share full blocks between sequences of one salt.
    vocab_size: token ids must be below it; 0 checks only that they fit int32.
    num_host_blocks: KV blocks of host memory for preempted sequences; 0: their KV is computed again.
    min_swap_tokens: a sequence with less KV than that is computed again all the same.
    """

    num_blocks: int
    max_model_len: int
    block_size: int = 16
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 64
    max_logit_rows: int = 256
    max_waiting_seqs: int = 256
    max_waiting_tokens: int = 262_144
    enable_prefix_cache: bool = True
    vocab_size: int = 0
    num_host_blocks: int = 0
    min_swap_tokens: int = 1

    def __post_init__(self) -> None:
        problems = [f"{name} must be at least {least}" for name, least in _LEAST.items() if getattr(self, name) < least]
        # A running sequence can then always have its one token and its one row, so neither decodes nor a long prompt
        # (or a long text to score) can starve the other.
        if self.max_num_batched_tokens < self.max_num_seqs:
            problems.append("max_num_batched_tokens must be at least max_num_seqs")
        if self.max_logit_rows < self.max_num_seqs:
            problems.append("max_logit_rows must be at least max_num_seqs")
        if self.max_waiting_tokens < self.max_sequence_len:
            problems.append("max_waiting_tokens must be at least max_model_len, or a long prompt is refused for ever")
        if self.num_blocks * self.block_size > INT32_MAX:
            problems.append("num_blocks * block_size must fit a 32-bit slot number")
        if problems:
            raise ConfigError(problems)

    @property
    def max_sequence_len(self) -> int:
        """Most tokens of one sequence: the model's limit, or what the whole pool holds where that is less."""
        return min(self.max_model_len, (self.num_blocks - 1) * self.block_size)

    @property
    def max_token_id(self) -> int:
        return self.vocab_size - 1 if self.vocab_size else INT32_MAX


_LEAST = {
    "num_blocks": 2,
    "max_model_len": 1,
    "block_size": 1,
    "max_num_batched_tokens": 1,
    "max_num_seqs": 1,
    "max_logit_rows": 1,
    "max_waiting_seqs": 1,
    "max_waiting_tokens": 1,
    "vocab_size": 0,
    "num_host_blocks": 0,
    "min_swap_tokens": 1,
}
