"""Text that arrives token by token is valid at every moment and complete in the end."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from headrace.models.detokenizer import Detokenizer
from headrace.models.errors import TokenizerError
from headrace.models.gguf import GGUFFile
from headrace.models.tokenizer import Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

BYTES = [f"<0x{value:02X}>" for value in range(256)]
PIECES = ["<unk>", "<s>", "</s>", *BYTES, "▁", "▁the", "e", "é", "😀", "▁▁"]


def metadata(**changes: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary in which every byte is a token, so that any byte sequence can be streamed."""
    values = {
        "model": "llama",
        "tokens": PIECES,
        "scores": [-float(index) for index in range(len(PIECES))],
        "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * 6, dtype=np.int32),
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    return Tokenizer.from_gguf(metadata())


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    with GGUFFile.open(smollm2_path) as file:
        return Tokenizer.from_gguf(file.metadata)


def byte_ids(data: bytes) -> list[int]:
    return [3 + value for value in data]


def pushes(detokenizer: Detokenizer, ids: list[int], sizes: list[int]) -> list[str]:
    """Texts of pushes of the given sizes (again from the start when they run out), then of the flush."""
    texts, position, turn = [], 0, 0
    while position < len(ids):
        size = sizes[turn % len(sizes)]
        texts.append(detokenizer.push(ids[position : position + size]))
        position, turn = position + size, turn + 1
    return [*texts, detokenizer.flush()]


def test_an_incomplete_character_is_held_back(byte_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_tokenizer)
    assert [detokenizer.push([index]) for index in byte_ids("a😀é".encode())] == ["a", "", "", "", "😀", "", "é"]
    assert detokenizer.flush() == ""


def test_what_is_incomplete_at_the_end_is_one_replacement_character(byte_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_tokenizer)
    assert detokenizer.push(byte_ids("😀".encode()[:3])) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


@given(
    st.one_of(st.binary(max_size=40), st.text(max_size=20).map(str.encode)),
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
)
@settings(max_examples=400, deadline=None)
def test_any_bytes_in_any_cut_are_what_decoding_all_at_once_gives(
    byte_tokenizer: Tokenizer, data: bytes, sizes: list[int]
) -> None:
    texts = pushes(Detokenizer(byte_tokenizer), byte_ids(data), sizes)
    assert "".join(texts) == data.decode(errors="replace")
    for text in texts:
        text.encode()  # no half of a surrogate pair, ever


@given(
    st.lists(st.integers(0, len(PIECES) - 1), max_size=30),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_a_stream_of_its_own_is_the_tokenizers_decode(
    byte_tokenizer: Tokenizer, ids: list[int], sizes: list[int], skip_special: bool
) -> None:
    detokenizer = Detokenizer(byte_tokenizer, skip_special, at_start=True)
    assert "".join(pushes(detokenizer, ids, sizes)) == byte_tokenizer.decode(ids, skip_special=skip_special)


def test_a_generation_keeps_its_first_blank(byte_tokenizer: Tokenizer) -> None:
    the = PIECES.index("▁the")
    assert Detokenizer(byte_tokenizer).push([the, the]) == " the the"
    assert Detokenizer(byte_tokenizer, at_start=True).push([the, the]) == "the the"
    assert Detokenizer(byte_tokenizer, at_start=True).push([1, the, the]) == "the the"


def test_special_tokens_are_dropped_unless_wanted(byte_tokenizer: Tokenizer) -> None:
    ids = [1, PIECES.index("e"), 2, 0]
    assert Detokenizer(byte_tokenizer).push(ids) == "e"
    assert Detokenizer(byte_tokenizer, skip_special=False).push(ids) == "<s>e</s><unk>"


def test_a_special_token_inside_a_character_does_not_break_it(byte_tokenizer: Tokenizer) -> None:
    first, second = byte_ids("é".encode())
    detokenizer = Detokenizer(byte_tokenizer)
    assert detokenizer.push([first, 2, second]) == "é"


def test_smollm2_equals_the_tokenizers_librarys_decode(smollm2: Tokenizer) -> None:
    texts = [smollm2.token_text(index) for index in range(smollm2.vocab_size)]
    reference = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={text: index for index, text in enumerate(texts)}, merges=[])
    )
    reference.decoder = tokenizers.decoders.ByteLevel()
    reference.add_special_tokens([text for index, text in enumerate(texts) if smollm2.is_special(index)])
    rng = random.Random(5)
    for _ in range(200):
        ids = [rng.randrange(smollm2.vocab_size) for _ in range(rng.randint(1, 20))]
        ids += [rng.randrange(20) for _ in range(rng.randint(0, 2))]
        for skip_special in (True, False):
            text = "".join(pushes(Detokenizer(smollm2, skip_special), ids, [rng.randint(1, 3)]))
            assert text == reference.decode(ids, skip_special_tokens=skip_special)


def test_recorded_strings_come_back_through_the_stream(smollm2: Tokenizer) -> None:
    data = json.loads((Path(__file__).parents[1] / "data" / "llama_cpp_tokens.json").read_text())
    for text, ids in data["cases"]:
        streamed = "".join(pushes(Detokenizer(smollm2), ids, [1]))
        assert streamed == b"".join(smollm2.token_bytes(index) for index in ids).decode(errors="replace")
        assert streamed == text or len(streamed) < len(text)  # some characters the vocabulary cannot spell


def test_padding_rows_say_nothing_and_negative_ids_are_refused(byte_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_tokenizer)
    assert detokenizer.push([byte_tokenizer.vocab_size + 5]) == ""
    with pytest.raises(TokenizerError):
        detokenizer.push([-1])
