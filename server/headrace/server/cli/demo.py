"""`headrace demo`: a server from start to stop, and one chat answer through the bidirectional call in between."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from headrace.server import loop
from headrace.server.cli import options, output, serve_options

if TYPE_CHECKING:
    from headrace.client import Sampling
    from headrace.server.app import RunningServer
    from headrace.server.config import ServerConfig

_QUESTION = "Write two sentences about a water mill."


def demo(
    question: Annotated[str, typer.Argument(help="What to ask.")] = _QUESTION,
    model: Annotated[str, typer.Option("--model", "-m", help="As for `headrace serve`.")] = "smollm2-135m-instruct",
    backend: serve_options.Backend = "auto",
    max_tokens: options.MaxTokens = 64,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = None,
    as_json: options.Json = False,
) -> None:
    """Start a server, stream one chat answer from it, print its speed and the engine's choices, stop it."""
    from headrace.server.cli import running
    from headrace.server.config import ServerConfig

    wanted = ServerConfig(model=model, port=0, backend=backend, lame_duck=0.0)
    config = running.fetch(wanted)
    sampling = options.make_sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    _quieten()
    status = loop.run(_demo(config, question, sampling, as_json))
    if status != output.OK:
        raise output.CommandError("the demo failed")


@dataclass(frozen=True)
class DemoResult:
    """What the demo prints at its end. Seconds; `tokens_per_second` counts the tokens after the first."""

    answer: str
    prompt_tokens: int
    generated_tokens: int
    finish_reason: str
    start_seconds: float
    ttft_seconds: float
    tokens_per_second: float | None
    choices: dict[str, str]


async def _demo(config: ServerConfig, question: str, sampling: Sampling, as_json: bool) -> int:
    from headrace.server.app import start_server
    from headrace.server.cli import running

    begin = time.monotonic()
    async with start_server(config) as server:
        await running.wait_ready(server)
        start_seconds = time.monotonic() - begin
        if not as_json:
            running.print_choices(server)
            output.console().print(f"\n[bold]> {question}[/]")
        result = await _ask(server, question, sampling, start_seconds, as_json)
        await server.drain()
    if as_json:
        output.print_json(result)
    else:
        _print_result(result)
    return output.OK


async def _ask(
    server: RunningServer, question: str, sampling: Sampling, start_seconds: float, as_json: bool
) -> DemoResult:
    from headrace.client import AsyncClient
    from headrace.server.cli import running

    times: list[float] = []
    pieces: list[str] = []
    async with AsyncClient(server.address) as client, client.session() as session:
        begin = time.monotonic()
        messages = [{"role": "user", "content": question}]
        finish = None
        async for chunk in session.start(messages=messages, conversation="demo", **sampling):
            times.extend([time.monotonic()] * len(chunk.token_ids))
            pieces.append(chunk.text)
            finish = chunk.finish
            if not as_json:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
    assert finish is not None  # the iteration ends with a finish or raises
    elapsed = times[-1] - times[0]
    return DemoResult(
        answer="".join(pieces),
        prompt_tokens=finish.usage.prompt_tokens,
        generated_tokens=finish.usage.generated_tokens,
        finish_reason=finish.reason,
        start_seconds=round(start_seconds, 3),
        ttft_seconds=round(times[0] - begin, 4),
        tokens_per_second=round((len(times) - 1) / elapsed, 2) if elapsed > 0 else None,
        choices=dict(running.choices(server)),
    )


def _print_result(result: DemoResult) -> None:
    rate = f"{result.tokens_per_second:.1f} tokens/s" if result.tokens_per_second is not None else "one token"
    console = output.console()
    console.print(
        f"\n\n[bold]TTFT {1000 * result.ttft_seconds:.0f} ms, {rate}[/] "
        f"({result.prompt_tokens} tokens in, {result.generated_tokens} out, ended by {result.finish_reason}; "
        f"server ready after {result.start_seconds:.1f} s)"
    )
    command = output.program()
    console.print(f"server stopped. Next: [bold]{command} serve[/], and in another terminal [bold]{command} chat[/]")


def _quieten() -> None:
    """Only what goes wrong is logged: the demo's own lines are the story."""
    import logging

    from headrace.server import logs

    logs.configure("text", logging.WARNING)
