"""Runs a server in this process for `headrace serve` and `headrace demo`: fetches, loads with a bar, says so."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from headrace.server.cli import output

if TYPE_CHECKING:
    from headrace.server.app import RunningServer
    from headrace.server.config import ServerConfig
    from headrace.server.spawn import SpawnedEngine


def serve_until_told(config: ServerConfig, engine: SpawnedEngine, log_level: str, *, as_json: bool) -> None:
    """Serves until SIGTERM or SIGINT. Raises ModelError, OSError or CommandError where that cannot be."""
    from headrace.server import logs
    from headrace.server.app import run_server

    config = fetch(config)
    logs.configure(config.log_format, getattr(logging, log_level.upper()))
    announcements: list[asyncio.Task[None]] = []

    def on_listen(server: RunningServer) -> None:
        announcements.append(asyncio.ensure_future(_announce(server, as_json)))

    status = run_server(config, on_listen, first_engine=engine)
    if status != 0:
        raise output.CommandError("the model cannot be served; the log says why")


def fetch(config: ServerConfig) -> ServerConfig:
    """The same configuration with the model fetched, checked, and named by its path."""
    from headrace.server.cli.progress import fetch_model

    return replace(config, model=str(fetch_model(config.model)), model_name=config.name)


async def wait_ready(server: RunningServer) -> None:
    """Waits for the model with a bar. Raises CommandError where it cannot be loaded."""
    from headrace.server.app import ServerFailedError
    from headrace.server.cli.progress import model_bar

    ready = asyncio.ensure_future(server.wait_ready())
    try:
        with model_bar() as bar:
            while not ready.done():
                bar.show("load", server.host.progress, 1.0)
                await asyncio.wait((ready,), timeout=0.1)
        await ready
    except ServerFailedError as error:
        raise output.CommandError(f"the model cannot be served: {error}") from error
    finally:
        ready.cancel()


async def _announce(server: RunningServer, as_json: bool) -> None:
    try:
        await wait_ready(server)
    except output.CommandError:
        return  # run_server sees it too, and ends
    if as_json:
        print_ready(server)
    else:
        _print_welcome(server)


def print_ready(server: RunningServer) -> None:
    """One line of JSON for scripts."""
    import json

    line = {"target": server.address, "model": server.host.name, "pid": os.getpid()}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def choices(server: RunningServer) -> list[tuple[str, str]]:
    """What was chosen for the model and the engine, as (what, value) lines for people."""
    from headrace.server import backends

    host, config = server.host, server.config
    ready = host.supervisor.ready
    threads = str(ready.num_threads) if ready is not None else "not known yet"
    rows = [("back end", host.backend), ("threads", threads)]
    if host.info is not None:
        info = host.info
        weights = f"{output.count_text(info.parameters)} weights, {info.quantization}"
        rows.insert(0, ("model", f"{host.name} ({info.architecture}, {weights}, {output.bytes_text(info.file_bytes)})"))
    rows.append(("context", f"{host.context_length} tokens"))
    if host.supervisor.ready is not None:
        blocks = host.supervisor.ready.stats.num_total_blocks
        size = host.supervisor.ready.block_size
        rows.append(("KV cache", f"{blocks} blocks of {size} tokens: {blocks * size} tokens"))
    budget = backends.token_budget(host.backend, config.max_num_batched_tokens, config.max_num_seqs)
    rows.append(("step", f"up to {config.max_num_seqs} sequences and {budget} tokens"))
    return rows


def print_choices(server: RunningServer) -> None:
    """`choices` as a table on standard output."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    for what, value in choices(server):
        table.add_row(f"[dim]{what}[/]", escape(value))
    output.console().print(table)


def _print_welcome(server: RunningServer) -> None:
    console = output.console()
    target = server.address
    is_default = target == "127.0.0.1:50051"
    option = "" if is_default else f" --target {target}"
    console.print(f"[bold green]ready[/] on [bold]{target}[/]")
    print_choices(server)
    console.print("\n[bold]try next[/], in another terminal:")
    command = output.program()
    console.print(f"  {command} chat{option}", markup=False)
    console.print(f'  {command} generate{option} "Once upon a time"', markup=False)
    body = '{"prompt": {"text": "Once upon a time"}, "sampling": {"max_tokens": 16}}'
    console.print(f"  grpcurl -plaintext -d '{body}' {target} headrace.v1.InferenceService/Generate", markup=False)
    console.print("or in Python:", markup=False)
    console.print("  from headrace.client import Client", markup=False)
    console.print(
        f'  for chunk in Client("{target}").generate("Once upon a time", max_tokens=16): print(chunk.text, end="")',
        markup=False,
    )
    console.print("\n[dim]Ctrl-C drains and stops.[/]")
