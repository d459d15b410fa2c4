"""Options that several commands have, named once: where the server is, and how tokens are chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from headrace.client import Sampling

DEFAULT_TARGET = "127.0.0.1:50051"
_SAMPLING = "Sampling (what is not given takes the server's default)"

Target = Annotated[
    str, typer.Option("--target", "-t", envvar="HEADRACE_TARGET", help="The server: HOST:PORT.", show_default=True)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
ServedModel = Annotated[
    str, typer.Option("--model", "-m", help="Name of the model on the server; needed only where it has several.")
]
Timeout = Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds until the call is given up.")]
System = Annotated[str, typer.Option("--system", "-s", help="Instructions that come before the conversation.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", "-n", min=1, help="Most tokens to generate.", rich_help_panel=_SAMPLING)
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="0 always takes the likeliest token.", rich_help_panel=_SAMPLING)
]
TopK = Annotated[int | None, typer.Option("--top-k", help="Keep the k likeliest.", rich_help_panel=_SAMPLING)]
TopP = Annotated[
    float | None, typer.Option("--top-p", help="Keep the likeliest that make up p.", rich_help_panel=_SAMPLING)
]
MinP = Annotated[
    float | None, typer.Option("--min-p", help="Keep what is p times the likeliest.", rich_help_panel=_SAMPLING)
]
RepetitionPenalty = Annotated[
    float | None, typer.Option("--repetition-penalty", help="1 changes nothing.", rich_help_panel=_SAMPLING)
]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, help="The same seed gives the same answer.", rich_help_panel=_SAMPLING)
]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="End before this text. May be repeated.", rich_help_panel=_SAMPLING)
]


def make_sampling(**given: object) -> Sampling:
    """Keyword arguments of a generating call: what was given on the command line, nothing else."""
    return {name: value for name, value in given.items() if value not in (None, [])}  # type: ignore[return-value]
