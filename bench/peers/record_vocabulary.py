"""Vocabularies without a model for `record_llama_cpp.py`, as GGUF files that llama.cpp opens with `vocab_only`.

The small SentencePiece one is laid out as Llama 2's is: unknown, start, end; 256 bytes; learnt pieces, best score
first; single characters last.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
_PIECES = 500
_MERGES = 1200
# Runs tempt a tokenizer to merge from the wrong side; "</" and "s>" are what llama.cpp joins into the end token.
_EXTRA = ["▁▁", "▁▁▁▁", "▁▁▁▁▁▁▁▁", "▁▁▁", "--", "---", "----", "aa", "aaa", "aaaa", "ha", "haha", "ah", "</", "s>"]


@dataclass(frozen=True)
class SentencePieceVocabulary:
    texts: list[str]
    scores: list[float]
    types: list[int]


@dataclass(frozen=True)
class ByteLevelVocabulary:
    texts: list[str]
    merges: list[str]


def train_vocabulary(text: str) -> SentencePieceVocabulary:
    """Byte-pair training on `text`, ranks as scores, with some pieces that make ties and traps."""
    words = Counter("▁" + word for word in text.replace("\n", " ").split(" ") if word)
    split = {word: list(word) for word in words}
    learnt: list[str] = []
    while len(learnt) < _PIECES:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        learnt.append(left + right)
        for word, parts in split.items():
            split[word] = _merge(parts, left, right)
    pieces = list(dict.fromkeys([*learnt[:40], *_EXTRA, *learnt[40:]]))
    characters = sorted({*"".join(words), *"".join(pieces), "\n", "="} - set(pieces))
    special = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    byte_tokens = [(f"<0x{value:02X}>", BYTE) for value in range(256)]
    ranked = [(piece, NORMAL) for piece in (*pieces, *characters)]
    tokens = [*special, *byte_tokens, *ranked, ("<tool>", USER_DEFINED)]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(ranked))] + [0.0]
    return SentencePieceVocabulary([text for text, _ in tokens], scores, [kind for _, kind in tokens])


def write_vocabulary(path: Path, vocabulary: SentencePieceVocabulary, has_space_prefix: bool) -> None:
    """A SentencePiece vocabulary as a GGUF file."""
    writer = _writer(path)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.texts)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(has_space_prefix)
    _finish(writer)


def train_byte_level(strings: list[str]) -> ByteLevelVocabulary:
    """Byte-pair training on whole strings: blanks, digits and punctuation merge with whatever is beside them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(0x100 + i) for i, byte in enumerate(b for b in range(256) if b not in letters)}
    split = [[letters[byte] for byte in string.encode()] for string in strings]
    texts, merges = [letters[byte] for byte in range(256)], []
    while len(merges) < _MERGES:
        pairs = Counter(pair for parts in split for pair in pairwise(parts))
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        merges.append(f"{left} {right}")
        texts.append(left + right)
        split = [_merge(parts, left, right) for parts in split]
    return ByteLevelVocabulary([*dict.fromkeys(texts), "<|end|>"], merges)


def write_byte_level(path: Path, vocabulary: ByteLevelVocabulary, pre_tokenizer: str) -> None:
    """A byte-level vocabulary as a GGUF file; its last token starts and ends a text."""
    writer = _writer(path)
    last = len(vocabulary.texts) - 1
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(vocabulary.texts)
    writer.add_token_types([NORMAL] * last + [CONTROL])
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(last)
    writer.add_eos_token_id(last)
    _finish(writer)


def _writer(path: Path) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    return writer


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _merge(parts: list[str], left: str, right: str) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and merged[-1] == left and part == right:
            merged[-1] = left + right
        else:
            merged.append(part)
    return merged
