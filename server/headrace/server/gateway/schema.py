"""The shapes of OpenAI's API that the gateway takes and gives (platform.openai.com/docs/api-reference, 2026-11).

A field that is unknown here is refused, as OpenAI does. Beyond OpenAI's, the sampling parameters that vLLM's users know
are taken: top_k, min_p, repetition_penalty, min_tokens, ignore_eos, stop_token_ids, cache_salt, priority.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, StrictBool, StrictInt, field_validator


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Request):
    """stream_options."""

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False  # padding against readers of lengths: we send none


class _Sampling(_Request):
    """What /v1/chat/completions and /v1/completions have in common. None: the server's default."""

    model: str = ""
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    max_tokens: StrictInt | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: StrictInt | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: StrictInt | None = None
    min_tokens: StrictInt | None = None
    stop: list[str] | None = None
    stop_token_ids: list[StrictInt] | None = None
    ignore_eos: StrictBool | None = None
    n: StrictInt | None = None
    cache_salt: str = ""
    priority: Literal["interactive", "standard", "batch"] = "standard"
    user: str = ""  # taken, and not used: a label of the caller's that must not reach the log unseen

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class TextPart(_Request):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Request):
    """One turn. content: text, or parts of text."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = ""
    name: str | None = None

    @property
    def text(self) -> str:
        """The content in one piece."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Sampling):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool = False
    top_logprobs: StrictInt | None = None


class CompletionRequest(_Sampling):
    """POST /v1/completions. prompt: a text, texts, token ids or lists of token ids."""

    prompt: str | list[str] | list[StrictInt] | list[list[StrictInt]]
    logprobs: StrictInt | None = None
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    suffix: None = None
