"""`headrace replay`: makes a generation again from its receipt, and says what is not as it was."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from headrace.server.cli import options, output, serve_options

if TYPE_CHECKING:
    from headrace.client.receipts import Difference, Record


def replay(
    receipt: Annotated[Path, typer.Argument(help="A file that `headrace generate --receipt` wrote.")],
    target: options.Target = options.DEFAULT_TARGET,
    model_file: Annotated[
        str, typer.Option("--model-file", help="Run this model here instead of asking a server; as `serve --model`.")
    ] = "",
    backend: serve_options.Backend = "auto",
    kv_dtype: serve_options.KvDtype = "auto",
    activation_bits: serve_options.ActivationBits = 8,
    timeout: options.Timeout = 600.0,
    as_json: options.Json = False,
) -> None:
    """Prove a receipt: the same prompt, seed and parameters must give the same tokens. Exit status 1 where they do not.

    - **headrace generate "Once upon a time" --receipt receipt.json**, and later **headrace replay receipt.json**

    - **headrace replay receipt.json --model-file ./model.gguf** (no server needed)
    """
    from headrace.client.receipts import Record

    try:
        record = Record.from_json(receipt.read_text(encoding="utf-8"))
    except ValueError as error:
        raise output.CommandError(f"{receipt.name}: {error}") from None
    if model_file:
        differences = _replay_here(record, model_file, backend, kv_dtype, activation_bits, timeout)
    else:
        differences = _replay_at(target, record, timeout)
    if as_json:
        output.print_json({"is_same": not differences, "differences": differences})
    else:
        _print(record, differences)
    if differences:
        raise typer.Exit(output.FAILED)


def _replay_at(target: str, record: Record, timeout: float) -> list[Difference]:
    from headrace.client import Client
    from headrace.client.receipts import replay

    with Client(target) as client:
        return replay(client, record, timeout=timeout)


def _replay_here(
    record: Record, model: str, backend: str, kv_dtype: str, activation_bits: int, timeout: float
) -> list[Difference]:
    """On a server in this process."""
    import logging

    from headrace.server import logs, loop
    from headrace.server.app import start_server
    from headrace.server.cli import running
    from headrace.server.config import ServerConfig

    config = ServerConfig(
        model=model,
        port=0,
        backend=backend,  # type: ignore[arg-type]
        kv_dtype=kv_dtype,  # type: ignore[arg-type]
        activation_bits=activation_bits,
        lame_duck=0.0,
    )
    config = running.fetch(config)
    logs.configure("text", logging.WARNING)

    async def run() -> list[Difference]:
        async with start_server(config) as server:
            await running.wait_ready(server)
            return await asyncio.to_thread(_replay_at, server.address, record, timeout)

    return loop.run(run())


def _print(record: Record, differences: list[Difference]) -> None:
    from rich.markup import escape

    console = output.console()
    if not differences:
        console.print(f"[bold green]same[/] {record.receipt.generated_tokens} tokens: {record.receipt.token_hash}")
        return
    for difference in differences:
        console.print(f"[red]differs[/] {escape(difference.what)}", markup=True)
        console.print(f"  then: {difference.then}", markup=False)
        console.print(f"  now:  {difference.now}", markup=False)
