"""Builds a tokenizer from the metadata of a GGUF file; called by `Tokenizer.from_gguf`.

Two kinds of vocabulary are known. `tokenizer.ggml.model` = "gpt2" is byte-level BPE with a merge list. "llama" is a
SentencePiece vocabulary: no merges but a score per token, and a pair of neighbours merges when their joined text is a
token, best score first. Written as a merge list ordered by score, that is BPE again, so both run on `tokenizers`' BPE.
The keys are described in docs/gguf.md of https://github.com/ggml-org/ggml; what they leave open follows llama.cpp.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast

import tokenizers
from headrace.models import pretokenizers
from headrace.models.errors import TokenizerError, UnsupportedModelError
from headrace.models.tokenizer_parts import (
    END_OF_TURN_TEXTS,
    MAX_MERGES,
    SPACE_MARK,
    TokenizerParts,
    byte_level_bytes,
    byte_token_value,
    check_texts,
    sentencepiece_bytes,
)
from tokenizers import AddedToken, models, normalizers

_MAX_SPLITS = 1 << 24  # pairs tried when merges are derived from scores: Gemma's 262,144 tokens need about 2 million


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`, those of sentencepiece_model.proto."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class _Vocabulary:
    texts: tuple[str, ...]
    types: tuple[int, ...]
    special_ids: frozenset[int]
    bos_id: int | None
    eos_ids: tuple[int, ...]


def read_gguf(metadata: Mapping[str, Any]) -> TokenizerParts:
    """Raises UnsupportedModelError for a kind we do not know, TokenizerError for a vocabulary that makes no sense."""
    kind = _value(metadata, "model", str)
    if kind == "gpt2":
        return _read_byte_level(metadata)
    if kind == "llama":
        return _read_sentencepiece(metadata)
    raise UnsupportedModelError(f"tokenizer of kind {(kind or 'none')[:64]!r} is not supported")


def _read_byte_level(metadata: Mapping[str, Any]) -> TokenizerParts:
    rule = pretokenizers.find(_value(metadata, "pre", str) or "")
    vocabulary = _read_vocabulary(metadata, bos_default=None, eos_default=None)
    model = _bpe(vocabulary.texts, list(_read_merges(metadata)), ignore_merges=rule.whole_words)

    def bare() -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = pretokenizers.build(rule)
        return tokenizer

    literal = {TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN}
    pieces = tuple(
        text.encode() if kind in literal or index in vocabulary.special_ids else byte_level_bytes(text)
        for index, (text, kind) in enumerate(zip(vocabulary.texts, vocabulary.types, strict=True))
    )
    return _assemble(
        metadata, vocabulary, bare(), bare(), pieces, unknown_id=None, add_bos=rule.add_bos, has_space_prefix=False
    )


def _read_sentencepiece(metadata: Mapping[str, Any]) -> TokenizerParts:
    vocabulary = _read_vocabulary(metadata, bos_default=1, eos_default=2)
    unknown_id = _token_id(metadata, "unknown_token_id", len(vocabulary.texts), 0)
    assert unknown_id is not None
    scores = _read_scores(metadata, len(vocabulary.texts))
    merges = _merges_from_scores(vocabulary, scores)
    unknown = vocabulary.texts[unknown_id]
    model = _bpe(vocabulary.texts, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    prefix = _value(metadata, "add_space_prefix", bool)
    has_space_prefix = True if prefix is None else prefix

    def bare() -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer(model)
        marks = normalizers.Replace(" ", SPACE_MARK)
        # Applied to each stretch of text between special tokens, as llama.cpp does.
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE_MARK), marks] if has_space_prefix else [marks]
        )
        return tokenizer

    pieces = tuple(
        _sentencepiece_piece(text, kind, index in vocabulary.special_ids)
        for index, (text, kind) in enumerate(zip(vocabulary.texts, vocabulary.types, strict=True))
    )
    return _assemble(
        metadata,
        vocabulary,
        bare(),
        bare(),
        pieces,
        unknown_id=unknown_id,
        add_bos=True,
        has_space_prefix=has_space_prefix,
    )


def _assemble(
    metadata: Mapping[str, Any],
    vocabulary: _Vocabulary,
    plain: tokenizers.Tokenizer,
    parsing: tokenizers.Tokenizer,
    pieces: tuple[bytes, ...],
    *,
    unknown_id: int | None,
    add_bos: bool,
    has_space_prefix: bool,
) -> TokenizerParts:
    user_defined = [
        AddedToken(vocabulary.texts[index], normalized=False, special=False)
        for index, kind in enumerate(vocabulary.types)
        if kind == TokenType.USER_DEFINED and index not in vocabulary.special_ids
    ]
    special = [
        AddedToken(vocabulary.texts[index], normalized=False, special=True) for index in sorted(vocabulary.special_ids)
    ]
    plain.add_tokens(user_defined)
    parsing.add_tokens(user_defined)
    parsing.add_special_tokens(special)
    wants_bos = _value(metadata, "add_bos_token", bool)
    wants_eos = _value(metadata, "add_eos_token", bool)
    add_bos = add_bos if wants_bos is None else wants_bos
    if add_bos and vocabulary.bos_id is None:
        raise TokenizerError("the model wants a start token but does not name one")
    return TokenizerParts(
        plain=plain,
        parsing=parsing,
        texts=vocabulary.texts,
        pieces=pieces,
        special_ids=vocabulary.special_ids,
        unknown_id=unknown_id,
        bos_id=vocabulary.bos_id,
        eos_ids=vocabulary.eos_ids,
        add_bos=add_bos,
        add_eos=bool(wants_eos),
        has_space_prefix=has_space_prefix,
    )


def _read_vocabulary(metadata: Mapping[str, Any], bos_default: int | None, eos_default: int | None) -> _Vocabulary:
    texts = check_texts(_strings(metadata, "tokens"))
    count = len(texts)
    types = _read_types(metadata, count)
    bos_id = _token_id(metadata, "bos_token_id", count, bos_default)
    eos_id = _token_id(metadata, "eos_token_id", count, eos_default)
    named = [eos_id] + [_token_id(metadata, key, count, None) for key in ("eot_token_id", "eom_token_id")]
    by_text = [index for index, text in enumerate(texts) if text in END_OF_TURN_TEXTS]
    eos_ids = tuple(dict.fromkeys(index for index in [*named, *by_text] if index is not None))
    special = {index for index, kind in enumerate(types) if kind in (TokenType.CONTROL, TokenType.UNKNOWN)}
    # Converters sometimes mark the end token as ordinary text; a user could then end the turn by writing it out.
    special.update(eos_ids, () if bos_id is None else (bos_id,))
    return _Vocabulary(texts, types, frozenset(special), bos_id, eos_ids)


def _read_types(metadata: Mapping[str, Any], count: int) -> tuple[int, ...]:
    values = metadata.get("tokenizer.ggml.token_type")
    if values is None:
        return (TokenType.NORMAL,) * count
    types = _numbers(values, "token_type", count)
    if any(kind not in _KNOWN_TYPES for kind in types):
        raise TokenizerError("tokenizer.ggml.token_type holds an unknown type")
    return tuple(int(kind) for kind in types)


_KNOWN_TYPES = frozenset(int(kind) for kind in TokenType)


def _read_scores(metadata: Mapping[str, Any], count: int) -> list[float]:
    values = metadata.get("tokenizer.ggml.scores")
    if values is None:
        raise TokenizerError("a SentencePiece vocabulary needs tokenizer.ggml.scores")
    scores = [float(score) for score in _numbers(values, "scores", count)]
    if not all(map(math.isfinite, scores)):
        raise TokenizerError("tokenizer.ggml.scores holds a value that is not finite")
    return scores


def _read_merges(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs in order of priority, parted by a blank. A token may itself begin with one, hence the search from 1 on."""
    merges = _strings(metadata, "merges")
    if len(merges) > MAX_MERGES:
        raise TokenizerError(f"more than {MAX_MERGES} merges")
    try:
        for index, merge in enumerate(merges):
            cut = merge.find(" ", 1)
            if cut < 0 or cut == len(merge) - 1:
                raise TokenizerError(f"merge {index} is not a pair")
            yield merge[:cut], merge[cut + 1 :]
    except UnicodeDecodeError as error:
        raise TokenizerError("a merge is not valid UTF-8") from error


def _merges_from_scores(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, best score first.

    Control and byte tokens are left out, as in SentencePiece: llama.cpp would merge "</" and "s>" into the end token
    even when told not to parse special tokens, which lets a user's text end the turn.
    """
    ids = {text: index for index, text in enumerate(vocabulary.texts)}
    mergeable = [
        index
        for index, kind in enumerate(vocabulary.types)
        if kind != TokenType.BYTE and index not in vocabulary.special_ids and len(vocabulary.texts[index]) > 1
    ]
    if len(mergeable) > 1 and len({scores[index] for index in mergeable}) == 1:
        raise UnsupportedModelError("a SentencePiece vocabulary whose scores are all the same is not supported")
    if sum(len(vocabulary.texts[index]) for index in mergeable) > _MAX_SPLITS:
        raise TokenizerError("the tokens of the vocabulary are too long")
    merges = []
    for index in sorted(mergeable, key=lambda index: (-scores[index], index)):
        text = vocabulary.texts[index]
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                merges.append((left, right))
    return merges


def _bpe(texts: Sequence[str], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab={text: index for index, text in enumerate(texts)}, merges=merges, **options)
    except Exception as error:  # tokenizers raises plain Exception; it names the merge that is not in the vocabulary
        raise TokenizerError("the merges do not fit the vocabulary") from error


def _sentencepiece_piece(text: str, kind: int, is_special: bool) -> bytes:
    value = byte_token_value(text)
    if kind == TokenType.BYTE:
        if value is None:
            raise TokenizerError("a byte token is not of the form <0xNN>")
        return bytes([value])
    if is_special or kind == TokenType.USER_DEFINED:
        return text.encode()
    return sentencepiece_bytes(text)


def _value(metadata: Mapping[str, Any], key: str, kind: type) -> Any:
    """`tokenizer.ggml.<key>` or None if absent. Raises TokenizerError if it is of another type."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is not None and not isinstance(value, kind):
        raise TokenizerError(f"tokenizer.ggml.{key} is not a {kind.__name__}")
    return value


def _token_id(metadata: Mapping[str, Any], key: str, count: int, default: int | None) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise TokenizerError(f"tokenizer.ggml.{key} is not the id of a token")
    return value


def _strings(metadata: Mapping[str, Any], key: str) -> Sequence[str]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if values is None:
        raise TokenizerError(f"tokenizer.ggml.{key} is missing")
    if isinstance(values, str | bytes) or not (hasattr(values, "__len__") and hasattr(values, "__iter__")):
        raise TokenizerError(f"tokenizer.ggml.{key} is not a list of strings")
    if len(values) and not isinstance(next(iter(values)), str):
        raise TokenizerError(f"tokenizer.ggml.{key} is not a list of strings")
    return cast(Sequence[str], values)


def _numbers(values: Any, key: str, count: int) -> list[Any]:
    """Python numbers of an array in the metadata (a tuple or a NumPy array), one per token."""
    numbers = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(numbers, list | tuple) or len(numbers) != count:
        raise TokenizerError(f"tokenizer.ggml.{key} does not have one number per token")
    if any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):
        raise TokenizerError(f"tokenizer.ggml.{key} is not a list of numbers")
    return list(numbers)
