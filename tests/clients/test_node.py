"""The Node client: its own tests, and a stream that goes on when its server dies. Needs node and `make node`."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.clients.test_resume import WANTED, two_servers
from tests.support.live_server import LONG, PATIENCE, LiveServer

NODE = shutil.which("node")
FOLDER = Path(__file__).parents[2] / "clients" / "node"

if NODE is None:
    pytest.skip("NO NODE HERE: the Node client is not tested", allow_module_level=True)
if not (FOLDER / "node_modules").is_dir():
    pytest.skip("the Node client is not tested: run `make node` first", allow_module_level=True)


@contextmanager
def _generating(target: str, prompt: str, **sampling: object) -> Iterator[subprocess.Popen[str]]:
    """The example program, which writes a line of JSON per chunk."""
    options = (prompt, json.dumps({"temperature": 0, **sampling}), "--resume", "--json")
    command = [str(NODE), "examples/generate.js", target, *options]
    with subprocess.Popen(command, cwd=FOLDER, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_its_own_tests() -> None:
    done = subprocess.run([str(NODE), "--test", "test/"], cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_a_server_that_dies_is_not_seen(tiny_llama_gguf: Path) -> None:
    prompt = json.dumps({"tokenIds": [5]})
    with (
        two_servers(tiny_llama_gguf) as (servers, target),
        _generating(target, prompt, maxTokens=150) as process,
    ):
        assert process.stdout is not None
        chunks = [json.loads(process.stdout.readline()) for _ in range(5)]
        (busy,) = [server for server in servers if server.stats()["sequences"]]
        busy.kill()
        chunks += [json.loads(line) for line in process.stdout]
        assert [i for chunk in chunks for i in chunk["tokenIds"]] == WANTED
        assert chunks[-1]["finish"]["reason"] == "length"
        assert len({chunk["generationId"] for chunk in chunks}) == 2


def test_errors_have_their_reason(live_server: LiveServer) -> None:
    with _generating(live_server.target, json.dumps({"text": "x"}), topP=7) as process:
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert err.startswith("INVALID_ARGUMENT (INVALID_REQUEST)")


async def test_leaving_the_loop_ends_it_on_the_server(live_server: LiveServer) -> None:
    since = live_server.steps()
    script = (
        f'import {{ Client }} from "./src/index.js"; const client = new Client("{live_server.target}");'
        f"const sampling = {{ maxTokens: {LONG}, temperature: 0 }};"
        "for await (const chunk of client.generate({ tokenIds: [5] }, sampling, { resume: true })) break;"
        "await client.close();"
    )
    command = (str(NODE), "--input-type=module", "-e", script)
    process = await asyncio.create_subprocess_exec(*command, cwd=FOLDER)
    assert await asyncio.wait_for(process.wait(), PATIENCE) == 0
    await asyncio.to_thread(live_server.wait_freed, since)
