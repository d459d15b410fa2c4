"""Turns the tokens of a running generation into text, a few at a time.

One token can be a part of a character, so text is held back until the character is complete: every push returns valid
UTF-8, and all pushes with the flush are what decoding the whole sequence at once gives. Called by the front end, once
per stream and step.
"""

import codecs
from collections.abc import Iterable

from headrace.models.tokenizer import Tokenizer


class Detokenizer:
    """State of one stream: at most three bytes of an incomplete character.

    A generation continues its prompt, so a blank at its start is kept. With `at_start` the tokens are a text of their
    own, and the blank that SentencePiece puts before a text is dropped, as in `Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, *, at_start: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._drops_blank = at_start and tokenizer.has_space_prefix
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """Text that the tokens complete, "" if none. Raises TokenizerError for a negative id."""
        tokenizer = self._tokenizer
        data = b"".join(
            [tokenizer.token_bytes(index) for index in ids if not (self._skip_special and tokenizer.is_special(index))]
        )
        if self._drops_blank and data:
            data = data.removeprefix(b" ")
            self._drops_blank = False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is still held back, at the end of the stream: U+FFFD for an incomplete character."""
        return self._decoder.decode(b"", final=True)
