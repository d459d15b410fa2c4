"""The text of single tokens, which OpenAI's log-probabilities show: asked of the server once, then remembered."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from headrace.client import AsyncClient

_MAX_REMEMBERED = 1 << 18  # more than any vocabulary


class TokenTexts:
    """Of all models behind one client. A token that is a part of a character reads U+FFFD."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._texts: dict[tuple[str, int], str] = {}

    async def __call__(self, ids: Sequence[int], model: str) -> list[str]:
        """The text of each id. Raises HeadraceError."""
        unknown = [i for i in dict.fromkeys(ids) if (model, i) not in self._texts]
        if unknown:
            if len(self._texts) + len(unknown) > _MAX_REMEMBERED:
                self._texts.clear()
                unknown = list(dict.fromkeys(ids))
            texts = await asyncio.gather(*(self._client.detokenize([i], model=model) for i in unknown))
            self._texts.update({(model, i): text for i, text in zip(unknown, texts, strict=True)})
        return [self._texts[model, i] for i in ids]
