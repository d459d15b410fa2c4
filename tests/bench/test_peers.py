"""The peers bench where a mistake would tell a lie: directions, medians, the best peer, what goes into the docs."""

from __future__ import annotations

import asyncio
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from headrace.server.cli.load import PlannedRequest, Record

from bench.peers import curves, model_1b, openai_client, plots, process, quality, report, rows
from bench.peers.process import Driver, PeerError
from bench.peers.rows import OURS, Row, judge

HIGHER = Row("speed", "work", "speed", ("a", "b"), "tok/s", at_least=1.5, aim=2.0)
LOWER = Row("latency", "work", "latency", ("a", "b"), "ms", at_least=0.5, aim=0.25, lower_is_better=True)


def test_ratio_is_ours_over_theirs_against_the_hardest_peer_median_over_rounds() -> None:
    rounds = [{OURS: 10, "a": 5, "b": 2}, {OURS: 30, "a": 10, "b": 3}, {OURS: 16, "a": 10, "b": 4}]
    speed = judge(HIGHER, rounds, {})
    assert speed.peer == "a"  # the faster one
    assert speed.ratios == (2.0, 3.0, 1.6)
    assert (speed.ratio, speed.ours, speed.theirs, speed.verdict) == (2.0, 16, 10, "aim")
    assert speed.peers == {"a": 2.0, "b": 5.0}
    latency = judge(LOWER, rounds, {})
    assert (latency.peer, latency.ratio, latency.verdict) == ("b", 5.0, "MISSED")  # the quicker one


@pytest.mark.parametrize(
    ("row", "ratio", "verdict"),
    [(HIGHER, 1.49, "MISSED"), (HIGHER, 1.5, "reached"), (HIGHER, 2.0, "aim"),
     (LOWER, 0.51, "MISSED"), (LOWER, 0.5, "reached"), (LOWER, 0.25, "aim")],
)  # fmt: skip
def test_verdicts_follow_the_direction(row: Row, ratio: float, verdict: str) -> None:
    assert judge(row, [{OURS: ratio * 100, "a": 100}], {"b": "not here"}).verdict == verdict


def test_an_absent_peer_is_named_with_its_reason_and_never_hides_another() -> None:
    rounds = [{OURS: 10, "a": 5}, {OURS: 10, "a": 5, "b": 5}, {OURS: 10}]
    outcome = judge(HIGHER, rounds, {"b": "it crashed", "c": "no row asks for it"})
    assert outcome.ratio == 2.0
    assert outcome.absent == {"b": "in 2 of 3 rounds: it crashed"}
    alone = judge(HIGHER, [{OURS: 10, "a": 5}], {"b": "cannot be installed"})
    assert (alone.peer, alone.absent) == ("a", {"b": "cannot be installed"})
    nobody = judge(HIGHER, [{OURS: 10}], {"a": "no compiler"})
    assert (nobody.ratio, nobody.verdict) == (None, "absent")
    assert nobody.absent == {"a": "no compiler", "b": "it gave no figure in any round"}
    assert judge(HIGHER, [{"a": 1}], {OURS: "it did not start"}).absent == {OURS: "it did not start"}


def test_every_row_has_a_name_of_its_own_and_an_aim_beyond_its_target() -> None:
    assert len({row.name for row in rows.ROWS}) == len(rows.ROWS) == 17
    for row in rows.ROWS:
        assert row.aim < row.at_least if row.lower_is_better else row.aim > row.at_least


def _line(row: Row, samples: list[dict[str, float]], absent: dict[str, str] | None = None) -> dict[str, Any]:
    facts = {"isa": "avx2", "work": row.work}
    return report.to_json(judge(row, samples, absent or {}), facts)


def test_results_replace_those_of_the_same_row_and_instruction_set(tmp_path: Path) -> None:
    path = tmp_path / "results" / "peers.jsonl"
    first, other = _line(HIGHER, [{OURS: 1, "a": 1}]), _line(LOWER, [{OURS: 1, "a": 1}])
    report.write_lines(path, [first, other, {**first, "isa": "native"}])
    report.write_lines(path, [_line(HIGHER, [{OURS: 3, "a": 1}])])
    lines = report.read_lines(path, "avx2")
    assert [(line["name"], line["ratio"]) for line in lines] == [("speed", 3.0), ("latency", 1.0)]
    assert len(report.read_lines(path, "native")) == 1


def test_table_goes_between_its_markers_and_touches_nothing_else() -> None:
    lines = [
        _line(HIGHER, [{OURS: 1234.0, "a": 500.0}]),
        _line(LOWER, [], {"a": "no /opt/cache/peers/a", "b": "no b"}),
    ]
    table = report.table(lines)
    assert len({len(line) for line in table}) == 1
    assert "1,234 tok/s" in table[2]
    assert "**2.47**" in table[2]
    assert "≤ 0.5" in table[3]
    assert "absent" in table[3]
    assert report.reasons(lines)[1:] == ["ABSENT a: no a (latency)", "ABSENT b: no b (latency)"]
    page = "before\n<!-- begin t -->\nold\n<!-- end t -->\nafter <!-- begin u --><!-- end u -->\n"
    replaced = report.replace_between(page, "t", table)
    assert replaced.startswith("before\n<!-- begin t -->\n| work")
    assert replaced.endswith("|\n<!-- end t -->\nafter <!-- begin u --><!-- end u -->\n")
    assert report.replace_between(replaced, "t", table) == replaced
    for broken in ("no markers", page + page, "<!-- end t --><!-- begin t -->"):
        with pytest.raises(ValueError, match="must each stand"):
            report.replace_between(broken, "t", table)


def test_the_page_has_a_place_for_every_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "PERFORMANCE.md").read_text()
    for part in ("table", "curves", "1b", "quality"):
        for isa in ("avx2", "native"):
            report.replace_between(page, f"{part} {isa}", [])


def test_paths_of_this_machine_do_not_get_into_results() -> None:
    text = process.without_paths("FileNotFound: /home/me/.cache/peers/x.gguf (see '/tmp/log.txt'), 3/4 of a/b")
    assert text == "FileNotFound: x.gguf (see 'log.txt'), 3/4 of a/b"


def _rectangles(svg: str) -> list[tuple[float, float]]:
    tree = ElementTree.fromstring(svg)
    bars = [part for part in tree.iter("{http://www.w3.org/2000/svg}rect") if "x" in part.attrib]
    return [(float(bar.attrib["x"]), float(bar.attrib["width"])) for bar in bars]


def test_plot_points_right_where_we_are_better() -> None:
    better = [_line(HIGHER, [{OURS: 2, "a": 1}]), _line(LOWER, [{OURS: 1, "a": 2}])]
    worse = [_line(HIGHER, [{OURS: 1, "a": 2}]), _line(LOWER, [{OURS: 2, "a": 1}])]
    (right, width), also_right = _rectangles(plots.bars(better, "a < b & c"))
    assert (right, width) == also_right
    for left, other in _rectangles(plots.bars(worse, "t")):
        assert left + other == pytest.approx(right)
        assert other == pytest.approx(width)
    assert _rectangles(plots.bars([_line(HIGHER, [])], "t")) == []  # absent: a word, no bar


def test_curves_tell_of_cliffs() -> None:
    points = [
        {"x": x, "ours": rate, "threads_used": 2} for x, rate in ((1, 10), (2, 20), (4, 19), (8, 18.9), (16, None))
    ]
    assert curves.cliffs(points) == ["Cliff at 4 streams on 2 threads: 19 tokens/s after 20."]
    assert curves.cliffs(points[:2])[0].startswith("No cliff")
    ElementTree.fromstring(plots.curve({"ours": [(1, 10), (256, 900)], "theirs": []}, "t", "x", "y"))
    ElementTree.fromstring(plots.curve({"ours": []}, "t", "x", "y"))


def test_divergence_and_loss_of_hand_made_distributions() -> None:
    reference = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    other = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32)) + 3  # a constant changes nothing
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert quality.mean_divergence(reference, other) == pytest.approx(expected / 2, rel=1e-5)
    assert quality.mean_divergence(reference, reference) == 0
    assert quality.mean_loss(reference, [0, 1]) == pytest.approx(np.log(2), rel=1e-6)


@pytest.mark.parametrize(("kind", "blocks"), [("Q4_K", model_1b.q4_k_blocks), ("Q6_K", model_1b.q6_k_blocks)])
def test_random_blocks_are_weights_of_an_ordinary_size(kind: str, blocks: Callable[..., np.ndarray]) -> None:
    import gguf

    drawn = blocks(np.random.default_rng(0), 400)
    values = gguf.dequantize(drawn, gguf.GGMLQuantizationType[kind])
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 0.003
    assert 0.01 < values.std() < 0.05


def _serve_once(answer: bytes, body_seen: list[bytes]) -> Callable[..., Awaitable[None]]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(next(line for line in head.split(b"\r\n") if line.startswith(b"Content-Length")).split(b":")[1])
        body_seen.append(await reader.readexactly(length))
        for start in range(0, len(answer), 7):  # cuts lines, chunks and characters anywhere
            writer.write(answer[start : start + 7])
            await writer.drain()
        writer.close()

    return handle


def _events(num_events: int, completion_tokens: int) -> bytes:
    events = [{"choices": [{"text": "ü" if i else ""}]} for i in range(num_events)]
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": completion_tokens}}
    return b"".join(b"data: %s\n\n" % json.dumps(event, ensure_ascii=False).encode() for event in [*events, usage])


def _chunked(body: bytes) -> bytes:
    parts = [body[start : start + 11] for start in range(0, len(body), 11)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks


def _ask(answer: bytes) -> tuple[Record, dict[str, Any]]:
    async def run() -> tuple[Record, dict[str, Any]]:
        seen: list[bytes] = []
        server = await asyncio.start_server(_serve_once(answer, seen), "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            planned = [PlannedRequest(None, (5, 6, 7), 4)]
            (record,) = await openai_client.send(port, "m", planned, 1, {"cache_prompt": False})
        return record, json.loads(seen[0])

    return asyncio.run(run())


@pytest.mark.parametrize(("num_events", "counts"), [(4, [1, 1, 1, 1]), (2, [1, 3]), (5, [1, 1, 1, 1])])
def test_openai_client_counts_tokens_by_usage_whatever_the_events(num_events: int, counts: list[int]) -> None:
    record, sent = _ask(_chunked(_events(num_events, 4) + b"data: [DONE]\n\n"))
    assert record.error == ""
    assert record.counts == counts
    assert (sent["prompt"], sent["max_tokens"], sent["ignore_eos"], sent["cache_prompt"]) == ([5, 6, 7], 4, True, False)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (_chunked(_events(3, 3)), "3 prompt and 3 new tokens"),  # stopped early: its rate would be a lie
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\nloading", "503"),
        (_chunked(b'data: {"error": {"message": "too long"}}\n\n'), "too long"),
        (_chunked(_events(4, 4))[:-40], "connection ended|bytes read"),
        (b"", ""),
    ],
)
def test_openai_client_reports_what_went_wrong(answer: bytes, says: str) -> None:
    record, _ = _ask(answer)
    assert record.error
    assert any(part in record.error for part in says.split("|"))


_DRIVER = """
import sys
sys.path.insert(0, {folder!r})
from protocol import serve

def hello():
    print("a library that talks")
    if len(sys.argv) > 1:
        raise RuntimeError("no such model /srv/models/m.gguf")
    return {{"versions": {{"x": "1"}}}}

def double(n):
    return {{"n": 2 * n}}

serve(hello, {{"double": double}})
"""


@pytest.fixture
def driver_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path))
    script = tmp_path / "drive_double.py"
    folder = Path(process.__file__).with_name("drivers")
    script.write_text(_DRIVER.format(folder=str(folder)))
    return script


def test_a_driver_is_held_between_its_calls_and_survives_an_error(driver_script: Path) -> None:
    driver = Driver("double", [sys.executable, driver_script], [0], {}, wait=30)
    try:
        assert driver.facts == {"versions": {"x": "1"}}
        assert _state(driver) == "T"  # stopped: it cannot disturb another's measurement
        assert driver.call("double", n=21) == {"n": 42}
        with pytest.raises(PeerError, match="TypeError"):
            driver.call("double", m=1)
        assert driver.call("double", n=1) == {"n": 2}
        assert _state(driver) == "T"
    finally:
        driver.close()
    assert driver.process.poll() is not None


def test_a_driver_that_cannot_load_says_why(driver_script: Path) -> None:
    with pytest.raises(PeerError, match=r"RuntimeError: no such model m\.gguf"):
        Driver("double", [sys.executable, driver_script, "broken"], [0], {}, wait=30)


def _state(driver: Driver) -> str:
    """The letter of /proc/PID/stat, once the signal has arrived."""
    for _ in range(1000):
        state = Path(f"/proc/{driver.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state == "T":
            break
    return state
