"""Text to token ids and back, for a GGUF file or a Hugging Face directory.

The front end encodes prompts with it and hands it to `detokenizer.Detokenizer` for the answers. Once built it never
changes and may be used from several threads at once; encoding releases the GIL.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from headrace.models.errors import TokenizerError
from headrace.models.tokenizer_gguf import read_gguf
from headrace.models.tokenizer_hf import read_directory
from headrace.models.tokenizer_parts import TokenizerParts

# One text is one task; the server decides how many run at once. Without this the first batch call starts a thread pool.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Tokenizer:
    """A model's vocabulary. Ids run from 0 to `vocab_size` - 1; padding rows that a model has above have no text."""

    def __init__(self, parts: TokenizerParts) -> None:
        self._parts = parts
        self._not_from_text = parts.special_ids - {parts.unknown_id}

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """From the metadata of a GGUF file. Raises TokenizerError or UnsupportedModelError."""
        return cls(read_gguf(metadata))

    @classmethod
    def from_directory(cls, path: Path) -> "Tokenizer":
        """From tokenizer.json and its companions in a directory. Raises TokenizerError or UnsupportedModelError."""
        return cls(read_directory(path))

    def encode(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`.

        `parse_special` decides whether the written-out text of a control token ("<|im_end|>") becomes that token. It is
        for text we wrote (a rendered chat template), never for text of a user, who could otherwise end a turn or forge
        one. Raises TokenizerError if the text is not valid Unicode (a lone surrogate).
        """
        encoder = self._parts.parsing if parse_special else self._parts.plain
        try:
            # The batch call: it releases the GIL and computes no offsets, `encode` does neither.
            ids: list[int] = encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except (UnicodeEncodeError, TypeError) as error:
            raise TokenizerError("the text is not valid Unicode") from error
        if not parse_special and not self._not_from_text.isdisjoint(ids):
            ids = self._without_special(ids)
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
                alone = self._parts.plain.encode_batch_fast([char], add_special_tokens=False)[0].ids
                spelled.extend(part for part in alone if part not in self._not_from_text)
        return spelled
