"""`headrace models` and `headrace pull`: what can be served, what is in the cache, what a server has loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from headrace.server.cli import options, output

if TYPE_CHECKING:
    from headrace.client import ModelInfo
    from headrace.models.sources import KnownModel

_SPEC = "A name that `headrace models` lists, or hf://owner/name[/file.gguf][@revision]."


def models(
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Also ask the server at HOST:PORT what it has loaded.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """List the models: the catalogue, the cache, and with **--target** those of a running server."""
    from headrace.models.sources import DEFAULT_MODEL, list_models

    known = list_models()
    served: list[ModelInfo] | None = None
    if target is not None:
        from headrace.client import Client

        with Client(target, timeout=10.0) as client:
            served = client.models()
    if as_json:
        rows = [
            {
                "spec": m.spec,
                "description": m.description,
                "is_default": m.spec == DEFAULT_MODEL,
                "is_cached": m.path is not None,
                "path": None if m.path is None else str(m.path),
                "bytes": m.nbytes,
            }
            for m in known
        ]
        output.print_json({"known": rows, "served": served})
        return
    _print_known(known, DEFAULT_MODEL)
    if served is not None:
        _print_served(served, str(target))


def pull(
    model: Annotated[str | None, typer.Argument(help=f"{_SPEC} Default: the default model.")] = None,
    as_json: options.Json = False,
) -> None:
    """Fetch a model into the cache and check it; one that is there already is checked only.

    - **headrace pull** (the default model)

    - **headrace pull hf://HuggingFaceTB/SmolLM2-360M-Instruct**
    """
    from headrace.models.sources import DEFAULT_MODEL
    from headrace.server.cli.progress import fetch_model

    spec = model or DEFAULT_MODEL
    path = fetch_model(spec)
    if as_json:
        output.print_json({"spec": spec, "path": str(path)})
    else:
        output.console().print(f"[green]ready[/] {spec}: {path}", markup=True)


def _print_known(known: list[KnownModel], default: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("model", "", "size", "cached", box=None, pad_edge=False, header_style="bold")
    for model in known:
        mark = " [dim](default)[/]" if model.spec == default else ""
        table.add_row(
            escape(model.spec) + mark,
            escape(model.description),
            output.bytes_text(model.nbytes),
            "yes" if model.path else f"no: headrace pull {model.spec}",
        )
    output.console().print(table)


def _print_served(served: list[ModelInfo], target: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        "served at " + escape(target), "state", "architecture", "weights", "type", "context", "back end", box=None,
        pad_edge=False, header_style="bold",
    )  # fmt: skip
    for model in served:
        state = model.state if model.state != "loading" else f"loading {model.load_progress:.0%}"
        table.add_row(
            escape(model.name),
            state,
            model.architecture,
            output.count_text(model.parameters),
            model.quantization,
            str(model.context_length),
            model.backend,
        )
    output.console().print()
    output.console().print(table)
