"""`headrace generate`: one prompt in, the continuation streamed to standard output."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from headrace.server.cli import options, output

if TYPE_CHECKING:
    from headrace.client import Client, Sampling
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
    as_json: options.Json = False,
) -> None:
    """Continue a text, streaming to standard output.

    - **headrace generate "Once upon a time" -n 40**

    - **headrace generate --chat "Why is the sky blue?"**

    - **git diff | headrace generate --chat --system "Write a commit message."**

    - **headrace generate --json "1, 2, 3," | jq -r .text**
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
        if as_json:
            _print_completion(client, text, messages, sampling)
        else:
            _stream(client, text, messages, sampling)


def _read_prompt(prompt: str | None) -> str:
    if prompt not in (None, "-"):
        return str(prompt)
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("give a PROMPT, or pipe one in", param_hint="PROMPT")
    text = sys.stdin.read().rstrip("\n")
    if not text:
        raise typer.BadParameter("standard input is empty", param_hint="PROMPT")
    return text


def _stream(client: Client, text: str, messages: Messages | None, sampling: Sampling) -> None:
    prompt = text if messages is None else None
    with client.generate(prompt, messages=messages, **sampling) as chunks:
        for chunk in chunks:
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    if sys.stdout.isatty():
        sys.stdout.write("\n")


def _print_completion(client: Client, text: str, messages: Messages | None, sampling: Sampling) -> None:
    prompt = text if messages is None else None
    (completion,) = client.complete(prompt, messages=messages, **sampling)
    output.print_json(completion)
