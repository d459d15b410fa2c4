"""How a text is cut into words before byte-level BPE, by the name a GGUF file gives in `tokenizer.ggml.pre`.

Called by `tokenizer_gguf`. Words cut otherwise than in training give other tokens, so an unknown name is refused.
The names and their grouping are those of llama.cpp, which writes them when it converts a model; the patterns are those
of the models' own tokenizer.json. Patterns are tried one after the other, each on the pieces the former left.
"""

from dataclasses import dataclass

from headrace.models.errors import UnsupportedModelError
from tokenizers import Regex, pre_tokenizers

# openai/gpt-2, encoder.py
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES_AND_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _cl100k(digits: str) -> str:
    """The pattern of tiktoken's cl100k_base and its descendants; they differ in how many digits stay together."""
    return (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES_AND_BLANKS}"
    )


def _o200k(digits: str, contraction: str) -> str:
    """The pattern of tiktoken's o200k_base and of Mistral's Tekken: words are cut where lower case meets upper case."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}{upper}*{lower}+{contraction}|{start}{upper}+{lower}*{contraction}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES_AND_BLANKS}"
    )


@dataclass(frozen=True)
class PreTokenizer:
    """Cutting rule of one family of vocabularies."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a word that is a token is taken whole, merges or not (`ignore_merges`)
    add_bos: bool = False  # default where the file does not say


_DIGITS_APART = PreTokenizer((_DIGIT, _GPT2))
_PLAIN_GPT2 = PreTokenizer((_GPT2,))
_LLAMA3 = PreTokenizer((_cl100k(r"\p{N}{1,3}"),), whole_words=True, add_bos=True)
_CL100K = PreTokenizer((_cl100k(r"\p{N}{1,3}"),))
_QWEN2 = PreTokenizer((_cl100k(r"\p{N}"),))
_TEKKEN = PreTokenizer((_o200k(r"\p{N}", ""),), whole_words=True, add_bos=True)
_GPT4O = PreTokenizer((_o200k(r"\p{N}{1,3}", f"{_CONTRACTION}?"),))
# Files from before the key existed: llama.cpp's fallback, punctuation apart and digits in threes.
_DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))

_FAMILIES: dict[PreTokenizer, tuple[str, ...]] = {
    _DIGITS_APART: ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    _PLAIN_GPT2: ("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "granite-docling"),
    _LLAMA3: ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"),
    _CL100K: ("dbrx", "smaug-bpe"),
    _QWEN2: ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"),
    _TEKKEN: ("tekken",),
    _GPT4O: ("gpt-4o", "llama4"),
    _DEFAULT: ("default", ""),
}
PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: family for family, names in _FAMILIES.items() for name in names}


def find(name: str) -> PreTokenizer:
    """The rule called `name`. Raises UnsupportedModelError for one we do not know."""
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        raise UnsupportedModelError(f"pre-tokenizer {name[:64]!r} is not supported") from None


def build(rule: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """The rule as a `tokenizers` pre-tokenizer that ends in GPT-2's byte-level alphabet."""
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rule.patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
