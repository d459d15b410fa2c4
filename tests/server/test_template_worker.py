"""The process that renders chat templates: one answer for each question, and killed when a template misbehaves."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable

import psutil
import pytest
import uvloop
from headrace.models.chat_template import MAX_TEMPLATE_BYTES, ChatTemplate, MessagesRefusedError
from headrace.models.errors import TemplateError
from headrace.server.template_worker import TemplateLimits, TemplateWorker

USER = {"role": "user", "content": "hi"}
ECHO = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
FOR_EVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
# Answers a message "slow" after a long while and any other at once.
SLOW = "{% if messages[0].content == 'slow' %}" + FOR_EVER + "{% endif %}{{ messages[0].content }}"
QUICK_TO_KILL = TemplateLimits(render_seconds=0.3, max_memory_bytes=64 << 20)

Start = Callable[..., TemplateWorker]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Makes workers that are closed at the end of the test."""
    workers: list[TemplateWorker] = []

    def start(source: str, limits: TemplateLimits | None = None) -> TemplateWorker:
        workers.append(TemplateWorker(source, "<s>", "</s>", limits))
        return workers[-1]

    yield start
    for worker in workers:
        await worker.close()


def message(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


async def test_a_render_is_what_the_template_renders_here(start: Start) -> None:
    worker = start(ECHO + "{{ bos_token }}{{ eos_token }}")
    messages = [{"role": "system", "content": "é😀\x00"}, USER]
    for add_generation_prompt in (True, False):
        expected = ChatTemplate(ECHO + "{{ bos_token }}{{ eos_token }}", "<s>", "</s>").render(
            messages, add_generation_prompt
        )
        assert await worker.render(messages, add_generation_prompt) == expected


async def test_one_process_serves_all_renders(start: Start) -> None:
    worker = start(ECHO)
    assert worker.process_id is None  # nothing runs before it is needed
    await worker.start()
    first = worker.process_id
    assert first is not None
    for number in range(20):
        assert await worker.render(message(str(number)), False) == f"[user] {number}\n"
    assert worker.process_id == first


async def test_concurrent_callers_get_their_own_answers(start: Start) -> None:
    worker = start(ECHO)
    texts = await asyncio.gather(*(worker.render(message(f"{n}" * (n * 50)), False) for n in range(100)))
    assert texts == [f"[user] {f'{n}' * (n * 50)}\n" for n in range(100)]


async def test_large_messages_and_answers_pass(start: Start) -> None:
    worker = start(ECHO)
    text = "é" * 1_500_000
    assert await worker.render(message(text), False) == f"[user] {text}\n"


HOSTILE = [
    "{{ 'x' * 10 ** 9 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000d}'.format(1) }}",
    "{{ 'x' | center(1000000000) }}",
    "{{ 'x' | indent(1000000000) }}{{ 'a\nb' | indent(1000000000) }}",
    "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "{{ (range(99999) | list) * 99999 }}",
    "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    FOR_EVER,
    "{{ 9 ** 9 ** 9 ** 9 }}{{ 10 ** (10 ** 10) }}",
    "{{ range(99999) | map('string') | join | wordcount }}{{ (range(99999) | list | tojson) * 300 }}",
    "{{ 'x'.ljust(10 ** 9) }}",
    "{{ range(10 ** 12) | list }}",
    "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{{ " + "(" * 30000 + "1" + ")" * 30000 + " }}",
    "{{ " + "-" * 60000 + "1 }}",
    "{{ 1" + " + 1" * 15000 + " }}",
    "{{ a" + ".a" * 30000 + " }}",
    "{% if true %}" * 4000 + "{% endif %}" * 1000,
    "{{ raise_exception('x' * 10 ** 9) }}",
    "{{ '\\ud800' }}",
]


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
async def test_a_hostile_template_is_an_error_in_bounded_time_and_the_next_render_is_answered(
    start: Start, source: str
) -> None:
    worker = start("{% if messages[0].content == 'hi' %}fine{% else %}" + source + "{% endif %}", QUICK_TO_KILL)
    hostile = start(source, QUICK_TO_KILL)
    with pytest.raises(TemplateError):
        await asyncio.wait_for(hostile.render([USER], True), 12)
    if "endif" in source or len(source) > 1000:
        return  # not valid Jinja, or too deep, so there is no good path through it
    for _ in range(2):
        with pytest.raises(TemplateError):
            await asyncio.wait_for(worker.render(message("evil"), True), 12)
        assert await worker.render(message("hi"), True) == "fine"


async def test_a_render_that_takes_too_long_is_killed_and_those_behind_it_are_answered(start: Start) -> None:
    worker = start(SLOW, QUICK_TO_KILL)
    await worker.start()
    first = worker.process_id
    assert first is not None
    slow = asyncio.create_task(worker.render(message("slow"), True))
    await asyncio.sleep(0)
    others = [asyncio.create_task(worker.render(message(str(number)), True)) for number in range(5)]
    with pytest.raises(TemplateError, match="too long"):
        await slow
    assert await asyncio.gather(*others) == ["0", "1", "2", "3", "4"]
    assert worker.process_id != first
    assert not psutil.pid_exists(first)


async def test_a_caller_that_goes_away_does_not_leave_its_answer_to_the_next(start: Start) -> None:
    worker = start(SLOW, TemplateLimits(render_seconds=30))
    await worker.start()
    slow = asyncio.create_task(worker.render(message("slow"), True))
    await asyncio.sleep(0.05)
    slow.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slow
    assert await worker.render(message("next"), True) == "next"


async def test_a_caller_that_goes_away_while_it_waits_disturbs_nobody(start: Start) -> None:
    worker = start(ECHO)
    await worker.start()
    first = worker.process_id
    tasks = [asyncio.create_task(worker.render(message(str(number)), False)) for number in range(10)]
    await asyncio.sleep(0)
    for task in tasks[5:]:
        task.cancel()
    assert await asyncio.gather(*tasks[:5]) == [f"[user] {number}\n" for number in range(5)]
    assert worker.process_id == first


async def test_a_child_that_dies_is_replaced(start: Start) -> None:
    worker = start(ECHO)
    await worker.start()
    assert worker.process_id is not None
    os.kill(worker.process_id, signal.SIGKILL)
    for _ in range(100):  # whether the death was noticed before or after the question was sent
        try:
            assert await worker.render([USER], False) == "[user] hi\n"
            break
        except TemplateError:
            await asyncio.sleep(0.01)
    else:
        pytest.fail("it was never replaced")


async def test_a_stopped_child_is_killed(start: Start) -> None:
    worker = start(ECHO, QUICK_TO_KILL)
    await worker.start()
    stopped = worker.process_id
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    with pytest.raises(TemplateError, match="too long"):
        await worker.render([USER], False)
    assert not psutil.pid_exists(stopped)
    assert await worker.render([USER], False) == "[user] hi\n"


async def test_refusals_keep_their_kind_and_reason(start: Start) -> None:
    worker = start("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(MessagesRefusedError, match="roles must alternate"):
        await worker.render([USER], True)


async def test_a_broken_template_fails_every_time_without_a_new_process(start: Start) -> None:
    worker = start("{% if %}")
    await worker.start()
    first = worker.process_id
    for _ in range(3):
        with pytest.raises(TemplateError, match="line 1"):
            await worker.render([USER], True)
    assert worker.process_id == first


def test_a_template_that_is_too_large_is_refused_at_once() -> None:
    with pytest.raises(TemplateError):
        TemplateWorker("x" * (MAX_TEMPLATE_BYTES + 1), "", "")


async def test_closing_ends_what_runs_and_refuses_what_comes(start: Start) -> None:
    worker = start(SLOW, TemplateLimits(render_seconds=30))
    await worker.start()
    child = worker.process_id
    assert child is not None
    running = asyncio.create_task(worker.render(message("slow"), True))
    waiting = asyncio.create_task(worker.render(message("fast"), True))
    await asyncio.sleep(0.05)
    await worker.close()
    for task in (running, waiting):
        with pytest.raises(TemplateError):
            await task
    with pytest.raises(TemplateError, match="closed"):
        await worker.render([USER], True)
    assert not psutil.pid_exists(child)
    await worker.close()


async def test_nothing_is_left_behind(start: Start) -> None:
    this = psutil.Process()
    warm = TemplateWorker(SLOW, "", "", QUICK_TO_KILL)
    await warm.start()
    await warm.close()
    descriptors, children = this.num_fds(), this.children()
    worker = start(SLOW, QUICK_TO_KILL)
    for _ in range(3):
        with pytest.raises(TemplateError):
            await worker.render(message("slow"), True)
        assert await worker.render(message("fast"), True) == "fast"
    await worker.close()
    await asyncio.sleep(0)
    assert this.num_fds() == descriptors
    assert this.children() == children


async def test_the_child_has_no_files_no_network_and_none_of_our_environment(start: Start) -> None:
    worker = start(ECHO)
    os.environ["HEADRACE_TEST_SECRET"] = "hunter2"
    try:
        await worker.start()
    finally:
        del os.environ["HEADRACE_TEST_SECRET"]
    child = psutil.Process(worker.process_id)
    assert "HEADRACE_TEST_SECRET" not in child.environ()
    assert child.num_fds() == 3
    assert child.open_files() == []
    assert child.rlimit(psutil.RLIMIT_NOFILE) == (0, 0)
    assert child.rlimit(psutil.RLIMIT_NPROC) == (0, 0)
    assert child.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
    assert child.rlimit(psutil.RLIMIT_AS)[0] < 1 << 30


ORPHAN = textwrap.dedent(
    """
    import asyncio, os, sys
    from headrace.server.template_worker import TemplateLimits, TemplateWorker

    async def main():
        worker = TemplateWorker(sys.argv[1], "", "", TemplateLimits(render_seconds=60))
        await worker.start()
        task = asyncio.create_task(worker.render([{"role": "user", "content": "slow"}], True))
        await asyncio.sleep(0.1)
        print(worker.process_id, flush=True)
        await task

    asyncio.run(main())
    """
)


def test_the_child_dies_with_its_parent_even_in_the_middle_of_a_render() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN, SLOW], stdout=subprocess.PIPE, env=environment, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_it_works_on_uvloop() -> None:
    async def scenario() -> list[str]:
        worker = TemplateWorker(SLOW, "", "", QUICK_TO_KILL)
        try:
            with pytest.raises(TemplateError, match="too long"):
                await worker.render(message("slow"), True)
            return list(await asyncio.gather(*(worker.render(message(str(n)), True) for n in range(20))))
        finally:
            await worker.close()

    def run(make: Callable[[], Awaitable[list[str]]]) -> list[str]:
        loop = uvloop.new_event_loop()
        try:
            return loop.run_until_complete(make())
        finally:
            loop.close()

    assert run(scenario) == [str(number) for number in range(20)]
