"""A server under load over gRPC, open or closed loop; its own unless --target names one. Ends in one JSON line.

python bench/serve.py --concurrency 16 --requests 64
python bench/serve.py --rate 1 --prompt-tokens lognormal:128,0.6,512 --slo-ttft-ms 2000 --slo-tpot-ms 500
"""

from __future__ import annotations

from _common import finish, make_parser, slo_of, threads_of, workload_of
from headrace.server.cli import bench


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--target", help="HOST:PORT of a server that runs already")
    options = parser.parse_args()
    arguments = ["--threads", str(threads_of(options)), *(["--model", options.model] if options.model else [])]
    result = bench.run(workload_of(options), slo_of(options), target=options.target, server_arguments=arguments)
    bench.print_result(result)
    finish("serve", result.to_json(), save=options.save)


if __name__ == "__main__":
    main()
