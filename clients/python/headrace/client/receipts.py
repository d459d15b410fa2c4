"""A generation on file, and its proof: the prompt, the tokens and the receipt; `replay` makes it again and compares.

`headrace generate --receipt FILE` writes one, `headrace replay FILE` reads it.

    record = Record(prompt={"text": "Once upon a time"}, token_ids=ids, receipt=finish.receipt)
    Path("receipt.json").write_text(record.to_json())
    ...
    assert not replay(client, Record.from_json(text))
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.client.sync import Client
from headrace.client.types import Receipt

FORMAT = "headrace-receipt/1"
_PROMPTS = {"text": "prompt", "messages": "messages", "token_ids": "token_ids"}  # to the arguments of `complete`


@dataclass(frozen=True)
class Record:
    """`prompt` has one key: "text", "messages" (mappings of role and content) or "token_ids"."""

    prompt: Mapping[str, Any]
    token_ids: tuple[int, ...]
    receipt: Receipt

    def to_json(self) -> str:
        """For a file."""
        document = {
            "format": FORMAT,
            "prompt": dict(self.prompt),
            "receipt": dataclasses.asdict(self.receipt),
            "token_ids": list(self.token_ids),
        }
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Raises ValueError where that is no receipt, or one that does not fit its own tokens."""
        try:
            document = json.loads(text)
            if document["format"] != FORMAT:
                raise ValueError(f"its format is {str(document['format'])[:40]!r}, not {FORMAT!r}")
            fields = dict(document["receipt"])
            sampling = dict(fields.pop("sampling"))
            if "logit_bias" in sampling:
                sampling["logit_bias"] = {int(key): value for key, value in sampling["logit_bias"].items()}
            receipt = Receipt(sampling=sampling, **fields)  # type: ignore[arg-type]
            record = cls(dict(document["prompt"]), tuple(document["token_ids"]), receipt)
            own_hash = token_hash(record.token_ids)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, struct.error) as error:
            raise ValueError(f"no receipt of Headrace: {type(error).__name__} {error}") from None
        if list(record.prompt) not in ([name] for name in _PROMPTS):
            raise ValueError(f"its prompt must have one of the keys {', '.join(_PROMPTS)}")
        if own_hash != receipt.token_hash or len(record.token_ids) != receipt.generated_tokens:
            raise ValueError("its tokens are not those that it was given for: the file was changed")
        return record


@dataclass(frozen=True)
class Difference:
    """What is not as the receipt says; `then` and `now` are for people."""

    what: str
    then: str
    now: str


def replay(
    client: Client, record: Record, *, model: str | None = None, timeout: float | None = None
) -> list[Difference]:
    """Generate it again, on the server of `client`, and tell all that differs; nothing: it is proved. Raises
    HeadraceError where the server refuses."""
    (form,) = record.prompt
    prompt = {_PROMPTS[form]: record.prompt[form]}
    (completion,) = client.complete(**prompt, model=model, timeout=timeout, **record.receipt.sampling)
    found, then = completion.finish.receipt, record.receipt
    assert found is not None  # Complete always gives one
    names = ("model_digest", "tokenizer_digest", "arithmetic", "server_version", "prompt_hash")
    differences = [
        Difference(name.replace("_", " "), str(getattr(then, name)), str(getattr(found, name)))
        for name in names
        if getattr(then, name) != getattr(found, name)
    ]
    # One that was cancelled proves its beginning.
    tokens = completion.token_ids[: then.generated_tokens]
    if token_hash(tokens) != then.token_hash:
        place = _first_difference(record.token_ids, tokens)
        differences.append(
            Difference(f"tokens from index {place} on", _excerpt(record.token_ids, place), _excerpt(tokens, place))
        )
    return differences


def token_hash(ids: Sequence[int]) -> str:
    """SHA-256 of token ids, each as 4 bytes, little-endian; as in Receipt."""
    return hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _excerpt(ids: Sequence[int], start: int) -> str:
    shown = ", ".join(map(str, ids[start : start + 8]))
    return shown + (", ..." if len(ids) > start + 8 else "") or "(none)"
