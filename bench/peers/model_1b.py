"""`run.py --model-1b`: a second size, so that nothing is tuned to one shape. Called by `main.py`.

A Llama of about 1.1 B random parameters in the mix of types that llama.cpp calls Q4_K_M: Q4_K, and Q6_K for the output
head and for the value and down projections of half of the layers. The blocks' bytes are drawn at random, with scales
that make weights of an ordinary size; the vocabulary is that of the default model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from headrace.models.load import load_front
from headrace.server.cli.progress import fetch_model
from headrace.server.config import ServerConfig

from bench.peers import install, offline, report, rows
from bench.peers.offline import Contender, Place
from bench.peers.table import Samples, prompts, rotated

_LAYERS, _WIDTH, _FFN, _HEADS, _KV_HEADS, _CONTEXT = 22, 2048, 5632, 32, 4, 2048
_PROMPT, _NEW = 128, 32
Q4_K_M = "llama.cpp Q4_K_M"
ROWS = (
    rows.Row("decode_1_1b_vs_llamacpp", "decode, 1 stream, 1.1 B", "decode_1", (Q4_K_M,), "tok/s", 1.8, 2.5),
    rows.Row("decode_16_1b_vs_llamacpp", "decode, 16 streams, 1.1 B", "decode_16", (Q4_K_M,), "tok/s", 3.3, 5.0),
    rows.Row("decode_32_1b_vs_llamacpp", "decode, 32 streams, 1.1 B", "decode_32", (Q4_K_M,), "tok/s", 3.3, 5.0),
    rows.Row("prefill_256_1b_vs_llamacpp", "prefill of 256, 1.1 B", "prefill_256", (Q4_K_M,), "tok/s", 1.8, 3.0),
)
_Bytes = npt.NDArray[np.uint8]


def run(place: Place, rounds: int) -> list[dict[str, Any]]:
    """One line per row."""
    samples = Samples()
    vocabulary = Path(fetch_model(ServerConfig.model))
    path = install.cache_root() / "models" / "random-llama-1b.Q4_K_M.gguf"
    if not path.exists():
        partial = path.with_name("partial-" + path.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_model(partial, vocabulary)
        partial.rename(path)
    contenders: dict[str, Contender] = {}
    llama = samples.attempt(Q4_K_M, lambda: offline.LlamaCpp(path, place))
    ours = samples.attempt(rows.OURS, lambda: offline.headrace(path, place, kv_tokens=32 * (_PROMPT + _NEW + 64)))
    try:
        for name, contender in ((rows.OURS, ours), (Q4_K_M, llama)):
            if contender is not None:
                contenders[name] = contender
                samples.versions.update(contender.versions)
        if ours is not None:
            samples.notes["backend"] = ours.facts["backend"]
        _measure(contenders, rounds, load_front(path).info.vocab_size, samples)
    finally:
        if ours is not None:
            ours.close()
    facts = {"model": path.name, "notes": samples.notes, "versions": samples.versions}
    outcomes = [rows.judge(row, samples.rounds.get(row.measure, []), samples.absent) for row in ROWS]
    return [{"work": outcome.row.work, **report.to_json(outcome, facts)} for outcome in outcomes]


def _measure(contenders: Mapping[str, Contender], rounds: int, vocab_size: int, samples: Samples) -> None:
    for number in range(rounds):
        for row in ROWS:
            kind, _, size = row.measure.partition("_")
            streams, length = (int(size), _PROMPT) if kind == "decode" else (1, int(size))
            asked = prompts(f"{row.name}/{number}", streams, length, vocab_size)
            for name in rotated(list(contenders), number):
                contender = contenders[name]
                value = samples.attempt(
                    name,
                    lambda c=contender, a=asked, k=kind: c.decode(a, _NEW) if k == "decode" else c.prefill(a[0]),  # type: ignore[misc]
                )
                if value is not None:
                    samples.add(row.measure, number, name, value)
                    print(f"  {row.measure} {name}: {value:.2f} tokens/s", flush=True)


def sections(lines: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, str]]:
    """The part of the page, and no plots."""
    return [*report.table(lines), "", *(f"- {reason}" for reason in report.reasons(lines))], {}


# ---- writing the model --------------------------------------------------------------------------------------------


def write_model(path: Path, vocabulary: Path, seed: int = 1) -> None:
    """Writes the file; `vocabulary` is a GGUF file whose tokenizer it takes over."""
    reader = gguf.GGUFReader(vocabulary)
    writer = gguf.GGUFWriter(path, "llama")
    _write_keys(writer, reader)
    rng = np.random.default_rng(seed)
    tokens = len(reader.get_field("tokenizer.ggml.tokens").data)  # type: ignore[union-attr]

    def matrix(name: str, rows_: int, cols: int, kind: gguf.GGMLQuantizationType) -> None:
        block = q6_k_blocks if kind == gguf.GGMLQuantizationType.Q6_K else q4_k_blocks
        writer.add_tensor(name, block(rng, rows_ * cols // 256).reshape(rows_, -1), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(_WIDTH, np.float32))

    q4, q6 = gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q6_K
    kv_width = _WIDTH // _HEADS * _KV_HEADS
    matrix("token_embd.weight", tokens, _WIDTH, q4)
    for layer in range(_LAYERS):
        name, more = f"blk.{layer}.", q6 if layer % 2 == 0 else q4
        norm(name + "attn_norm.weight")
        matrix(name + "attn_q.weight", _WIDTH, _WIDTH, q4)
        matrix(name + "attn_k.weight", kv_width, _WIDTH, q4)
        matrix(name + "attn_v.weight", kv_width, _WIDTH, more)
        matrix(name + "attn_output.weight", _WIDTH, _WIDTH, q4)
        norm(name + "ffn_norm.weight")
        matrix(name + "ffn_gate.weight", _FFN, _WIDTH, q4)
        matrix(name + "ffn_up.weight", _FFN, _WIDTH, q4)
        matrix(name + "ffn_down.weight", _WIDTH, _FFN, more)
    norm("output_norm.weight")
    matrix("output.weight", tokens, _WIDTH, q6)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_keys(writer: gguf.GGUFWriter, reader: gguf.GGUFReader) -> None:
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_FFN)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, field in reader.fields.items():
        if key.startswith("tokenizer."):
            is_array = field.types[0] == gguf.GGUFValueType.ARRAY
            sub_type = field.types[-1] if is_array else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub_type)


def q4_k_blocks(rng: np.random.Generator, count: int) -> _Bytes:
    """uint8 [count, 144]: d and dmin as float16, 12 bytes of 6-bit scales and minima, 128 of nibbles (ggml-common.h,
    block_q4_K). The minima cancel the mean of the products, so that the weights are about 0 +- 0.02."""
    blocks = rng.integers(0, 256, (count, 144), np.uint8)
    blocks[:, :4] = np.array([1e-4, 7.5e-4], np.float16).view(np.uint8)
    return blocks


def q6_k_blocks(rng: np.random.Generator, count: int) -> _Bytes:
    """uint8 [count, 210]: 128 bytes of low and 64 of high bits, 16 scales (int8), d as float16 (block_q6_K)."""
    blocks = rng.integers(0, 256, (count, 210), np.uint8)
    blocks[:, 192:208] = rng.integers(-16, 17, (count, 16), np.int8).view(np.uint8)
    blocks[:, 208:] = np.array([1e-4], np.float16).view(np.uint8)
    return blocks
