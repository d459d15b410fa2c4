"""The engine alone: the load of bench/serve.py without gRPC, to tell what the front end costs. Ends in one JSON line.

python bench/engine.py --concurrency 16 --requests 64
"""

from __future__ import annotations

from dataclasses import asdict, replace

import psutil
from _common import finish, make_parser, slo_of, threads_of, workload_of
from _engine_load import EngineLoad, build
from headrace.server.cli.bench import print_summary
from headrace.server.cli.load import summarise


def main() -> None:
    options = make_parser(__doc__).parse_args()
    workload, threads = workload_of(options), threads_of(options)
    built = build(options.model, threads)
    load = EngineLoad(built.engine)
    warm = replace(workload, num_requests=2, rate=None, seed=workload.seed + 1)
    load.run(warm, warm.plan(built.vocab_size))
    load.step_seconds, native_before = 0.0, load.native_seconds
    summary = summarise(load.run(workload, workload.plan(built.vocab_size)), slo_of(options))
    print(f"{built.name} on {built.backend}, {threads} threads, no gRPC")
    print_summary(summary)
    share = None
    if native_before is not None and load.native_seconds is not None:
        share = 1 - (load.native_seconds - native_before) / load.step_seconds
        print(f"scheduler and Python around the steps: {100 * share:.1f} % of step time")
    result = {
        "model": {"name": built.name, "backend": built.backend, "threads": threads},
        "workload": asdict(workload),
        "summary": summary.to_json(),
        "rss": psutil.Process().memory_info().rss,
        "share_outside_native": None if share is None else round(share, 4),
        "load_seconds": round(built.load_seconds, 2),
    }
    finish("engine", result, save=options.save)


if __name__ == "__main__":
    main()
