"""Records what llama.cpp says about tokens and perplexity, as data for our tests; run by hand, never by CI.

    pip install llama-cpp-python==0.3.36 gguf==0.19.0
    python bench/peers/record_llama_cpp.py MODEL.gguf [--only tokens|pre|sentencepiece|perplexity]

MODEL is the catalogue's smollm2-135m-instruct. Four files are written to tests/data; its README describes them. All
inputs are seeded: a second run on the same versions writes the same files, but for the date.
"""

import argparse
import ctypes
import datetime
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from record_strings import sentencepiece_strings, unicode_strings
from record_vocabulary import (
    SentencePieceVocabulary,
    train_byte_level,
    train_vocabulary,
    write_byte_level,
    write_vocabulary,
)

DATA = Path(__file__).resolve().parents[2] / "tests" / "data"
SEED = 20250607
WINDOWS, WINDOW_TOKENS = 4, 512
PRE_TOKENIZERS = ("gpt-2", "llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o", "default")  # one of each family


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", choices=["tokens", "pre", "sentencepiece", "perplexity"])
    arguments = parser.parse_args()
    recorders: dict[str, Callable[[Path], dict[str, Any]]] = {
        "tokens": record_tokens,
        "pre": record_pre_tokenizers,
        "sentencepiece": record_sentencepiece,
        "perplexity": record_perplexity,
    }
    for name, record in recorders.items():
        if arguments.only in (None, name):
            write(DATA / f"llama_cpp_{name}.json", {**provenance(), **record(arguments.model)})


def record_tokens(model: Path) -> dict[str, Any]:
    """SmolLM2's tokens of 1,000 random strings, no special tokens added or parsed."""
    with Vocabulary(model) as vocabulary:
        return {
            "model_sha256": digest(model),
            "seed": SEED,
            "cases": [[text, vocabulary.tokenize(text, parse_special=False)] for text in unicode_strings(SEED, 1000)],
        }


def record_pre_tokenizers(_model: Path) -> dict[str, Any]:
    """One byte-level vocabulary under several pre-tokenizer names: what differs is where words are cut.

    It is trained on the strings themselves, each as one word, so that a token crosses every border that is not cut.
    """
    ascii_only = [text for text in unicode_strings(SEED + 2, 5000) if text.isascii()]
    strings = unicode_strings(SEED + 1, 150) + ascii_only[:80]
    trained = train_byte_level(strings)
    cases = []
    for name in PRE_TOKENIZERS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vocabulary.gguf"
            write_byte_level(path, trained, name)
            with Vocabulary(path) as vocabulary:
                cases.append({"pre": name, "tokens": [vocabulary.tokenize(text, False) for text in strings]})
    vocabulary = {"tokens": trained.texts, "merges": trained.merges}
    return {"seed": SEED + 1, "vocabulary": vocabulary, "strings": strings, "cases": cases}


def record_sentencepiece(_model: Path) -> dict[str, Any]:
    """Tokens of a small SentencePiece vocabulary, with and without the blank before a text."""
    trained = train_vocabulary((DATA / "public_domain.txt").read_text())
    strings = sentencepiece_strings(SEED, 400, (DATA / "public_domain.txt").read_text())
    cases = []
    for has_space_prefix in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vocabulary.gguf"
            write_vocabulary(path, trained, has_space_prefix)
            with Vocabulary(path) as vocabulary:
                for parse_special in (False, True):
                    tokens = [vocabulary.tokenize(text, parse_special) for text in strings]
                    cases.append(
                        {"add_space_prefix": has_space_prefix, "parse_special": parse_special, "tokens": tokens}
                    )
    return {"seed": SEED, "vocabulary": as_json(trained), "strings": strings, "cases": cases}


def record_perplexity(model: Path) -> dict[str, Any]:
    """Mean negative log-likelihood of a text, in independent windows without a start token."""
    text = (DATA / "public_domain.txt").read_text()
    with Vocabulary(model) as vocabulary:
        tokens = vocabulary.tokenize(text, parse_special=False)[: WINDOWS * WINDOW_TOKENS]
    assert len(tokens) == WINDOWS * WINDOW_TOKENS, "the text is too short"
    llm = llama_cpp.Llama(str(model), n_ctx=WINDOW_TOKENS, n_batch=WINDOW_TOKENS, logits_all=True, verbose=False)
    logprobs: list[float] = []
    for start in range(0, len(tokens), WINDOW_TOKENS):
        window = tokens[start : start + WINDOW_TOKENS]
        llm.reset()
        llm.eval(window)
        logits = np.array(llm.scores[: WINDOW_TOKENS - 1], dtype=np.float64)
        shifted = logits - logits.max(axis=1, keepdims=True)
        normalizers = np.log(np.exp(shifted).sum(axis=1))
        logprobs += [float(shifted[i, window[i + 1]] - normalizers[i]) for i in range(WINDOW_TOKENS - 1)]
    mean_nll = -float(np.mean(logprobs))
    return {
        "model_sha256": digest(model),
        "windows": WINDOWS,
        "window_tokens": WINDOW_TOKENS,
        "tokens": tokens,
        "mean_negative_log_likelihood": mean_nll,
        "perplexity": float(np.exp(mean_nll)),
        "first_logprobs": [round(value, 5) for value in logprobs[:32]],
        "window_mean_negative_log_likelihood": [
            -float(np.mean(part)) for part in np.array(logprobs).reshape(WINDOWS, WINDOW_TOKENS - 1)
        ],
    }


class Vocabulary:
    """A GGUF file's vocabulary in llama.cpp, without its weights."""

    def __init__(self, path: Path) -> None:
        self._model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model.model)

    def __enter__(self) -> "Vocabulary":
        return self

    def __exit__(self, *_: object) -> None:
        self._model.close()

    def tokenize(self, text: str, parse_special: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        tokens = (ctypes.c_int32 * room)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), tokens, room, False, parse_special)
        assert count >= 0
        return list(tokens[:count])


def provenance() -> dict[str, Any]:
    return {
        "recorded_by": "bench/peers/record_llama_cpp.py",
        "recorded_on": datetime.date.today().isoformat(),
        "llama_cpp_python": llama_cpp.__version__,
    }


def as_json(vocabulary: SentencePieceVocabulary) -> dict[str, Any]:
    return {"tokens": vocabulary.texts, "scores": vocabulary.scores, "token_type": vocabulary.types}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(path: Path, content: dict[str, Any]) -> None:
    """One line per case, so that a change shows as a change of lines."""
    fields = []
    for key, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], list | dict | str):
            items = ",\n".join(json.dumps(item, ensure_ascii=False, separators=(",", ":")) for item in value)
            fields.append(f"{json.dumps(key)}: [\n{items}\n]")
        else:
            fields.append(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}")
    path.write_text("{\n" + ",\n".join(fields) + "\n}\n")
    print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
