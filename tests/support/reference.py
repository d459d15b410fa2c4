"""What `transformers` computes in float32 with its plain attention: the outside opinion on a model's numbers."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
import transformers


def load_reference(directory: Path) -> torch.nn.Module:
    """A fresh model, whose weights the caller may change."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


shared_reference = functools.cache(load_reference)


def reference_logits(model: torch.nn.Module, token_ids: list[int]) -> np.ndarray:
    """Logits after every token, float32 [tokens, vocabulary]."""
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].numpy()
