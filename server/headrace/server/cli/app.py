"""Puts the commands together and turns what they raise into a sentence and an exit status.

Each command is a module whose function has the options in its signature and imports what is heavy inside, so that
`headrace --help` and tab completion stay instant.
"""

from __future__ import annotations

from typing import Annotated

import typer
from headrace.server.cli import bench, chat, demo, doctor, gateway, generate, models, output, replay, serve

app = typer.Typer(
    name="headrace",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serve a large language model over gRPC, and talk to one.",
    epilog="""Try: **headrace demo** (one answer, start to stop), then **headrace serve** in one terminal and
**headrace chat** in another. Tab completion: **headrace --install-completion**.

Exit status: 0 done, 1 failed, 2 wrong usage, 3 server not reachable, 130 interrupted.""",
)
app.command("serve", rich_help_panel="Serve", no_args_is_help=False)(serve.serve)
app.command("gateway", rich_help_panel="Serve")(gateway.gateway)
app.command("demo", rich_help_panel="Serve")(demo.demo)
app.command("generate", rich_help_panel="Use a server")(generate.generate)
app.command("chat", rich_help_panel="Use a server")(chat.chat)
app.command("replay", rich_help_panel="Use a server")(replay.replay)
app.command("bench", rich_help_panel="Use a server")(bench.bench)
app.command("models", rich_help_panel="Models and machine")(models.models)
app.command("pull", rich_help_panel="Models and machine")(models.pull)
app.command("doctor", rich_help_panel="Models and machine")(doctor.doctor)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"headrace {version('headrace')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Only carries the options of `headrace` itself."""


def run() -> int:
    """Runs sys.argv; every foreseeable failure ends as one line on standard error and an exit status."""
    try:
        app()
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except KeyboardInterrupt:
        return output.INTERRUPTED
    except Exception as error:
        status = output.explain(error)
        if status is None:
            raise
        return status
    return output.OK
