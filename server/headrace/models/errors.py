"""The one exception tree of this floor: everything a model file, a template or a source can do wrong.

Raised all over `headrace.models`; the server and the CLI catch `ModelError` and show its text to the operator.
A message names the file by its base name and says what is wrong with it; it never holds a directory.
"""

from __future__ import annotations


class ModelError(Exception):
    """The model cannot be used. The text is for the operator, never for a client."""


class ModelFileError(ModelError):
    """A model file is corrupt, truncated, hostile, or of a kind that is not read."""


class UnsupportedModelError(ModelError):
    """The file is sound, but its architecture or one of its settings is not implemented."""


class TokenizerError(ModelError):
    """The vocabulary cannot be turned into a tokenizer."""


class TemplateError(ModelError):
    """The chat template cannot be compiled or rendered."""


class SourceError(ModelError):
    """A model cannot be found, downloaded or verified."""
