"""What the front end costs: the same load through gRPC and straight into an engine, by turns. Ends in one JSON line.

Rounds alternate, and so does who begins, so that a machine that gets slower meanwhile harms both alike; the ratio is
the median over the rounds. The goal is at least 0.95 at 16 streams.

    python bench/overhead.py --rounds 5 --requests 32
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, replace

from _common import finish, make_parser, threads_of, workload_of
from _engine_load import EngineLoad, build
from headrace.client import AsyncClient
from headrace.server import loop
from headrace.server.cli import load_grpc
from headrace.server.cli.load import PlannedRequest, Record, Slo, Workload, summarise
from headrace.server.cli.output import bytes_text

GOAL = 0.95


def main() -> None:
    parser = make_parser(__doc__)
    parser.set_defaults(requests=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    workload, threads = workload_of(options), threads_of(options)
    arguments = ["--threads", str(threads), *(["--model", options.model] if options.model else [])]
    built = build(options.model, threads)
    with load_grpc.own_server(arguments) as server:
        pairs = measure(EngineLoad(built.engine), server.target, workload, built.vocab_size, options.rounds)
        memory = [asdict(process) for process in server.memory()]
    ratios = [through_grpc / alone for alone, through_grpc in pairs]
    ratio = statistics.median(ratios)
    verdict = "reached" if ratio >= GOAL else "MISSED"
    print(f"{built.name} on {built.backend}, {threads} threads, {workload.concurrency} streams")
    print(f"through gRPC / engine alone: {ratio:.3f} (median of {len(ratios)}); the goal of {GOAL} is {verdict}")
    for process in memory:
        print(f"{process['role']}: RSS {bytes_text(process['rss'])}, PSS {bytes_text(process['pss'])}")
    print(f"start-up {server.start_seconds:.1f} s")
    result = {
        "model": {"name": built.name, "backend": built.backend, "threads": threads},
        "workload": asdict(workload),
        "rounds": [{"engine_tokens_per_second": a, "grpc_tokens_per_second": b} for a, b in pairs],
        "ratio": round(ratio, 4),
        "memory": memory,
        "start_seconds": round(server.start_seconds, 2),
    }
    finish("overhead", result, save=options.save)


def measure(
    engine: EngineLoad, target: str, workload: Workload, vocab_size: int, num_rounds: int
) -> list[tuple[float, float]]:
    """Generated tokens per second of each round: of the engine alone, and through gRPC. Round 0 warms up both."""
    pairs = []
    for number in range(num_rounds + 1):
        # Fresh prompts in every round: no prefix cache can help one of the two.
        this = replace(workload, seed=workload.seed + number)
        planned = this.plan(vocab_size)
        rates = {}
        for side in ("engine", "grpc") if number % 2 else ("grpc", "engine"):
            records = engine.run(this, planned) if side == "engine" else loop.run(_send(target, this, planned))
            summary = summarise(records, Slo())
            if summary.num_failed:
                raise SystemExit(f"{summary.num_failed} requests failed: {summary.failures}")
            rates[side] = summary.output_tokens_per_second
        if number:
            pairs.append((rates["engine"], rates["grpc"]))
            print(
                f"round {number}: engine {rates['engine']:.1f} tokens/s, through gRPC {rates['grpc']:.1f}", flush=True
            )
    return pairs


async def _send(target: str, workload: Workload, planned: list[PlannedRequest]) -> list[Record]:
    async with AsyncClient(target, retries=False) as client:
        return await load_grpc.send(client, workload, planned)


if __name__ == "__main__":
    main()
