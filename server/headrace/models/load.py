"""Load a model: its weights for the engine process, everything but its weights for the front end.

`load_model` is called by the engine process for the torch back end (`packed.load_packed` for the native one),
`load_front` by the server's front end and the CLI.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.kernels.program import StepProgram
from headrace.kernels.quant import Weight
from headrace.models.checkpoint import Checkpoint, open_checkpoint
from headrace.models.config import ModelConfig
from headrace.models.errors import ModelFileError

if TYPE_CHECKING:
    from headrace.models.chat_template import ChatTemplate
    from headrace.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelInfo:
    """What a model is, for people and for `ModelService`.

    parameters: weights, the tied output head counted once. quantization: the type of most weights as the file names
    it ("Q4_1", "BF16"). file_bytes: size of its files. eos_token_ids are known to the front end alone: () elsewhere.
    """

    architecture: str
    parameters: int
    quantization: str
    context_length: int
    vocab_size: int
    chat_template: str
    eos_token_ids: tuple[int, ...]
    file_bytes: int


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """What the engine needs: the program and its weights, by the program's names."""

    config: ModelConfig
    info: ModelInfo
    program: StepProgram
    weights: dict[str, Weight]


@dataclass(frozen=True, eq=False)
class FrontModel:
    """What the front end needs: text in, text out."""

    config: ModelConfig
    info: ModelInfo
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None


def load_model(path: str | Path, on_progress: Callable[[float], None] | None = None) -> LoadedModel:
    """Load a GGUF file or a Hugging Face directory.

    on_progress is told the share of bytes done, 0..1, after every weight; the last call says 1. Raises ModelFileError
    and UnsupportedModelError, the latter before a weight is read.
    """
    checkpoint = open_checkpoint(Path(path))
    try:
        total = sum(checkpoint.tensors[spec.name].nbytes for spec in checkpoint.program.weights)
        done = 0
        weights: dict[str, Weight] = {}
        for spec in checkpoint.program.weights:
            weights[spec.name] = checkpoint.load(spec.name)
            done += checkpoint.tensors[spec.name].nbytes
            if on_progress is not None:
                on_progress(done / total)
        return LoadedModel(checkpoint.config, model_info(checkpoint, ()), checkpoint.program, weights)
    finally:
        checkpoint.close()


def load_front(path: str | Path) -> FrontModel:
    """Load tokenizer, chat template and facts of a model; reads no weights. Raises ModelError."""
    from headrace.models.chat_template import ChatTemplate

    checkpoint = open_checkpoint(Path(path))
    try:
        tokenizer = checkpoint.tokenizer()
        if tokenizer.vocab_size > checkpoint.config.vocab_size:
            raise ModelFileError(
                f"{Path(path).name}: {tokenizer.vocab_size} tokens, but {checkpoint.config.vocab_size} embeddings"
            )
        info = model_info(checkpoint, tokenizer.eos_ids)
        template = None
        if info.chat_template:
            bos = "" if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id)
            eos = tokenizer.token_text(tokenizer.eos_ids[0]) if tokenizer.eos_ids else ""
            template = ChatTemplate(info.chat_template, bos, eos)
        return FrontModel(checkpoint.config, info, tokenizer, template)
    finally:
        checkpoint.close()


def model_info(checkpoint: Checkpoint, eos_token_ids: tuple[int, ...]) -> ModelInfo:
    """The facts of an open model; reads no weight."""
    per_type: Counter[str] = Counter()
    for spec in checkpoint.program.weights:
        per_type[checkpoint.tensors[spec.name].type_name] += math.prod(spec.shape)
    return ModelInfo(
        architecture=checkpoint.config.architecture,
        parameters=per_type.total(),
        quantization=per_type.most_common(1)[0][0],
        context_length=checkpoint.config.context_length,
        vocab_size=checkpoint.config.vocab_size,
        chat_template=checkpoint.chat_template(),
        eos_token_ids=eos_token_ids,
        file_bytes=checkpoint.file_bytes,
    )
