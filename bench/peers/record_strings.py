"""Seeded random strings for `record_llama_cpp.py`: what users and attackers send, from prose to noise."""

import random
import unicodedata
from collections.abc import Callable

_SCRIPTS = [
    (0x00C0, 0x024F), (0x0370, 0x03FF), (0x0400, 0x052F), (0x0531, 0x0587), (0x05D0, 0x05EA), (0x0600, 0x06FF),
    (0x0900, 0x097F), (0x0980, 0x09FF), (0x0B80, 0x0BFF), (0x0E00, 0x0E5B), (0x0E80, 0x0EDF), (0x0F00, 0x0FBC),
    (0x10A0, 0x10FF), (0x1200, 0x137C), (0x13A0, 0x13F5), (0x16A0, 0x16F0), (0x1780, 0x17F9), (0x1820, 0x1878),
    (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x13000, 0x1342E), (0x20000, 0x2A6D6),
]  # fmt: skip
_BLANKS = [" ", "  ", "   ", "    ", "\t", "\n", "\n\n", "\r\n", "\r", " \n", "\n ", "\u00a0", "\u2003",
           "\u3000", "\x85", "\u2028", "\u2029", "\u200b", "\x0b", "\x0c", "\u1680", "\u202f", " " * 17,
           "\t\t\t", "\n\n\n\n"]  # fmt: skip
_WORDS = ["the", "Hello", "WORLD", "don't", "I'LL", "we've", "they'Re", "it's'", "naïve", "straße", "Ωmega",
          "iPhone", "JSONParser", "snake_case", "e.g.", "U.S.A.", "co-operate", "xXx", "ﬁne", "Ⅷ",
          "McDonald’s"]  # fmt: skip
_CODE = ["def f(x):\n    return x**2", "for(int i=0;i<n;++i){", "a[0] += b->c;", "SELECT * FROM t;",
         "<div class=\"x\">", "#include <stdio.h>\r\n", "https://a.b/c?d=1&e=%20#f", "\\x00\\n", "${HOME}/.rc",
         "x != y && !z", "λx.x", "git commit -m 'wip'", "/* ... */", "//", "0x1F", "1e-9", "3.14159",
         "{\"k\": [1, null]}"]  # fmt: skip
_EMOJI = ["😀", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇫🇷", "❤️", "☺", "🧑🏿‍🚀", "1️⃣", "⚠︎", "🫠", "♟"]
_NUMBERS = ["²", "½", "٣٤", "①", "㊿", "१२३", "〇", "Ⅻ", "𝟘𝟙", "１２", "๓", "௧௨"]
_ODD = ["\ufffd", "\ufffe", "\uffff", "\ufeff", "\u200d", "\u200e", "\u202e", "\ue000", "\U000f0000", "\U0010ffff",
        "\u2060", "\u00ad", "\u034f", "Ã©", "â€™", "ï¿½", "\x00", "\x1b[31m", "\x7f", "\x80\x81", "Z͑ͫa̴l͖g̷o"]  # fmt: skip
_SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|im_",
    "|>",
    "<repo_name>",
    "<s>",
    "</s>",
    "<0x0A>",
    "[INST]",
]
_MARKS = [chr(code) for code in range(0x0300, 0x036F)]
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~¡¿«»—–…“”‘’„‚•§¶†‡°±×÷€£¥₹©®™←→∀∃∈∑√∞≠≤█▁"


def unicode_strings(seed: int, count: int) -> list[str]:
    """`count` different strings of 1 to 12 pieces each."""
    rng = random.Random(seed)
    kinds: list[Callable[[random.Random], str]] = [
        _script, _script, _script, _assigned, _combined, _digits, _punctuation, _control,
        *(lambda rng, pool=pool: rng.choice(pool) for pool in
          (_BLANKS, _BLANKS, _WORDS, _WORDS, _CODE, _EMOJI, _NUMBERS, _ODD, _SPECIAL)),
    ]  # fmt: skip
    strings: dict[str, None] = {}
    while len(strings) < count:
        strings["".join(rng.choice(kinds)(rng) for _ in range(rng.randint(1, 12)))] = None
    return list(strings)


def sentencepiece_strings(seed: int, count: int, text: str) -> list[str]:
    """Cuts of `text`, runs of one character, blanks, and characters that the vocabulary lacks."""
    rng = random.Random(seed)
    runs = [" ", "\n", "-", "a", "e", "o", "=", "ha", "▁"]

    def cut(rng: random.Random) -> str:
        start = rng.randrange(len(text))
        return text[start : start + rng.randint(1, 60)]

    kinds: list[Callable[[random.Random], str]] = [
        cut, cut, cut, lambda rng: rng.choice(runs) * rng.randint(1, 40),
        _script, _digits, _control, lambda rng: rng.choice([*_EMOJI, *_WORDS, *_BLANKS]),
        lambda rng: rng.choice(["<s>", "<unk>", "<0x41>", "<tool>", "  <tool> ", "<tool"]),
    ]  # fmt: skip
    strings: dict[str, None] = {}
    while len(strings) < count:
        strings["".join(rng.choice(kinds)(rng) for _ in range(rng.randint(1, 6)))] = None
    return list(strings)


def _script(rng: random.Random) -> str:
    first, last = rng.choice(_SCRIPTS)
    return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 6)))


def _assigned(rng: random.Random) -> str:
    while True:
        char = chr(rng.randrange(0x20, 0x1FBFF))
        if unicodedata.category(char) not in ("Cn", "Cs", "Co"):
            return char


def _combined(rng: random.Random) -> str:
    return rng.choice("aeionucsAEX ") + "".join(rng.choice(_MARKS) for _ in range(rng.randint(1, 3)))


def _digits(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 9)))


def _punctuation(rng: random.Random) -> str:
    return "".join(rng.choice(_PUNCTUATION) for _ in range(rng.randint(1, 4)))


def _control(rng: random.Random) -> str:
    return chr(rng.choice([*range(0x20), *range(0x7F, 0xA0)]))
