"""`headrace generate`: one prompt in, the continuation streamed to standard output."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from headrace.server.cli import options, output

if TYPE_CHECKING:
    from headrace.client import Completion, Generation
    from headrace.client.types import Messages


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The text to go on with; '-' or none reads standard input.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", "-c", help="Send it as a user's message, by the chat template.")
    ] = False,
    system: options.System = "",
    target: options.Target = options.DEFAULT_TARGET,
    model: options.ServedModel = "",
    timeout: options.Timeout = 600.0,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on over broken connections and servers that die.")
    ] = False,
    receipt: Annotated[
        Path | None, typer.Option("--receipt", help="Write what `headrace replay` needs to this file.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Continue a text, streaming to standard output.

    - **headrace generate "Once upon a time" -n 40**

    - **headrace generate --chat "Why is the sky blue?"**

    - **git diff | headrace generate --chat --system "Write a commit message."**

    - **headrace generate --json "1, 2, 3," | jq -r .text**

    - **headrace generate "Once upon a time" --receipt receipt.json**, and later **headrace replay receipt.json**
    """
    from headrace.client import Client

    text = _read_prompt(prompt)
    sampling = options.make_sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
    )
    messages: Messages | None = None
    if chat or system:
        system_turn = [{"role": "system", "content": system}] if system else []
        messages = [*system_turn, {"role": "user", "content": text}]
    with Client(target, model=model, timeout=timeout) as client:
        prompt = text if messages is None else None
        chunks = client.generate(prompt, messages=messages, resume=resume, **sampling)
        completion = _collect(chunks, is_shown=not as_json)
    if as_json:
        output.print_json(completion)
    if receipt is not None:
        _write_receipt(receipt, {"text": text} if messages is None else {"messages": messages}, completion)


def _read_prompt(prompt: str | None) -> str:
    if prompt not in (None, "-"):
        return str(prompt)
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("give a PROMPT, or pipe one in", param_hint="PROMPT")
    text = sys.stdin.read().rstrip("\n")
    if not text:
        raise typer.BadParameter("standard input is empty", param_hint="PROMPT")
    return text


def _collect(chunks: Generation, *, is_shown: bool) -> Completion:
    """The whole answer; shown as it comes where wanted."""
    from headrace.client import Completion

    token_ids: list[int] = []
    text, finish = "", None
    with chunks:
        for chunk in chunks:
            token_ids += chunk.token_ids
            text += chunk.text
            finish = chunk.finish
            if is_shown:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
    assert finish is not None  # the iteration ends with one, or raises
    if is_shown and sys.stdout.isatty():
        sys.stdout.write("\n")
    return Completion(0, tuple(token_ids), text, (), finish)


def _write_receipt(path: Path, prompt: Mapping[str, object], completion: Completion) -> None:
    from headrace.client.receipts import Record

    assert completion.finish.receipt is not None  # Generate always gives one
    path.write_text(Record(prompt, completion.token_ids, completion.finish.receipt).to_json(), encoding="utf-8")
