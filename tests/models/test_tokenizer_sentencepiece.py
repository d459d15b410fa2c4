"""SentencePiece vocabularies from GGUF: equal to llama.cpp's tokens, but for control tokens in a user's text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from headrace.models.errors import TokenizerError, UnsupportedModelError
from headrace.models.tokenizer import Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "llama_cpp_sentencepiece.json").read_text())
UNKNOWN, START, END = 0, 1, 2


def metadata(**changes: Any) -> dict[str, Any]:
    """As the GGUF reader gives it: arrays of numbers are NumPy arrays. A change to None takes the key out."""
    vocabulary = RECORDED["vocabulary"]
    values = {
        "model": "llama",
        "tokens": vocabulary["tokens"],
        "scores": np.array(vocabulary["scores"], dtype=np.float32),
        "token_type": np.array(vocabulary["token_type"], dtype=np.int32),
        "bos_token_id": START,
        "eos_token_id": END,
        "unknown_token_id": UNKNOWN,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_gguf(metadata())


def encode(tokenizer: Tokenizer, text: str, *, parse_special: bool = False) -> list[int]:
    return tokenizer.encode(text, add_bos=False, parse_special=parse_special)


@pytest.mark.parametrize(
    "case", RECORDED["cases"], ids=lambda case: f"{case['add_space_prefix']}-{case['parse_special']}"
)
def test_tokens_equal_llama_cpp(case: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_gguf(metadata(add_space_prefix=case["add_space_prefix"]))
    spelled = [RECORDED["vocabulary"]["tokens"].index(part) for part in ("<", "s>")]
    for text, expected in zip(RECORDED["strings"], case["tokens"], strict=True):
        ids = encode(tokenizer, text, parse_special=case["parse_special"])
        if not case["parse_special"]:
            # llama.cpp merges "<" and "s>" into the start token, although it was told not to parse special tokens.
            expected = [part for index in expected for part in (spelled if index == START else [index])]
        assert ids == expected, text


@pytest.mark.parametrize("text", ["</s>", "<s>", "<unk>", "a</s>b", "</s></s>"])
def test_a_users_text_never_becomes_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = encode(tokenizer, text)
    assert not {UNKNOWN, START, END} & set(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.is_special(encode(tokenizer, "</s>", parse_special=True)[0])


def test_a_vocabulary_that_spells_its_end_token_as_a_character_cannot_be_used_to_end_a_turn() -> None:
    tokens = list(RECORDED["vocabulary"]["tokens"])
    tokens[END], tokens[-1] = "$", "</s>"
    hostile = Tokenizer.from_gguf(metadata(tokens=tokens))
    assert END not in encode(hostile, "costs $5")


def test_text_of_a_byte_token_stays_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(encode(tokenizer, "<0x0A>")) == "<0x0A>"


def test_characters_outside_the_vocabulary_become_bytes(tokenizer: Tokenizer) -> None:
    ids = encode(tokenizer, "é")
    assert [tokenizer.token_text(index) for index in ids] == ["▁", "<0xC3>", "<0xA9>"]
    assert [tokenizer.token_bytes(index) for index in ids] == [b" ", b"\xc3", b"\xa9"]
    assert tokenizer.decode(ids) == "é"


def test_without_byte_tokens_an_unknown_character_is_the_unknown_token() -> None:
    types = np.array(RECORDED["vocabulary"]["token_type"], dtype=np.int32)
    tokens = [text.replace("<0x", "<9x") for text in RECORDED["vocabulary"]["tokens"]]
    types[types == 6] = 5
    tokenizer = Tokenizer.from_gguf(metadata(tokens=tokens, token_type=types, add_space_prefix=False))
    assert encode(tokenizer, "é") == [UNKNOWN]
    assert tokenizer.decode([UNKNOWN], skip_special=True) == ""


def test_the_blank_before_a_text_is_added_and_taken_away(tokenizer: Tokenizer) -> None:
    ids = encode(tokenizer, "Alice")
    assert tokenizer.token_bytes(ids[0]).startswith(b" ")
    assert tokenizer.decode(ids) == "Alice"
    assert tokenizer.decode(encode(tokenizer, " Alice")) == " Alice"
    bare = Tokenizer.from_gguf(metadata(add_space_prefix=False))
    assert not bare.token_bytes(encode(bare, "Alice")[0]).startswith(b" ")
    assert bare.decode(encode(bare, " Alice")) == " Alice"


def test_defaults_where_the_file_is_silent() -> None:
    tokenizer = Tokenizer.from_gguf(metadata(bos_token_id=None, eos_token_id=None, unknown_token_id=None))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (START, (END,), True)
    assert tokenizer.has_space_prefix
    assert not Tokenizer.from_gguf(metadata(add_bos_token=False)).add_bos
    assert Tokenizer.from_gguf(metadata(add_eos_token=True)).add_eos


def test_gemmas_end_of_turn_ends_a_generation_whatever_its_type() -> None:
    tokens = list(RECORDED["vocabulary"]["tokens"])
    tokens[-1] = "<end_of_turn>"  # user-defined in the file
    tokenizer = Tokenizer.from_gguf(metadata(tokens=tokens))
    index = len(tokens) - 1
    assert tokenizer.eos_ids == (END, index)
    assert index not in encode(tokenizer, "<end_of_turn>")
    assert encode(tokenizer, "<end_of_turn>", parse_special=True) == [index]


def test_a_user_defined_token_is_one_token_in_any_text(tokenizer: Tokenizer) -> None:
    tool = RECORDED["vocabulary"]["tokens"].index("<tool>")
    assert tool in encode(tokenizer, "a<tool>b")
    assert not tokenizer.is_special(tool)
    assert tokenizer.decode(encode(tokenizer, "a<tool>b"), skip_special=True).startswith("a<tool>")


@given(st.text(alphabet=st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=150, deadline=None)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_a_vocabulary_without_order_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="scores"):
        Tokenizer.from_gguf(metadata(scores=np.zeros(len(RECORDED["vocabulary"]["tokens"]), dtype=np.float32)))
    with pytest.raises(TokenizerError, match="scores"):
        Tokenizer.from_gguf(metadata(scores=None))
