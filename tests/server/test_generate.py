"""Generate and Complete on a real model and on the counting engine: tokens, text, endings, logprobs, n, seeds."""

from __future__ import annotations

import time

import pytest
from headrace.v1 import inference_pb2 as pb

from tests.server import scripted_engine
from tests.server.support import (
    Bench,
    chat_prompt,
    drained,
    finish_of,
    ids_of,
    text_of,
    tokens_request,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_stream_has_every_token_once_and_says_how_it_ended(counting: Bench) -> None:
    responses = await drained(counting.stub.Generate(tokens_request([10, 11, 12], max_tokens=5)))
    assert ids_of(responses) == [13, 14, 15, 16, 17]
    finish = finish_of(responses)
    assert finish.reason == pb.FINISH_REASON_LENGTH
    assert not finish.HasField("stop_token_id")
    assert finish.stop_string == ""
    assert (finish.usage.prompt_tokens, finish.usage.generated_tokens) == (3, 5)


async def test_text_is_that_of_the_tokens(tiny: Bench) -> None:
    request = pb.GenerateRequest(prompt=pb.Prompt(text="The headrace"), sampling=pb.SamplingParams(seed=5))
    request.sampling.max_tokens = 40
    responses = await drained(tiny.stub.Generate(request))
    ids = ids_of(responses)
    decoded = await tiny.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids, skip_special_tokens=True))
    finish = finish_of(responses)
    assert text_of(responses) == decoded.text
    assert finish.usage.generated_tokens == len(ids)


async def test_complete_is_generate_without_the_stream(tiny: Bench) -> None:
    request = pb.GenerateRequest(prompt=chat_prompt("Who is the miller?"), sampling=pb.SamplingParams(seed=7, n=3))
    request.sampling.max_tokens = 12
    responses = await drained(tiny.stub.Generate(request))
    answer = await tiny.stub.Complete(pb.CompleteRequest(request=request))
    assert [c.index for c in answer.completions] == [0, 1, 2]
    for completion in answer.completions:
        assert list(completion.token_ids) == ids_of(responses, completion.index)
        assert completion.text == text_of(responses, completion.index)
        assert completion.finish.reason == finish_of(responses, completion.index).reason


async def test_generations_of_one_request_differ_and_the_first_ones_do_not_depend_on_n(tiny: Bench) -> None:
    request = tokens_request([5, 6, 7], temperature=1.5, max_tokens=12, seed=99, n=4)
    four = await drained(tiny.stub.Generate(request))
    request.sampling.n = 1
    one = await drained(tiny.stub.Generate(request))
    assert len({tuple(ids_of(four, index)) for index in range(4)}) == 4
    assert ids_of(one) == ids_of(four, 0)
    assert finish_of(four, 0).seed == 99


async def test_a_drawn_seed_is_told_and_repeats_the_answer(tiny: Bench) -> None:
    request = tokens_request([5, 6, 7], temperature=1.5, max_tokens=12)
    first = await drained(tiny.stub.Generate(request))
    other = await drained(tiny.stub.Generate(request))
    request.sampling.seed = finish_of(first).seed
    again = await drained(tiny.stub.Generate(request))
    assert ids_of(again) == ids_of(first)
    assert finish_of(other).seed != finish_of(first).seed


async def test_a_seed_of_any_64_bits_is_taken(tiny: Bench) -> None:
    for seed in (0, 2**63, 2**64 - 1):
        request = tokens_request([5, 6, 7], temperature=1.0, max_tokens=2, seed=seed, n=2)
        responses = await drained(tiny.stub.Generate(request))
        assert finish_of(responses, 0).seed == seed


async def test_a_stop_token_is_sent_without_its_text(counting: Bench) -> None:
    responses = await drained(counting.stub.Generate(tokens_request([40], max_tokens=50, stop_token_ids=[44])))
    assert ids_of(responses) == [41, 42, 43, 44]
    spoken = await counting.stub.Detokenize(pb.DetokenizeRequest(token_ids=[41, 42, 43]))
    finish = finish_of(responses)
    assert text_of(responses) == spoken.text
    assert (finish.reason, finish.stop_token_id) == (pb.FINISH_REASON_STOP, 44)
    assert finish.usage.generated_tokens == 4


async def test_the_models_end_token_stops_unless_told_to_go_on(counting: Bench) -> None:
    request = tokens_request([40, scripted_engine.STOP], max_tokens=3)
    responses = await drained(counting.stub.Generate(request))
    assert ids_of(responses) == [scripted_engine.EOS]
    assert finish_of(responses).reason == pb.FINISH_REASON_STOP
    request.sampling.ignore_eos = True
    responses = await drained(counting.stub.Generate(request))
    assert ids_of(responses) == [scripted_engine.EOS, 3, 4]
    assert finish_of(responses).reason == pb.FINISH_REASON_LENGTH


@pytest.mark.parametrize("include_stop", [False, True])
async def test_a_stop_string_ends_the_text_before_it_and_the_sequence(counting: Bench, include_stop: bool) -> None:
    text = (await counting.stub.Detokenize(pb.DetokenizeRequest(token_ids=range(41, 61)))).text
    stop = text[7:10]  # spans tokens: each of these is one character
    request = tokens_request([40], max_tokens=400, stop=["not in the text", stop], include_stop=include_stop)
    responses = await drained(counting.stub.Generate(request))
    finish = finish_of(responses)
    assert text_of(responses) == text[: 10 if include_stop else 7]
    assert (finish.reason, finish.stop_string) == (pb.FINISH_REASON_STOP, stop)
    assert not finish.HasField("stop_token_id")
    # The tokens are those up to the match, although the engine was some steps further.
    assert ids_of(responses) == list(range(41, 51))
    assert finish.usage.generated_tokens == 10


async def test_text_held_back_for_a_stop_string_is_sent_at_the_end(counting: Bench) -> None:
    text = (await counting.stub.Detokenize(pb.DetokenizeRequest(token_ids=range(41, 46)))).text
    request = tokens_request([40], max_tokens=5, stop=[text[-2:] + "never"])
    responses = await drained(counting.stub.Generate(request))
    assert text_of(responses) == text
    assert finish_of(responses).reason == pb.FINISH_REASON_LENGTH


async def test_logprobs_come_with_as_many_alternatives_as_asked_for(tiny: Bench) -> None:
    for logprobs in (0, 3, 20):
        responses = await drained(tiny.stub.Generate(tokens_request([5, 6, 7], max_tokens=4, logprobs=logprobs)))
        ids = ids_of(responses)
        entries = [entry for response in responses for entry in response.chunk.logprobs]
        assert [entry.token_id for entry in entries] == ids
        for entry in entries:
            assert entry.logprob <= 0
            assert len(entry.alternatives) == logprobs
            if logprobs:  # greedy: the chosen token is the most likely one
                assert entry.alternatives[0].token_id == entry.token_id
                assert entry.alternatives[0].logprob == entry.logprob
                values = [alternative.logprob for alternative in entry.alternatives]
                assert values == sorted(values, reverse=True)


async def test_no_logprobs_unless_asked_for(tiny: Bench) -> None:
    responses = await drained(tiny.stub.Generate(tokens_request([5, 6, 7], max_tokens=4)))
    assert not any(response.chunk.logprobs for response in responses)


async def test_default_max_tokens_is_256_or_what_is_left(counting: Bench) -> None:
    responses = await drained(counting.stub.Generate(tokens_request([10], max_tokens=0)))
    assert len(ids_of(responses)) == 256
    responses = await drained(counting.stub.Generate(tokens_request([10] * 500, max_tokens=0)))
    assert len(ids_of(responses)) == 12
    assert finish_of(responses).reason == pb.FINISH_REASON_LENGTH


async def test_a_repeated_prompt_is_found_in_the_prefix_cache_of_its_own_salt_only(tiny: Bench) -> None:
    ids = [3 + index % 200 for index in range(100)]

    async def cached(salt: str) -> int:
        request = tokens_request(ids, max_tokens=1)
        request.cache_salt = salt
        return finish_of(await drained(tiny.stub.Generate(request))).usage.cached_prompt_tokens

    assert await cached("mine") == 0
    assert await cached("mine") == 96  # whole blocks of 16, and never the last token
    assert await cached("yours") == 0


async def test_timing_adds_up_to_no_more_than_the_call_took(counting: Bench) -> None:
    begin = time.monotonic()
    finish = finish_of(await drained(counting.stub.Generate(tokens_request(max_tokens=20))))
    seconds = time.monotonic() - begin
    parts = (finish.timing.queue_seconds, finish.timing.prefill_seconds, finish.timing.decode_seconds)
    assert all(part >= 0 for part in parts)
    assert 0 < sum(parts) <= seconds


async def test_sampling_parameters_reach_the_sampler(tiny: Bench) -> None:
    """Each parameter in turn forces or forbids what the greedy answer has."""

    async def ids(**sampling: object) -> list[int]:
        return ids_of(await drained(tiny.stub.Generate(tokens_request([5, 6, 7], max_tokens=6, **sampling))))

    greedy = await ids()
    assert await ids(temperature=2.0, top_k=1, seed=1) == greedy
    assert await ids(temperature=2.0, top_p=1e-6, seed=1) == greedy
    assert await ids(temperature=2.0, min_p=1.0, seed=1) == greedy
    assert await ids(temperature=2.0, seed=1) != greedy
    assert await ids(logit_bias={77: 100.0}) == [77] * 6
    assert greedy[0] not in await ids(logit_bias={greedy[0]: -100.0})
    eight = {60 + index: 100.0 for index in range(8)}  # only these can be chosen
    plain = len(set(await ids(logit_bias=eight)))
    assert plain < 6
    for penalty in ("presence_penalty", "frequency_penalty"):
        assert len(set(await ids(logit_bias=eight, **{penalty: 2.0}))) == 6
        assert len(set(await ids(logit_bias=eight, **{penalty: -2.0}))) < plain
    assert len(set(await ids(logit_bias=eight, repetition_penalty=10.0))) == 6


async def test_min_tokens_holds_back_the_end(counting: Bench, tiny: Bench) -> None:
    bias = {2: 100.0, 30: 50.0}  # the end token if it may, else 30
    early = await drained(tiny.stub.Generate(tokens_request([5], max_tokens=6, logit_bias=bias)))
    late = await drained(tiny.stub.Generate(tokens_request([5], max_tokens=6, min_tokens=4, logit_bias=bias)))
    assert ids_of(early) == [2]
    assert ids_of(late) == [30, 30, 30, 30, 2]
