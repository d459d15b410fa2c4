"""What an engine must show before it is ready: a fixed prompt, whose numbers must be finite, agree with each other, and
for models that we know be those of the reference. Called by `engine_build`; takes a tenth of a second, and loads every
kernel on the way. docs/decisions/0011 says what it detects.

    python -m headrace.server.self_test MODEL.gguf     prints the entry of golden.json, computed by the torch reference
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from headrace.engine.engine import Engine
from headrace.engine.types import SamplingParams, SequenceRequest, TokenOutput
from headrace.models.errors import ModelError

log = logging.getLogger("headrace.engine")

_NUM_PROMPT, _NUM_OUTPUT = 48, 6
_SALT = "headrace self-test"  # its KV is nobody else's prefix
# Of natural-log probabilities. Within one engine: other kernels compute a prompt than a single token. Against the
# reference: 8-bit activations and 16-bit keys and values move a token's by 0.1 on average; a broken kernel or a flipped
# bit in a scale moves most of them by more than 1.
_WITHIN = 0.05
_MEAN_FROM_GOLDEN = 0.3


@dataclass(frozen=True)
class Observed:
    """Log-probabilities of the prompt's tokens from the second on; what was generated, and its log-probabilities as it
    was, and read back as a text."""

    prompt: list[float]
    output_ids: list[int]
    generated: list[float]
    read_back: list[float]


def check(engine: Engine, path: Path) -> None:
    """Run the self-test on an engine that does nothing else. Raises ModelError with what is wrong."""
    if engine.config.max_sequence_len < _NUM_OUTPUT + 4:
        log.info("self-test: left out, the context is too short")
        return
    seen = observe(engine)
    pairs = zip(seen.generated, seen.read_back, strict=True)
    worst = max(abs(a - b) for a, b in pairs)
    if worst > _WITHIN:
        raise ModelError(f"self-test: a token's log-probability depends on how it is computed, by {worst:.3f}")
    golden = _golden(path)
    if golden is None:
        log.info("self-test: agrees with itself within %.2g", worst)
        return
    mean = sum(abs(a - b) for a, b in zip(seen.prompt, golden, strict=False)) / len(seen.prompt)
    if mean > _MEAN_FROM_GOLDEN:
        raise ModelError(
            f"self-test: log-probabilities are off by {mean:.2f} on average; the file or the arithmetic is bad"
        )
    log.info("self-test: agrees with itself within %.2g, with the reference within %.2g on average", worst, mean)


def observe(engine: Engine) -> Observed:
    """The numbers of the fixed prompt. Raises ModelError where a step fails or a number is not finite."""
    length = min(_NUM_PROMPT, engine.config.max_sequence_len - _NUM_OUTPUT)
    vocab_size = engine.config.vocab_size or 256
    prompt = [(7919 * i + 104_729) % vocab_size for i in range(length)]
    scored = _run(engine, prompt, is_score=True)
    generated = _run(engine, prompt, is_score=False)
    ids = [token.token_id for token in generated]
    read_back = _run(engine, prompt + ids, is_score=True)[-len(ids) :]
    return Observed(_values(scored), ids, _values(generated), _values(read_back))


def _run(engine: Engine, ids: list[int], *, is_score: bool) -> list[TokenOutput]:
    params = SamplingParams(max_tokens=_NUM_OUTPUT, temperature=0.0, num_logprobs=0)
    engine.add(SequenceRequest(id=-1, prompt=ids, sampling=params, salt=_SALT, score=is_score))
    tokens: list[TokenOutput] = []
    reason, error = "", None
    while engine.has_work():
        for output in engine.step():
            tokens += output.tokens
            if output.finish is not None:
                reason, error = output.finish.reason, output.finish.error
    if reason != "length":
        raise ModelError(f"self-test: a sequence of {len(ids)} tokens ended with {error or reason}")
    return tokens


def _values(tokens: list[TokenOutput]) -> list[float]:
    return [token.logprob for token in tokens if token.logprob is not None]


def _golden(path: Path) -> list[float] | None:
    """The reference's log-probabilities of the prompt for a model file that we know: by name and size."""
    known = json.loads(files("headrace.server").joinpath("golden.json").read_text())
    entry = known.get(path.name)
    if entry is None or not path.is_file() or path.stat().st_size != entry["file_bytes"]:
        return None
    values: list[float] = entry["logprobs"]
    return values


def main() -> None:
    """Print the entry of one model."""
    from headrace.server import frames
    from headrace.server.engine_build import build_engine

    path = Path(sys.argv[1])
    load = frames.Load(
        path=str(path),
        block_size=0,
        num_blocks=64,
        kv_cache_bytes=0,
        max_num_batched_tokens=0,
        max_num_seqs=4,
        max_model_len=512,
        max_live_sequences=4,
        max_live_tokens=4096,
        num_threads=1,
        enable_prefix_cache=False,
        backend="torch",
    )
    seen = observe(build_engine(load, lambda _: None).engine)
    entry = {"file_bytes": path.stat().st_size, "logprobs": [round(value, 4) for value in seen.prompt]}
    print(json.dumps({path.name: entry}))


if __name__ == "__main__":
    main()
