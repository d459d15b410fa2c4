"""Text to token ids and back, for a GGUF file or a Hugging Face directory.

The front end encodes prompts with it and hands it to `detokenizer.Detokenizer` for the answers. Once built it never
changes and may be used from several threads at once; encoding releases the GIL.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from headrace.models.errors import TokenizerError
from headrace.models.tokenizer_gguf import read_gguf
from headrace.models.tokenizer_hf import read_directory
from headrace.models.tokenizer_parts import TokenizerParts

# One text is one task; the server decides how many run at once. Without this the first batch call starts a thread pool.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Code points that Unicode reserves for use inside a program, U+FDD0 to U+FDEF.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class Tokenizer:
    """A model's vocabulary. Ids run from 0 to `vocab_size` - 1; padding rows that a model has above have no text."""

    def __init__(self, parts: TokenizerParts) -> None:
        self._parts = parts
        self._not_from_text = parts.special_ids - {parts.unknown_id}
        # Longest first: of two that begin alike, the longer is the one meant.
        longest_first = sorted(parts.special_ids, key=lambda index: (-len(parts.texts[index]), index))
        self._specials = {parts.texts[index]: index for index in longest_first}
        self._first_chars = frozenset(text[0] for text in self._specials)
        self._mark = "".join(secrets.choice(_NONCHARACTERS) for _ in range(16))  # 80 bits

    def digest(self) -> str:
        """SHA-256 of all that decides what texts and ids become: vocabulary, merges, special tokens, alphabet."""
        parts = self._parts
        digest = hashlib.sha256(parts.plain.to_str().encode())
        for piece in parts.pieces:
            digest.update(len(piece).to_bytes(4, "little") + piece)
        flags = (sorted(parts.special_ids), parts.unknown_id, parts.bos_id, parts.eos_ids, parts.add_bos, parts.add_eos)
        digest.update(repr((*flags, parts.has_space_prefix)).encode())
        return digest.hexdigest()

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """From the metadata of a GGUF file. Raises TokenizerError or UnsupportedModelError."""
        return cls(read_gguf(metadata))

    @classmethod
    def from_directory(cls, path: Path) -> "Tokenizer":
        """From tokenizer.json and its companions in a directory. Raises TokenizerError or UnsupportedModelError."""
        return cls(read_directory(path))

    def shield(self, text: str) -> str:
        """Marks every control token that is written out in a user's text, so that it stays text in a rendered chat.

        A chat template joins what users wrote with the control tokens that part the turns, and the whole is encoded
        with `parse_special`. Unmarked, a message that says "<|im_end|>" would end its turn and could forge another.
        `encode` honours the marks, `unshield` takes them off. The mark is secret: no user can write or undo one.
        """
        if self._first_chars.isdisjoint(text):
            return text
        for special in self._specials:
            if special in text:
                text = text.replace(special, special[:1] + self._mark + special[1:])
        return text

    def unshield(self, text: str) -> str:
        """The text without the marks of `shield`."""
        return text.replace(self._mark, "")

    def encode(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`.

        `parse_special` decides whether the written-out text of a control token ("<|im_end|>") becomes that token. It is
        for text we wrote (a rendered chat template), never for text of a user, who could otherwise end a turn or forge
        one. Raises TokenizerError if the text is not valid Unicode (a lone surrogate).
        """
        if not parse_special:
            ids = self._encode_plain(text)
        elif self._mark in text:
            ids = self._encode_shielded(text)
        else:
            ids = _run(self._parts.parsing, text)
        if add_bos and self._parts.bos_id is not None:
            ids.insert(0, self._parts.bos_id)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of a whole token sequence; what is not UTF-8 becomes U+FFFD. Raises TokenizerError for a negative id."""
        special: frozenset[int] = self._parts.special_ids if skip_special else frozenset()
        data = b"".join(self.token_bytes(index) for index in ids if index not in special)
        if self._parts.has_space_prefix:
            data = data.removeprefix(b" ")
        return data.decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the output, empty for a padding row. Raises TokenizerError for a negative id."""
        if token_id < 0:
            raise TokenizerError("a token id is negative")
        return self._parts.pieces[token_id] if token_id < len(self._parts.pieces) else b""

    def token_text(self, token_id: int) -> str:
        """The token as the model file writes it ("Ġthe", "<|im_end|>"). Raises TokenizerError for a bad id."""
        if not 0 <= token_id < len(self._parts.texts):
            raise TokenizerError("a token id is outside the vocabulary")
        return self._parts.texts[token_id]

    def is_special(self, token_id: int) -> bool:
        """Whether the token steers the model rather than being text: start, end, turn marks, unknown."""
        return token_id in self._parts.special_ids

    @property
    def vocab_size(self) -> int:
        return len(self._parts.texts)

    @property
    def bos_id(self) -> int | None:
        return self._parts.bos_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a generation; the model's own end token first."""
        return self._parts.eos_ids

    @property
    def add_bos(self) -> bool:
        """Whether the model wants its start token before a text."""
        return self._parts.add_bos

    @property
    def add_eos(self) -> bool:
        """Whether the model wants its end token after a text that is complete (never after a prompt)."""
        return self._parts.add_eos

    @property
    def has_space_prefix(self) -> bool:
        """Whether a text begins with a blank the user did not write, as SentencePiece does."""
        return self._parts.has_space_prefix

    def _encode_plain(self, text: str) -> list[int]:
        ids = _run(self._parts.plain, text)
        return ids if self._not_from_text.isdisjoint(ids) else self._without_special(ids)

    def _encode_shielded(self, text: str) -> list[int]:
        """As the library does: control tokens part the text, each stretch between them is encoded by itself."""
        present = [re.escape(special) for special in self._specials if special in text]
        stretches = re.split(f"({'|'.join(present)})", text) if present else [text]
        ids: list[int] = []
        for position, stretch in enumerate(stretches):
            if position % 2:  # re.split puts what the group matched at the odd positions
                ids.append(self._specials[stretch])
            elif stretch:
                ids.extend(self._encode_plain(self.unshield(stretch)))
        return ids

    def _without_special(self, ids: list[int]) -> list[int]:
        """Spells out, character by character, the control tokens that ordinary text was merged into.

        No vocabulary in use needs this; it holds for any vocabulary, hostile ones included.
        """
        spelled: list[int] = []
        for index in ids:
            if index not in self._not_from_text:
                spelled.append(index)
                continue
            for char in self._parts.texts[index]:
                alone = _run(self._parts.plain, char)
                spelled.extend(part for part in alone if part not in self._not_from_text)
        return spelled


def _run(encoder: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        # The batch call: it releases the GIL and computes no offsets, `encode` does neither.
        ids: list[int] = encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
    except (UnicodeEncodeError, TypeError) as error:
        raise TokenizerError("the text is not valid Unicode") from error
    return ids
