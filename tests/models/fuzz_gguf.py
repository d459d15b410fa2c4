"""Structured mutation of GGUF files: valid ones with one to three faults planted, which finds more than random bytes.

`test_gguf_fuzz.py` runs a few thousand cases; a long run is `python -m tests.models.fuzz_gguf CASES [SEED]`.
"""

from __future__ import annotations

import random
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from headrace.models.errors import ModelFileError
from headrace.models.gguf import GGUFFile

from tests.models import gguf_builder as b
from tests.models.gguf_builder import File

# Numbers at which a parser goes wrong: ends of the integer types, sizes that wrap when multiplied, plausible counts.
EDGES = [
    0, 1, 2, 7, 8, 31, 32, 33, 255, 256, 4096, 65535, 65536, 65537, 10**6, 2**20, 2**24, 2**28, 2**30, 2**31 - 1, 2**31,
    2**32 - 1, 2**32, 2**40, 2**48, 2**48 + 1, 2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 8, 2**64 - 1,
]  # fmt: skip
NAMES = [
    "general.alignment", "general.architecture", "split.count", "tokenizer.ggml.tokens", "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.chat_template", "llama.block_count",
    "llama.attention.head_count", "llama.rope.freq_base", "tokenizer.ggml.add_eos_token", "k",
]  # fmt: skip
MAX_FILE_BYTES = 64 * 1024


@dataclass
class Outcome:
    """What a run saw. peak_bytes and cpu_seconds are of the worst case above its file's share."""

    opened: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    peak_bytes: int = 0
    cpu_seconds: float = 0.0


def _random_value(rng: random.Random, kind: int) -> object:
    if kind == b.STRING:
        return rng.choice([b"", b"a", b"\xff", "é".encode(), bytes(rng.randrange(80)), b"x" * rng.randrange(70000)])
    if kind in (b.F32, b.F64):
        return rng.choice([0.0, 1.0, -1.0, float("nan"), float("inf"), 1e30])
    if kind == b.BOOL:
        return rng.choice([0, 1, 1, 0, 2, 255])
    bits = {"b": 8, "h": 16, "i": 32, "q": 64}[b.CODES[kind].lower()]
    value = rng.choice(EDGES) % 2**bits
    return value if b.CODES[kind].isupper() else value - 2 ** (bits - 1)


def _add_key(rng: random.Random, file: File) -> File:
    kind = rng.choice([k for k in range(13) if k != b.ARRAY])
    key = b.key(rng.choice(NAMES), kind, _random_value(rng, kind))
    keys = list(file.keys)
    keys.insert(rng.randrange(len(keys) + 1), key)
    return replace(file, keys=keys)


def _add_array(rng: random.Random, file: File) -> File:
    kind = rng.choice([k for k in range(13) if k != b.ARRAY])
    values = [_random_value(rng, kind) for _ in range(rng.randrange(5))]
    count = rng.choice([None, None, rng.choice(EDGES)])
    return file.with_key(b.array_key(rng.choice(NAMES), kind, values, count=count))


def _drop_or_repeat_key(rng: random.Random, file: File) -> File:
    keys = list(file.keys)
    if not keys:
        return file
    at = rng.randrange(len(keys))
    return replace(file, keys=keys[:at] + keys[at + rng.choice([1, 0]) :] + ([keys[at]] if rng.random() < 0.3 else []))


def _break_key(rng: random.Random, file: File) -> File:
    """Change some bytes inside one key: its length, its type or its value."""
    keys = list(file.keys)
    if not keys:
        return file
    at = rng.randrange(len(keys))
    data = bytearray(keys[at])
    start = rng.randrange(len(data))
    patch = rng.choice([bytes([rng.randrange(256)]), b.u32(rng.choice(EDGES) % 2**32), b.u64(rng.choice(EDGES))])
    data[start : start + len(patch)] = patch
    keys[at] = bytes(data)
    return replace(file, keys=keys)


def _break_tensor(rng: random.Random, file: File) -> File:
    if not file.tensors:
        return file
    tensors = list(file.tensors)
    at = rng.randrange(len(tensors))
    old = tensors[at]
    dims = list(old.dims) or [1]
    dims[rng.randrange(len(dims))] = rng.choice(EDGES)
    new = rng.choice(
        [
            replace(old, name=rng.choice(["", "w", "a" * 80, "blk.99999999.x", b"\xff", tensors[0].name])),
            replace(old, dims=tuple(dims)),
            replace(old, dims=tuple(rng.choice(EDGES) for _ in range(rng.randrange(7)))),
            replace(old, num_dims=rng.choice(EDGES) % 2**32),
            replace(old, type=rng.choice([*range(45), 2**31, 2**32 - 1])),
            replace(old, offset=rng.choice([*EDGES, old.offset + 32, max(0, old.offset - 32)])),
        ]
    )
    tensors[at] = new
    return replace(file, tensors=tensors)


def _change_counts(rng: random.Random, file: File) -> File:
    which = rng.choice(["num_keys", "num_tensors", "version"])
    value = rng.choice([*EDGES, len(file.keys) + 1, len(file.tensors) - 1])
    return replace(file, **{which: max(0, value) % 2 ** (32 if which == "version" else 64)})


def _change_data(rng: random.Random, file: File) -> File:
    return replace(file, data=rng.randbytes(rng.choice([0, 863, 864, 900, 2000])))


MUTATIONS: list[Callable[[random.Random, File], File]] = [
    _add_key, _add_array, _drop_or_repeat_key, _break_key, _break_tensor, _break_tensor, _change_counts, _change_data,
]  # fmt: skip


def mutate(rng: random.Random) -> bytes:
    """A sound file with one to three structural faults, and sometimes flipped or missing bytes on top."""
    file = b.sound()
    for _ in range(rng.randint(1, 3)):
        file = rng.choice(MUTATIONS)(rng, file)
    data = bytearray(file.pack()[:MAX_FILE_BYTES])
    if rng.random() < 0.2:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.1:
        del data[rng.randrange(1, len(data)) :]
    return bytes(data)


def try_file(data: bytes) -> str | None:
    """Open a file and read all of it; the refusal, or None. Any other exception is a finding, and passes through."""
    try:
        with GGUFFile(b.mapping(data), "fuzz.gguf") as file:
            for value in file.metadata.values():
                if not isinstance(value, int | float | str):
                    list(value)
            for name in file.tensors:
                file.load(name)
    except ModelFileError as error:
        return str(error)
    return None


def run(cases: int, seed: int) -> Outcome:
    """Run `cases` cases; raises what a case raised, with its number and seed in the notes of the assertion."""
    outcome = Outcome()
    tracemalloc.start()
    try:
        for case in range(cases):
            data = mutate(random.Random(f"{seed}/{case}"))
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            started = time.process_time()
            try:
                refusal = try_file(data)
            except Exception as error:
                raise AssertionError(f"case {case} of seed {seed}: {error!r}") from error
            outcome.cpu_seconds = max(outcome.cpu_seconds, time.process_time() - started)
            outcome.peak_bytes = max(outcome.peak_bytes, tracemalloc.get_traced_memory()[1] - before - 2 * len(data))
            if refusal is None:
                outcome.opened += 1
            else:
                outcome.refused[" ".join(word for word in refusal.split() if word.isalpha())] += 1
    finally:
        tracemalloc.stop()
    return outcome


if __name__ == "__main__":
    result = run(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(f"opened {result.opened}, refused {sum(result.refused.values())} in {len(result.refused)} ways")
    print(f"worst case: {result.cpu_seconds * 1000:.1f} ms, {result.peak_bytes} bytes over twice the file")
