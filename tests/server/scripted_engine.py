"""An engine process whose answers can be worked out by hand: the real engine on an executor that counts.

The token after t is t + 1, from 255 back to 3 (0 to 2 are the tiny tokenizer's special tokens); every log-probability
is -1. Three tokens make trouble when they are COMPUTED, so a test puts one into its prompt: CRASH kills the process,
HANG stops it, NAN gives a row that is not finite. Started by tests as the server's engine command; needs no torch, so
it starts quickly.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable

from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.kernels.batch import RowResult, StepBatch
from headrace.server import engine_main, frames

FIRST, LAST = 3, 255
VOCAB_SIZE = 384
CONTEXT_LENGTH = 512
CRASH, HANG, NAN, STOP = 300, 301, 302, 303
EOS = 2


def command(*, step_seconds: float = 0.0, load_seconds: float = 0.0) -> tuple[str, ...]:
    """The server's engine command."""
    options = ("--step-seconds", str(step_seconds), "--load-seconds", str(load_seconds))
    return (sys.executable, __file__, *options)


def following(token_id: int) -> int:
    """The token that comes after this one; after STOP comes the end-of-sequence token."""
    if token_id == STOP:
        return EOS
    return token_id + 1 if FIRST <= token_id < LAST else FIRST


class CountingExecutor:
    """See the top of the file."""

    name = "counting"

    def __init__(self, step_seconds: float) -> None:
        self._step_seconds = step_seconds

    def execute(self, batch: StepBatch) -> list[RowResult]:
        tokens = batch.token_ids.tolist()
        if CRASH in tokens:
            os.kill(os.getpid(), signal.SIGKILL)
        if HANG in tokens:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(self._step_seconds)
        results = []
        for row, sampling in zip(batch.logit_rows.tolist(), batch.sampling, strict=True):
            token_id = sampling.target if sampling.target >= 0 else following(tokens[row])
            top = tuple((token_id + i, -1.0 - i) for i in range(max(0, sampling.num_logprobs)))
            results.append(RowResult(token_id, -1.0, top, is_finite=tokens[row] != NAN))
        return results


def build(step_seconds: float, load_seconds: float) -> engine_main.Build:
    """What `engine_main.run` calls to load."""

    def _build(load: frames.Load, on_progress: Callable[[float], None]) -> engine_main.Built:
        on_progress(0.5)
        time.sleep(load_seconds)
        config = EngineConfig(
            num_blocks=load.num_blocks or 129,
            max_model_len=min(CONTEXT_LENGTH, load.max_model_len or CONTEXT_LENGTH),
            block_size=load.block_size or 16,
            max_num_batched_tokens=load.max_num_batched_tokens or 512,
            max_num_seqs=load.max_num_seqs,
            max_waiting_seqs=load.max_live_sequences,
            max_waiting_tokens=max(load.max_live_tokens, CONTEXT_LENGTH),
            enable_prefix_cache=load.enable_prefix_cache,
            vocab_size=VOCAB_SIZE,
        )
        return engine_main.Built(Engine(CountingExecutor(step_seconds), config), "counting", 1, config.max_sequence_len)

    return _build


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--step-seconds", type=float, required=True)
    parser.add_argument("--load-seconds", type=float, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    sys.exit(engine_main.run(arguments.fd, arguments.parent, build(arguments.step_seconds, arguments.load_seconds)))


if __name__ == "__main__":
    main()
