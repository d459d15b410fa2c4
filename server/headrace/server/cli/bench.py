"""`headrace bench`: load over gRPC on a running server, or on one that it starts for itself."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from headrace.server import loop
from headrace.server.cli import options, output

if TYPE_CHECKING:
    from headrace.server.cli.load import Percentiles, Slo, Summary, Workload

_LENGTHS = "Tokens: 128, uniform:16,256 or lognormal:128,0.5[,1024] (median, sigma[, most])."
_WARM_UP = 2  # requests that are sent before the clock starts: first use of code paths and of memory


def bench(
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Server to load, HOST:PORT. Default: starts its own.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model of its own server.")] = None,
    requests: Annotated[int, typer.Option("--requests", "-r", min=1, help="Requests in all.")] = 64,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", min=1, help="Streams kept busy (closed loop).")
    ] = 16,
    rate: Annotated[
        float | None, typer.Option("--rate", min=0.001, help="Requests per second, come what may (open loop).")
    ] = None,
    arrival: Annotated[
        Literal["poisson", "constant"], typer.Option("--arrival", help="Spacing of requests in an open loop.")
    ] = "poisson",
    prompt: Annotated[str, typer.Option("--prompt-tokens", help=_LENGTHS)] = "64",
    output_tokens: Annotated[str, typer.Option("--output-tokens", help=_LENGTHS)] = "32",
    slo_ttft_ms: Annotated[float | None, typer.Option(help="Goodput counts requests with a TTFT below this.")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(help="Goodput counts requests with a TPOT below this.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of prompts, lengths and arrivals.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Measure a server: TTFT, ITL, TPOT, throughput and goodput, with fresh random prompts.

    - **headrace bench** (16 streams on a server of its own)

    - **headrace bench --target 127.0.0.1:50051 --rate 2 --slo-ttft-ms 500** (open loop, goodput)

    - **headrace bench --prompt-tokens lognormal:128,0.6,512 --output-tokens uniform:16,64**
    """
    from headrace.server.cli.load import Slo, Workload

    workload = Workload(
        num_requests=requests,
        concurrency=concurrency,
        rate=rate,
        arrival=arrival,
        prompt=_parse(prompt, "--prompt-tokens"),
        output=_parse(output_tokens, "--output-tokens"),
        seed=seed,
    )
    arguments = [] if model is None else ["--model", model]
    result = run(workload, Slo(slo_ttft_ms, slo_tpot_ms), target=target, server_arguments=arguments)
    if as_json:
        output.print_json(result.to_json())
    else:
        print_result(result)
    if result.summary.num_failed == result.summary.num_requests:
        raise output.CommandError("every request failed")


@dataclass(frozen=True)
class BenchResult:
    """A run and what it ran on. `memory` and `start_seconds` are known of a server that the bench started."""

    workload: Workload
    summary: Summary
    model: dict[str, Any]
    memory: list[dict[str, Any]]
    start_seconds: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "summary": self.summary.to_json()}


def run(workload: Workload, slo: Slo, *, target: str | None, server_arguments: list[str]) -> BenchResult:
    """One run over gRPC. Raises HeadraceError or CommandError when there is no server to load."""
    from headrace.server.cli import load_grpc

    with ExitStack() as stack:
        own = None if target is not None else stack.enter_context(load_grpc.own_server(server_arguments))
        address = own.target if own is not None else str(target)
        model, summary = loop.run(_measure(address, workload, slo))
        return BenchResult(
            workload=workload,
            summary=summary,
            model=model,
            memory=[asdict(process) for process in own.memory()] if own is not None else [],
            start_seconds=round(own.start_seconds, 2) if own is not None else None,
        )


async def _measure(address: str, workload: Workload, slo: Slo) -> tuple[dict[str, Any], Summary]:
    from dataclasses import replace

    from headrace.client import AsyncClient
    from headrace.server.cli import load_grpc
    from headrace.server.cli.load import summarise

    # Refusals are part of what is measured, so nothing is tried again behind our back.
    async with AsyncClient(address, retries=False) as client:
        model = await client.get_model(timeout=10.0)
        warm = replace(workload, num_requests=_WARM_UP, rate=None, seed=workload.seed + 1)
        await load_grpc.send(client, warm, warm.plan(model.vocab_size))
        records = await load_grpc.send(client, workload, workload.plan(model.vocab_size))
    facts = asdict(model)
    del facts["chat_template"]
    return facts, summarise(records, slo)


def print_result(result: BenchResult) -> None:
    """The run for people."""
    console = output.console()
    console.print(f"[bold]{result.model['name']}[/] on {result.model['backend']}: {_describe(result.workload)}")
    print_summary(result.summary)
    for process in result.memory:
        console.print(
            f"{process['role']}: RSS {output.bytes_text(process['rss'])}, PSS {output.bytes_text(process['pss'])}"
        )
    if result.start_seconds is not None:
        console.print(f"start-up {result.start_seconds:.1f} s")


def print_summary(summary: Summary) -> None:
    """Latencies, rates and failures for people."""
    from rich.table import Table

    console = output.console()
    table = Table("ms", "mean", "p50", "p90", "p99", "max", box=None, pad_edge=False, header_style="bold")
    for name, values in (
        ("TTFT", summary.ttft_ms),
        ("ITL", summary.itl_ms),
        ("TPOT", summary.tpot_ms),
        ("end to end", summary.e2e_ms),
    ):
        if values is not None:
            table.add_row(name, *_cells(values))
    console.print(table)
    console.print(
        f"{summary.output_tokens_per_second:.1f} tokens/s generated, "
        f"{summary.total_tokens_per_second:.1f} with prompts, {summary.requests_per_second:.2f} requests/s "
        f"over {summary.seconds:.1f} s"
    )
    if summary.goodput_per_second is not None:
        console.print(f"goodput {summary.goodput_per_second:.2f} requests/s within the SLO")
    if summary.num_failed:
        reasons = ", ".join(f"{count} {reason}" for reason, count in summary.failures.items())
        console.print(f"[red]{summary.num_failed} of {summary.num_requests} failed[/]: {reasons}")


def _describe(workload: Workload) -> str:
    if workload.rate is not None:
        return f"{workload.num_requests} requests at {workload.rate:g}/s ({workload.arrival})"
    return f"{workload.num_requests} requests on {workload.concurrency} streams"


def _cells(values: Percentiles) -> list[str]:
    return [f"{value:.1f}" for value in (values.mean, values.p50, values.p90, values.p99, values.max)]


def _parse(text: str, option: str) -> Any:
    from headrace.server.cli.load import Lengths

    try:
        return Lengths.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
