"""What a tokenizer is made of, whatever file it came from.

`tokenizer_gguf` and `tokenizer_hf` read a model file and return `TokenizerParts`; `tokenizer.Tokenizer` runs on them.
Here too: how the three alphabets of token texts (byte-level, SentencePiece, plain) turn into bytes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import tokenizers
from headrace.models.errors import TokenizerError

MAX_TOKENS = 1 << 20  # four times Gemma's 262,144, the largest in use
MAX_MERGES = 1 << 21  # four times the 446,189 of o200k
MAX_TOKEN_CHARS = 4096  # the longest in use are runs of 128 blanks and DeepSeek's of about 500 characters
MAX_VOCABULARY_CHARS = 64 << 20
MAX_DIRECTORY_FILE_BYTES = 256 << 20  # Gemma 3's tokenizer.json is 33 MB

SPACE_MARK = "\u2581"  # SentencePiece writes a blank as LOWER ONE EIGHTH BLOCK

# Texts that mean "my turn is over" in one chat format or another. Model files often name one end token only, while the
# model answers with another one. The list is the one llama.cpp uses, less the tokens of formats we refuse at load.
END_OF_TURN_TEXTS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<EOT>",
        "<｜end▁of▁sentence｜>",
    }
)


@dataclass(frozen=True)
class TokenizerParts:
    """A tokenizer as read from a file; all ids are checked to be inside the vocabulary."""

    plain: tokenizers.Tokenizer  # treats the texts of control tokens as ordinary text
    parsing: tokenizers.Tokenizer  # recognises control tokens; shares its vocabulary with `plain`
    texts: tuple[str, ...]  # index = token id; as written in the file
    pieces: tuple[bytes, ...]  # index = token id; what the token adds to the output
    special_ids: frozenset[int]  # control and unknown tokens
    unknown_id: int | None  # what a character outside the vocabulary becomes, where there is no byte fallback
    bos_id: int | None
    eos_ids: tuple[int, ...]  # any of them ends a generation; the file's own end token first
    add_bos: bool
    add_eos: bool
    has_space_prefix: bool  # encode() puts a blank before the text, so decode() takes it away


def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level alphabet (openai/gpt-2, encoder.py, `bytes_to_unicode`).

    Printable Latin-1 characters stand for themselves; the other 68 bytes, in order, take the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


# Characters that stand for a byte, as that byte's Latin-1 character; what else Latin-1 has, as one that it has not.
_TO_LATIN_1 = dict.fromkeys(range(256), 0x100) | {ord(char): byte for char, byte in byte_level_alphabet().items()}


def byte_level_bytes(text: str) -> bytes:
    """Bytes of a byte-level token; as in `tokenizers`, a text that leaves the alphabet stands for itself."""
    try:
        return text.translate(_TO_LATIN_1).encode("latin-1")
    except UnicodeEncodeError:
        return text.encode()


def sentencepiece_bytes(text: str) -> bytes:
    """Bytes of an ordinary SentencePiece token: its text with the space mark turned into a blank."""
    return text.replace(SPACE_MARK, " ").encode()


def byte_token_value(text: str) -> int | None:
    """Value of a byte-fallback token such as `<0x0A>`, None if the text is not of that form."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return int(text[3:5], 16)
        except ValueError:
            return None
    return None


def check_texts(texts: Iterable[str]) -> tuple[str, ...]:
    """Token texts in id order, non-empty and unique. Raises TokenizerError for a vocabulary that breaks a limit."""
    ids: dict[str, int] = {}
    chars = 0
    try:
        for index, text in enumerate(texts):
            if index >= MAX_TOKENS:
                raise TokenizerError(f"the vocabulary has more than {MAX_TOKENS} tokens")
            chars += len(text)
            if len(text) > MAX_TOKEN_CHARS or chars > MAX_VOCABULARY_CHARS:
                raise TokenizerError(f"token {index} is too long, or the vocabulary as a whole is")
            # llama.cpp names empty tokens like this; an empty text could neither be looked up nor matched.
            name = text or f"[EMPTY_{index}]"
            if ids.setdefault(name, index) != index:
                raise TokenizerError(f"tokens {ids[name]} and {index} have the same text")
    except UnicodeDecodeError as error:
        raise TokenizerError("a token is not valid UTF-8") from error
    if not ids:
        raise TokenizerError("the vocabulary is empty")
    return tuple(ids)
