"""Builds a tokenizer from a Hugging Face directory; called by `Tokenizer.from_directory`.

tokenizer.json says how text becomes ids. Which ids start and end a text is spread over tokenizer_config.json,
special_tokens_map.json, generation_config.json and config.json, in that order of authority for the start token; every
end token that any of them names ends a generation.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers
from headrace.models.errors import TokenizerError, UnsupportedModelError
from headrace.models.tokenizer_parts import (
    END_OF_TURN_TEXTS,
    MAX_DIRECTORY_FILE_BYTES,
    TokenizerParts,
    byte_level_bytes,
    byte_token_value,
    check_texts,
    sentencepiece_bytes,
)


def read_directory(path: Path) -> TokenizerParts:
    """Raises UnsupportedModelError for a kind we cannot turn into bytes, TokenizerError for files that contradict."""
    source = _read(path / "tokenizer.json")
    if source is None:
        raise TokenizerError(f"{path.name}: tokenizer.json is missing")
    description = _parse(path / "tokenizer.json", source)
    byte_level = _is_byte_level(description)
    plain, parsing = _load(source), _load(source)
    plain.encode_special_tokens = True  # "encode their texts", that is: do not recognise them

    texts = _texts(parsing)
    added = parsing.get_added_tokens_decoder()
    companions = _Companions(path)
    by_text = {text: index for index, text in enumerate(texts)}
    special = {index for index, token in added.items() if token.special}
    bos_id = companions.start_id(by_text)
    ends = [*companions.end_ids(by_text), *(index for index in sorted(special) if texts[index] in END_OF_TURN_TEXTS)]
    eos_ids = tuple(dict.fromkeys(ends))
    special.update(eos_ids, () if bos_id is None else (bos_id,))
    unknown = description["model"].get("unk_token")
    return TokenizerParts(
        plain=plain,
        parsing=parsing,
        texts=texts,
        pieces=tuple(_piece(text, byte_level, added.get(index)) for index, text in enumerate(texts)),
        special_ids=frozenset(special),
        unknown_id=by_text.get(unknown) if isinstance(unknown, str) else None,
        bos_id=bos_id,
        eos_ids=eos_ids,
        add_bos=bos_id is not None and companions.adds("add_bos_token", _frame(parsing)[:1] == [bos_id]),
        add_eos=bool(eos_ids) and companions.adds("add_eos_token", _frame(parsing)[-1:] == [eos_ids[0]]),
        has_space_prefix=not byte_level and _has_space_prefix(description),
    )


class _Companions:
    """The small JSON files beside tokenizer.json; each may be absent."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = _json_object(path / "tokenizer_config.json")
        self._special = _json_object(path / "special_tokens_map.json")
        self._numbered = [_json_object(path / name) for name in ("generation_config.json", "config.json")]

    def start_id(self, by_text: dict[str, int]) -> int | None:
        return next(iter(self._ids("bos_token", by_text)), None)

    def end_ids(self, by_text: dict[str, int]) -> list[int]:
        return self._ids("eos_token", by_text)

    def adds(self, key: str, default: bool) -> bool:
        value = self._tokenizer.get(key)
        return value if isinstance(value, bool) else default

    def _ids(self, key: str, by_text: dict[str, int]) -> list[int]:
        """Ids of the token(s) called `key`: first the files that name it by text, then those that number it."""
        found: list[int] = []
        for source in (self._tokenizer, self._special):
            value = source.get(key)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                if text not in by_text:
                    raise TokenizerError(f"{key} is not in the vocabulary")
                found.append(by_text[text])
        for source in self._numbered:
            value = source.get(f"{key}_id")
            for index in value if isinstance(value, list) else [value]:
                if index is None:
                    continue
                if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(by_text):
                    raise TokenizerError(f"{key}_id is not the id of a token")
                found.append(index)
        return found


def _load(source: bytes) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(source)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a Rust panic arrives as a BaseException
        raise TokenizerError("tokenizer.json cannot be read by the tokenizers library") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _texts(tokenizer: tokenizers.Tokenizer) -> tuple[str, ...]:
    """Token texts by id. Ids that tokenizer.json leaves out get a name that no text can be encoded to."""
    by_id = {index: text for text, index in tokenizer.get_vocab(with_added_tokens=True).items()}
    if not by_id or max(by_id) >= 2 * len(by_id) + 1024:
        raise TokenizerError("the ids of tokenizer.json are empty or far apart")
    return check_texts(by_id.get(index, "") for index in range(max(by_id) + 1))


def _piece(text: str, byte_level: bool, added: tokenizers.AddedToken | None) -> bytes:
    if added is not None and (added.special or byte_level):
        return text.encode()
    if byte_level:
        return byte_level_bytes(text)
    value = byte_token_value(text)
    return sentencepiece_bytes(text) if value is None else bytes([value])


def _is_byte_level(description: dict[str, Any]) -> bool:
    """True for GPT-2's byte alphabet, False for SentencePiece's. Raises UnsupportedModelError for any other decoder."""
    if not isinstance(description.get("model"), dict) or description["model"].get("type") not in ("BPE", "Unigram"):
        raise UnsupportedModelError("tokenizer.json holds neither a BPE nor a Unigram model")
    kinds = {part["type"] for part in _steps(description.get("decoder"), "decoders")}
    if "ByteLevel" in kinds:
        return True
    if kinds & {"ByteFallback", "Metaspace"}:
        return False
    raise UnsupportedModelError("the decoder of tokenizer.json is neither byte-level nor SentencePiece")


def _has_space_prefix(description: dict[str, Any]) -> bool:
    """Whether encoding puts a blank before a text: a Prepend normalizer or a Metaspace that prepends."""
    for part in _steps(description.get("normalizer"), "normalizers"):
        if part["type"] == "Prepend":
            return True
    for part in _steps(description.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "Metaspace":
            return part.get("prepend_scheme", "always") != "never" and part.get("add_prefix_space", True) is True
    return False


def _steps(part: Any, plural: str) -> list[dict[str, Any]]:
    """The steps of a component of tokenizer.json, whether it is one step or a Sequence of them."""
    steps = part.get(plural, [part]) if isinstance(part, dict) else []
    return [step for step in steps if isinstance(step, dict) and isinstance(step.get("type"), str)]


def _frame(tokenizer: tokenizers.Tokenizer) -> list[int]:
    """The tokens that tokenizer.json itself puts around a text."""
    return list(tokenizer.encode("", add_special_tokens=True).ids)


def _read(path: Path) -> bytes | None:
    try:
        if path.stat().st_size > MAX_DIRECTORY_FILE_BYTES:
            raise TokenizerError(f"{path.name} is larger than {MAX_DIRECTORY_FILE_BYTES} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TokenizerError(f"{path.name} cannot be read") from error


def _parse(path: Path, source: bytes) -> dict[str, Any]:
    try:
        value = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path.name} is not JSON") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path.name} is not a JSON object")
    return value


def _json_object(path: Path) -> dict[str, Any]:
    source = _read(path)
    return {} if source is None else _parse(path, source)
