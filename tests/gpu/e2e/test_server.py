"""The server tests of the main suite that run a real model, on the triton back end (see conftest.py).

A GPU, or Triton's interpreter only: ttsem has no driver that the executor could ask.
"""

from __future__ import annotations

import pytest

# Tests are collected where they are imported, with this folder's fixtures.
from tests.server.test_generate import (  # noqa: F401
    test_a_drawn_seed_is_told_and_repeats_the_answer,
    test_a_repeated_prompt_is_found_in_the_prefix_cache_of_its_own_salt_only,
    test_a_seed_of_any_64_bits_is_taken,
    test_complete_is_generate_without_the_stream,
    test_generations_of_one_request_differ_and_the_first_ones_do_not_depend_on_n,
    test_logprobs_come_with_as_many_alternatives_as_asked_for,
    test_no_logprobs_unless_asked_for,
    test_sampling_parameters_reach_the_sampler,
    test_text_is_that_of_the_tokens,
)
from tests.server.test_health_and_models import test_models_are_described_as_their_files_say  # noqa: F401
from tests.server.test_prompts import test_control_tokens_in_a_message_stay_text  # noqa: F401
from tests.server.test_session import (  # noqa: F401
    test_a_conversation_goes_on_from_the_very_tokens_the_engine_has_cached,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")
