"""A sound GGUF file, as the `gguf` package writes it, is read back exactly; loading needs neither copies nor torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from headrace.kernels.quant import QuantTensor
from headrace.models.errors import ModelFileError
from headrace.models.gguf import GGUFFile, StringArray, TensorInfo
from headrace.models.gguf_blocks import BLOCK_TYPES

from tests.models import gguf_builder as build

# Types whose zero may come with the other sign than ggml's (see gguf_blocks.py).
SIGN_OF_ZERO_DIFFERS = {"Q4_0", "Q3_K"}
# Where a block keeps its fp16 scales, in bytes from its beginning (ggml-common.h).
SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def random_blocks(type_name: str, rows: int, blocks: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Random rows of a type, uint8 [rows, bytes]: every bit pattern but for scales that are not finite."""
    rng = np.random.default_rng(seed)
    _, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    data = rng.integers(0, 256, (rows * blocks, nbytes), dtype=np.uint8)
    for at in SCALES[type_name]:
        halves = rng.integers(0, 2**16, rows * blocks, dtype=np.uint16)
        halves[(halves & 0x7C00) == 0x7C00] ^= 0x4000  # infinities and NaN become small numbers
        special = (0, 0x8000, 1, 0xFBFF)  # 0, -0, the smallest subnormal, the lowest
        halves[:4] = special[: len(halves)]
        data[:, at : at + 2] = halves.astype("<u2").view(np.uint8).reshape(-1, 2)
    return data.reshape(rows, blocks * nbytes)


def write(path: Path, tensors: dict[str, tuple[npt.NDArray[np.generic], str]]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, (data, type_name) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def bits(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(values).view(np.uint32)


@pytest.mark.parametrize("type_name", sorted(BLOCK_TYPES))
def test_every_quantised_type_means_what_ggml_means(type_name: str, tmp_path: Path) -> None:
    rows, blocks = 7, 301  # over one chunk for every type, and no multiple of anything
    raw = random_blocks(type_name, rows, blocks)
    path = write(tmp_path / "model.gguf", {"w": (raw, type_name)})
    with GGUFFile.open(path) as file:
        weight = file.load("w")
    assert isinstance(weight, QuantTensor)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type_name])
    actual = weight.dequantize()
    assert weight.kind == ("int4" if type_name[:2] in ("Q2", "Q3", "Q4") else "int8")
    if type_name in SIGN_OF_ZERO_DIFFERS:
        expected, actual = expected + np.float32(0), actual + np.float32(0)  # -0 + 0 is +0
    np.testing.assert_array_equal(bits(actual), bits(expected))


def test_the_sizes_of_blocks_are_ggmls() -> None:
    for name, block_type in BLOCK_TYPES.items():
        sizes = (block_type.block_size, block_type.layout.itemsize)
        assert sizes == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16"])
def test_plain_types_are_widened_exactly(type_name: str, tmp_path: Path) -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    halves = patterns[(patterns & 0x7C00) != 0x7C00] if type_name == "F16" else patterns
    data: npt.NDArray[np.generic]
    if type_name == "F32":
        data = np.random.default_rng(1).standard_normal((64, 1000), dtype=np.float32)
    else:
        data = halves[:63488].reshape(64, 992)
        data = data.view(np.float16) if type_name == "F16" else data.view(np.uint8)
    path = write(tmp_path / "model.gguf", {"w": (data, type_name)})
    with GGUFFile.open(path) as file:
        weight = file.load("w")
    assert isinstance(weight, np.ndarray)
    assert weight.dtype == np.float32
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[type_name])
    np.testing.assert_array_equal(bits(weight), bits(expected))


def test_a_float32_tensor_is_a_read_only_view_that_outlives_the_file(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    with GGUFFile.open(write(tmp_path / "model.gguf", {"w": (values, "F32")})) as file:
        weight = file.load("w")
        again = file.load("w")
    assert isinstance(weight, np.ndarray)
    assert isinstance(again, np.ndarray)
    assert np.shares_memory(weight, again)
    assert not weight.flags.writeable
    np.testing.assert_array_equal(weight, values)


def test_shapes_are_out_by_in_and_a_quantised_vector_becomes_float32(tmp_path: Path) -> None:
    vector = random_blocks("Q8_0", 1, 2).reshape(-1)
    path = write(
        tmp_path / "model.gguf",
        {"m": (random_blocks("Q4_1", 3, 2), "Q4_1"), "v": (vector, "Q8_0"), "s": (np.ones(5, np.float32), "F32")},
    )
    with GGUFFile.open(path) as file:
        assert file.tensors["m"] == TensorInfo("m", (3, 64), "Q4_1", 3 * 2 * 20)
        assert list(file.tensors) == ["m", "v", "s"]
        matrix, loaded, ones = file.load("m"), file.load("v"), file.load("s")
    assert matrix.shape == (3, 64)
    assert isinstance(loaded, np.ndarray)
    np.testing.assert_array_equal(loaded, gguf.quants.dequantize(vector, gguf.GGMLQuantizationType.Q8_0))
    assert ones.shape == (5,)


def test_metadata_of_every_kind_comes_back(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    numbers = {
        "uint8": 200, "int8": -100, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1, "int32": -(2**31),
        "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.1, "float64": 0.1, "bool": True,
    }  # fmt: skip
    for kind, value in numbers.items():
        getattr(writer, f"add_{kind}")(f"test.{kind}", value)
    writer.add_string("test.string", "Größe 東京 🙂 \0")
    writer.add_token_list(["a", "", "東京", "🙂"])
    writer.add_token_scores([0.5, -1.5, 2.5, 0.0])
    writer.add_token_types([1, 2, 3, 6])
    writer.add_array("test.flags", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    metadata = GGUFFile.open(tmp_path / "model.gguf").metadata
    for kind, value in numbers.items():
        expected = float(np.float32(value)) if kind == "float32" else value
        assert metadata[f"test.{kind}"] == expected
        assert type(metadata[f"test.{kind}"]) is type(value)
    assert metadata["test.string"] == "Größe 東京 🙂 \0"
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, StringArray)
    assert list(tokens) == ["a", "", "東京", "🙂"]
    assert (len(tokens), tokens[-1], tokens[1:3]) == (4, "🙂", ["", "東京"])
    with pytest.raises(IndexError):
        tokens[4]
    np.testing.assert_array_equal(np.asarray(metadata["tokenizer.ggml.scores"]), [0.5, -1.5, 2.5, 0.0])
    np.testing.assert_array_equal(np.asarray(metadata["test.flags"]), [True, False])
    assert "test.nothing" not in metadata
    assert len(metadata) == len(list(metadata))


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_of_a_hand_made_file_open(version: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(replace(build.sound(), version=version).pack())
    with GGUFFile.open(path) as file:
        assert [file.load(name).shape for name in file.tensors] == [(4, 32), (32,), (2, 32), (2, 32)]
        assert file.metadata["some.signed"] == -5


@pytest.mark.parametrize("alignment", [8, 64, 65536])
def test_another_alignment_is_followed(alignment: int, tmp_path: Path) -> None:
    data = np.arange(8, dtype=np.float32).tobytes()
    file = build.File([build.key("general.alignment", build.U32, alignment)], alignment=alignment, data=data)
    path = tmp_path / "model.gguf"
    path.write_bytes(file.with_tensor(build.Tensor("w", (8,))).pack())
    loaded = GGUFFile.open(path).load("w")
    assert isinstance(loaded, np.ndarray)
    np.testing.assert_array_equal(loaded, np.arange(8))


def test_the_last_tensor_needs_no_padding_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(build.File(data=b"\0" * 4).with_tensor(build.Tensor("w", (1,))).pack())
    assert GGUFFile.open(path).load("w").shape == (1,)


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", {"w": (np.ones(4, np.float32), "F32")})
    with GGUFFile.open(path) as file, pytest.raises(ModelFileError, match=r"model\.gguf: has no tensor 'other'"):
        file.load("other")


@pytest.mark.parametrize("type_name", sorted(BLOCK_TYPES))
@pytest.mark.parametrize("pattern", [0x7C00, 0xFC00, 0x7E00, 0x7C01])
def test_a_scale_that_is_not_finite_is_refused(type_name: str, pattern: int, tmp_path: Path) -> None:
    raw = random_blocks(type_name, 2, 3)
    _, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    at = nbytes + SCALES[type_name][-1]  # the second block's last scale
    raw[1, at : at + 2] = np.frombuffer(pattern.to_bytes(2, "little"), np.uint8)
    with (
        GGUFFile.open(write(tmp_path / "model.gguf", {"w": (raw, type_name)})) as file,
        pytest.raises(ModelFileError, match=r"model\.gguf: tensor w holds a scale that is not finite"),
    ):
        file.load("w")


def test_smollm2_loads_whole_and_equals_gguf(smollm2_path: Path) -> None:
    reader = gguf.GGUFReader(smollm2_path)
    with GGUFFile.open(smollm2_path) as file:
        assert [tensor.name for tensor in reader.tensors] == list(file.tensors)
        assert len(list(file.metadata["tokenizer.ggml.tokens"])) == 49152  # type: ignore[arg-type]
        for tensor in reader.tensors[:24]:  # the embedding and the first layers
            weight = file.load(tensor.name)
            actual = weight.dequantize() if isinstance(weight, QuantTensor) else weight
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(actual, expected.reshape(actual.shape)), tensor.name
        for name in list(file.tensors)[24:]:
            assert file.load(name).shape == file.tensors[name].shape


def test_the_reader_imports_no_torch_and_no_gguf(smollm2_path: Path) -> None:
    code = (
        "import sys; from headrace.models.gguf import GGUFFile; file = GGUFFile.open(sys.argv[1]);"
        "file.load('blk.0.attn_q.weight'); print(sorted({'torch', 'gguf', 'transformers', 'grpc'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(smollm2_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout.strip() == "[]"
