"""Renders a model's chat template: messages in, prompt text out.

A template is a Jinja program that came with the model file, so it is run as `transformers` runs it (immutable sandbox,
the same switches, filters and globals) and is not trusted. The sandbox keeps it from the interpreter, the limits here
bound the template and its output. What they cannot bound is one step that takes for ever or fills the memory, such as
`'x' * 10**9`; therefore the server renders in `server.template_worker`, a process that can be killed.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
from headrace.models.errors import TemplateError
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE_BYTES = 64 << 10
MAX_OUTPUT_CHARS = 4 << 20  # a million tokens of context at about four characters each

_MAX_REASON_CHARS = 200


class MessagesRefusedError(TemplateError):
    """The template itself refused the messages, for example because the roles do not alternate: the caller's fault."""


class ChatTemplate:
    """A chat template. It is compiled when first rendered, so that holding one never runs foreign code."""

    def __init__(
        self, source: str, bos_token: str, eos_token: str, *, max_output_chars: int = MAX_OUTPUT_CHARS
    ) -> None:
        """Raises TemplateError for a template larger than `MAX_TEMPLATE_BYTES`."""
        if len(source) > MAX_TEMPLATE_BYTES or len(source.encode(errors="replace")) > MAX_TEMPLATE_BYTES:
            raise TemplateError(f"the chat template is larger than {MAX_TEMPLATE_BYTES} bytes")
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token
        self._max_output_chars = max_output_chars
        self._compiled: jinja2.Template | None = None

    def compile(self) -> None:
        """Compiles it now rather than in the first render. Raises TemplateError."""
        with _template_errors():
            self._compile()

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """The prompt. Raises MessagesRefusedError or TemplateError; only the former's text comes from the template."""
        with _template_errors():
            pieces: list[str] = []
            room = self._max_output_chars
            for piece in self._compile().generate(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
                tools=None,
                documents=None,
            ):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    raise TemplateError(f"the chat template writes more than {self._max_output_chars} characters")
            text = "".join(pieces)
            text.encode()  # a template can write a lone surrogate, which no later stage could take
            return text

    def _compile(self) -> jinja2.Template:
        if self._compiled is None:
            self._compiled = _ENVIRONMENT.from_string(self.source)
        return self._compiled


@contextmanager
def _template_errors() -> Iterator[None]:
    """Whatever a template raises becomes a TemplateError whose text quotes neither messages nor template."""
    try:
        yield
    except TemplateError:
        raise
    except MemoryError:
        raise TemplateError("the chat template ran out of memory") from None
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"the chat template is not valid Jinja (line {error.lineno})") from error
    except jinja2.exceptions.SecurityError as error:
        raise TemplateError("the chat template did something that is not allowed") from error
    except Exception as error:  # a template can raise anything: undefined names, division by zero, recursion …
        raise TemplateError(f"the chat template failed ({type(error).__name__})") from error


def _refuse(reason: object) -> str:
    """Global `raise_exception` of a template. Its text is the model author's; it is cleaned and cut for logs."""
    printable = re.sub(r"[^\x20-\x7e]+", " ", str(reason))[:_MAX_REASON_CHARS]
    raise MessagesRefusedError(f"the chat template refused the messages: {printable}")


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in `transformers`: plain JSON. Jinja's own filter would escape `<`, `>`, `&` and `'` for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  (Jinja reads a plain class attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    # Jinja evaluates what is constant while it compiles, but not the operators named here: 9 ** 9 ** 9 would hold up
    # the compiler. At run time they work as always.
    intercepted_binops = frozenset({"*", "**", "%"})


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    return environment


_ENVIRONMENT = _environment()
