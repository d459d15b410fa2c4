"""The triton back end behind the whole server: tests of the main suite that run a real model (see conftest.py), and
what can only be asked of a model here: stop strings in its own text, cancelling it, preempting it.

A GPU, or Triton's interpreter only: ttsem has no driver that the executor could ask.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from headrace.v1 import inference_pb2 as pb

from tests.gpu.e2e.conftest import ENGINE, SETTINGS

# Tests are collected where they are imported, with this folder's fixtures.
from tests.server.conftest import _check_clean
from tests.server.support import Bench, bench, drained, finish_of, ids_of, text_of, tokens_request, until
from tests.server.test_generate import (  # noqa: F401
    test_a_drawn_seed_is_told_and_repeats_the_answer,
    test_a_repeated_prompt_is_found_in_the_prefix_cache_of_its_own_salt_only,
    test_a_seed_of_any_64_bits_is_taken,
    test_complete_is_generate_without_the_stream,
    test_generations_of_one_request_differ_and_the_first_ones_do_not_depend_on_n,
    test_logprobs_come_with_as_many_alternatives_as_asked_for,
    test_min_tokens_holds_back_the_end,
    test_no_logprobs_unless_asked_for,
    test_sampling_parameters_reach_the_sampler,
    test_text_is_that_of_the_tokens,
    test_timing_adds_up_to_no_more_than_the_call_took,
)
from tests.server.test_health_and_models import (  # noqa: F401
    test_check_knows_the_server_its_services_and_its_model,
    test_list_has_all_names,
    test_models_are_described_as_their_files_say,
)
from tests.server.test_prompts import test_control_tokens_in_a_message_stay_text  # noqa: F401
from tests.server.test_session import (  # noqa: F401
    test_a_conversation_goes_on_from_the_very_tokens_the_engine_has_cached,
    test_failed_commands_are_events_and_the_stream_goes_on,
    test_malformed_bytes_end_the_session_with_its_status,
    test_ping_goes_through_the_engine,
)
from tests.server.test_text import test_score_gives_what_generate_said  # noqa: F401

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.mark.parametrize("include_stop", [False, True])
async def test_a_stop_string_ends_the_text_before_it_and_the_sequence(tiny: Bench, include_stop: bool) -> None:
    whole = text_of(await drained(tiny.stub.Generate(tokens_request([40], max_tokens=16))))
    begin = len(whole) // 2
    stop = whole[begin : begin + 2]
    at = whole.index(stop)
    request = tokens_request([40], max_tokens=16, stop=["\u2603", stop], include_stop=include_stop)
    responses = await drained(tiny.stub.Generate(request))
    finish = finish_of(responses)
    assert text_of(responses) == whole[: at + (2 if include_stop else 0)]
    assert (finish.reason, finish.stop_string) == (pb.FINISH_REASON_STOP, stop)


async def test_a_stop_token_is_sent_without_its_text(tiny: Bench) -> None:
    ids = ids_of(await drained(tiny.stub.Generate(tokens_request([40], max_tokens=8))))
    stop = ids[5]
    responses = await drained(tiny.stub.Generate(tokens_request([40], max_tokens=8, stop_token_ids=[stop])))
    assert ids_of(responses) == ids[: ids.index(stop) + 1]
    spoken = await tiny.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids[: ids.index(stop)]))
    assert text_of(responses) == spoken.text
    finish = finish_of(responses)
    assert (finish.reason, finish.stop_token_id) == (pb.FINISH_REASON_STOP, stop)


async def test_a_cancelled_call_frees_its_blocks_and_its_neighbour_goes_on(tiny: Bench) -> None:
    kept = tokens_request([7, 8, 9], max_tokens=10)
    want = ids_of(await drained(tiny.stub.Generate(kept)))
    call = tiny.stub.Generate(tokens_request([9] * 40, max_tokens=400, ignore_eos=True))
    await call.read()
    beside = asyncio.ensure_future(drained(tiny.stub.Generate(kept)))
    assert (await tiny.stats()).num_free_blocks < (await tiny.stats()).num_total_blocks
    call.cancel()
    assert ids_of(await beside) == want
    await until(lambda: tiny.running.admission.stats().num_live == 0)
    stats = await tiny.idle_stats()
    assert stats.num_free_blocks == stats.num_total_blocks


@pytest.mark.parametrize("swap_space", [0.0, 1.0])
async def test_preempted_streams_say_what_they_would_have_said_alone(
    tiny: Bench, tiny_llama_gguf: Path, swap_space: float
) -> None:
    """Two streams that need 4 and 3 blocks, in room for 5; the KV of one is computed again, or comes back from
    the host."""
    requests = [
        tokens_request([number] * length, max_tokens=most, ignore_eos=True, temperature=0.9, seed=number)
        for number, length, most in ((5, 18, 34), (6, 14, 24))
    ]
    alone = [ids_of(await drained(tiny.stub.Generate(request))) for request in requests]
    settings = {**SETTINGS, "enable_prefix_cache": False, "swap_space_gb": swap_space, "num_blocks": 6}
    async with bench(tiny_llama_gguf, ENGINE, **settings) as tight:
        together = await asyncio.gather(*(drained(tight.stub.Generate(request)) for request in requests))
        assert [ids_of(responses) for responses in together] == alone
        stats = await tight.idle_stats()
        assert stats.num_preemptions > 0
        assert stats.num_swapped_out == (stats.num_preemptions if swap_space else 0)
        assert stats.num_free_host_blocks == stats.num_host_blocks
        await _check_clean(tight)
