"""Loading: what reaches the engine and the front end; which files are refused, by name, before weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from headrace.kernels.quant import QuantTensor
from headrace.models.checkpoint import unpermute_rows
from headrace.models.errors import ModelError, ModelFileError, UnsupportedModelError
from headrace.models.gguf import GGUFFile
from headrace.models.load import load_front, load_model
from headrace.models.safetensors_dir import SafetensorsDir
from safetensors.numpy import load_file, save_file

from tests.conftest import TinyModels
from tests.support.tiny_models import CHAT_TEMPLATE, CONTEXT_LENGTH, VOCAB_SIZE, permute_rows, write_gguf


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads a weight fails."""

    def load(self: object, name: str) -> None:
        pytest.fail(f"{name} was read")

    monkeypatch.setattr(GGUFFile, "load", load)
    monkeypatch.setattr(SafetensorsDir, "load", load)


@pytest.fixture
def directory(tiny_models: TinyModels, tmp_path: Path) -> Path:
    """A copy of an untied model for a test to spoil."""
    return Path(shutil.copytree(tiny_models.directory("qwen3"), tmp_path / "model"))


def spoil_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def spoil_tensors(directory: Path, **changes: np.ndarray | None) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors |= {name: tensor for name, tensor in changes.items() if tensor is not None}
    kept = {name: tensor for name, tensor in tensors.items() if changes.get(name, tensor) is not None}
    save_file(kept, directory / "model.safetensors")


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_front_knows_the_model_without_its_weights(kind: str, tiny_models: TinyModels, no_weights: None) -> None:
    path = tiny_models.directory("llama") if kind == "directory" else tiny_models.gguf("llama", "Q8_0")
    front = load_front(path)
    info = front.info
    assert (info.architecture, info.context_length, info.vocab_size) == ("llama", CONTEXT_LENGTH, VOCAB_SIZE)
    assert info.quantization == ("F32" if kind == "directory" else "Q8_0")
    assert info.parameters == sum(
        t.size for t in load_file(tiny_models.directory("llama") / "model.safetensors").values()
    )
    assert info.chat_template == CHAT_TEMPLATE
    assert info.eos_token_ids[0] == 2
    weights = path / "model.safetensors" if kind == "directory" else path
    assert info.file_bytes == weights.stat().st_size
    assert front.chat_template is not None
    assert front.chat_template.render([{"role": "user", "content": "hi"}], True).endswith("<|im_start|>assistant\n")
    ids = front.tokenizer.encode("the wheel", add_bos=False, parse_special=False)
    assert front.tokenizer.decode(ids) == "the wheel"


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_progress_rises_to_one(kind: str, tiny_models: TinyModels) -> None:
    shares: list[float] = []
    path = tiny_models.directory("qwen2") if kind == "directory" else tiny_models.gguf("qwen2")
    model = load_model(path, shares.append)
    assert shares == sorted(shares)
    assert 0.0 < shares[0] < 0.5
    assert shares[-1] == 1.0
    assert set(model.weights) == {spec.name for spec in model.program.weights}


def test_mapped_weights_are_not_copied_and_quantised_ones_stay_quantised(tiny_models: TinyModels) -> None:
    dense = load_model(tiny_models.gguf("qwen3")).weights["blk.0.ffn_up.weight"]
    assert isinstance(dense, np.ndarray)
    assert not dense.flags.owndata
    assert not dense.flags.writeable
    weights = load_model(tiny_models.gguf("qwen3", "Q4_0")).weights
    assert isinstance(weights["blk.0.attn_q.weight"], QuantTensor)


@pytest.mark.parametrize("quantization", ["F32", "Q4_1", "Q8_0"])
def test_rows_of_q_and_k_are_put_back_in_halves(quantization: str, tiny_models: TinyModels) -> None:
    with GGUFFile.open(tiny_models.gguf("llama", quantization)) as file:
        stored = file.load("blk.1.attn_k.weight")
    ours = unpermute_rows(stored, num_heads=4)
    values, in_file = (w.dequantize() if isinstance(w, QuantTensor) else w for w in (ours, stored))
    assert (permute_rows(np.asarray(values), 4) == in_file).all()
    assert not (np.asarray(values) == in_file).all()


def test_norms_of_gemma_are_folded_once(tiny_models: TinyModels) -> None:
    name = "blk.0.attn_k_norm.weight"
    from_directory = load_model(tiny_models.directory("gemma3")).weights[name]
    from_gguf = load_model(tiny_models.gguf("gemma3")).weights[name]
    assert np.array_equal(np.asarray(from_directory), np.asarray(from_gguf))


def test_chat_template_of_its_own_file_comes_first(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ messages[0]['content'] }} é", encoding="utf-8")
    assert load_front(directory).info.chat_template.endswith("é")


def test_named_chat_templates(directory: Path) -> None:
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_front(directory).info.chat_template == "yes"
    del config["chat_template"]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_front(directory).chat_template is None


def test_unsupported_models_are_refused_before_a_weight_is_read(directory: Path, no_weights: None) -> None:
    spoil_config(directory, model_type="mixtral", architectures=["MixtralForCausalLM"])
    for load in (load_front, load_model):
        with pytest.raises(UnsupportedModelError, match="mixtral"):
            load(directory)


def test_unsupported_gguf_is_refused_before_a_weight_is_read(
    tiny_models: TinyModels, tmp_path: Path, no_weights: None
) -> None:
    data = tiny_models.gguf("qwen3").read_bytes()
    path = tmp_path / "other.gguf"
    path.write_bytes(data.replace(b"qwen3", b"qwen9"))
    for load in (load_front, load_model):
        with pytest.raises(UnsupportedModelError, match=r"other\.gguf: architecture 'qwen9'"):
            load(path)


def test_tensors_must_be_exactly_those_of_the_model(directory: Path, no_weights: None) -> None:
    norm = "model.layers.2.input_layernorm.weight"
    spoil_tensors(directory, **{norm: None})
    with pytest.raises(ModelFileError, match=rf"model: tensor {norm} is missing"):
        load_model(directory)
    spoil_tensors(directory, **{norm: np.zeros(95, np.float32)})
    with pytest.raises(ModelFileError, match=rf"{norm} has the shape \(95,\)"):
        load_model(directory)
    spoil_tensors(
        directory, **{norm: np.zeros(96, np.float32), "model.layers.2.self_attn.q_proj.bias": np.zeros(96, np.float32)}
    )
    with pytest.raises(UnsupportedModelError, match=r"self_attn\.q_proj\.bias"):
        load_model(directory)


def test_more_layers_than_tensors(directory: Path, no_weights: None) -> None:
    spoil_config(directory, num_hidden_layers=1024, layer_types=None)
    with pytest.raises(ModelFileError, match=r"model\.layers\.3\..* is missing"):
        load_model(directory)


def test_gguf_tensors_are_checked_too(tiny_models: TinyModels, tmp_path: Path) -> None:
    path = write_gguf(tiny_models.directory("llama3"), tmp_path / "hole.gguf", leave_out=("blk.1.ffn_down.weight",))
    with pytest.raises(ModelFileError, match=r"hole\.gguf: tensor blk\.1\.ffn_down\.weight is missing"):
        load_front(path)


def test_a_stored_copy_of_the_tied_head_and_old_rotary_buffers_are_ignored(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(tiny_models.directory("llama"), tmp_path / "model"))
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    head = np.zeros((VOCAB_SIZE, 256), np.float32)
    spoil_tensors(directory, **{"lm_head.weight": head, inv_freq: np.zeros(16, np.float32)})
    assert "output.weight" not in load_model(directory).weights


def test_more_tokens_than_embeddings(directory: Path) -> None:
    tokens = json.loads((directory / "tokenizer.json").read_text())
    token = {"content": "<extra>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens["added_tokens"].append({**token, "special": True, "id": VOCAB_SIZE})
    (directory / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(ModelFileError, match=f"{VOCAB_SIZE + 1} tokens"):
        load_front(directory)


@pytest.mark.parametrize("divisors", [np.ones(3, np.float32), np.zeros(8, np.float32), np.full(8, np.nan, np.float32)])
def test_rope_divisors_are_checked(
    divisors: np.ndarray, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support import tiny_models as writer

    monkeypatch.setattr(writer, "_llama3_factors", lambda config: divisors)
    path = write_gguf(tiny_models.directory("llama3"), tmp_path / "rope.gguf")
    with pytest.raises(ModelFileError, match=r"rope\.gguf: rope_freqs\.weight"):
        load_model(path)


@pytest.mark.parametrize("name", ["missing.gguf", "missing"])
def test_nothing_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^missing"):
        load_model(tmp_path / name)
