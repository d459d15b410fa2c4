"""Chat templates: what the sandbox renders, and that whatever goes wrong is a TemplateError that quotes nothing."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
from headrace.models.chat_template import MAX_TEMPLATE_BYTES, ChatTemplate, MessagesRefusedError
from headrace.models.errors import TemplateError
from headrace.models.gguf import GGUFFile

USER = {"role": "user", "content": "hi"}
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}
{% set system_message = false %}{% endif %}{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if loop.index0 == 0 and system_message != false %}
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""


def render(source: str, *messages: dict[str, str], add_generation_prompt: bool = True) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages, add_generation_prompt)


def test_the_default_models_template(smollm2_path: Path) -> None:
    with GGUFFile.open(smollm2_path) as file:
        source = str(file.metadata["tokenizer.chat_template"])
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    user = "<|im_start|>user\nhi<|im_end|>\n"
    assert render(source, USER) == system + user + "<|im_start|>assistant\n"
    assert render(source, USER, add_generation_prompt=False) == system + user
    assert render(source, {"role": "system", "content": "Be brief."}, USER).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    )


def test_a_template_in_the_style_of_llama_2() -> None:
    # Line ends after tags vanish (trim_blocks), as in transformers.
    assert render(LLAMA2, USER) == "<s>[INST] hi [/INST]\n"
    system = {"role": "system", "content": "S"}
    answer = {"role": "assistant", "content": " yo "}
    assert render(LLAMA2, system, USER, answer).replace("\n", "") == ("<s>[INST] <<SYS>>S<</SYS>>hi [/INST] yo </s>")


def test_refusal_by_the_template_is_the_callers_fault_and_says_why() -> None:
    with pytest.raises(MessagesRefusedError, match="roles must alternate"):
        render(LLAMA2, USER, USER)


def test_a_refusal_is_cleaned_and_cut() -> None:
    with pytest.raises(MessagesRefusedError) as caught:
        render("{{ raise_exception('\\x1b[31m\\n' + 'a' * 5000) }}", USER)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),  # lstrip_blocks and trim_blocks
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{% for i in range(4) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "023"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hi"}]'),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", json.dumps({"a": 2, "b": 1}, indent=1)),
        ("{{ tools is none }}{{ documents is none }}{{ tools is defined }}", "TrueTrueTrue"),
        ("{% generation %}a{{ bos_token }}{% endgeneration %}b", "a<s>b"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{{ unknown }}{{ messages[0].name }}", ""),
        ("{{ messages[-1]['content'].upper().split('I') }}", "['H', '']"),
        ("{{ 7 % 4 }}{{ 2 ** 3 }}{{ 'ab' * 2 }}{{ '%s!' % 'a' }}", "38ababa!"),
    ],
)
def test_the_language_is_that_of_transformers(source: str, expected: str) -> None:
    assert render(source, USER) == expected


def test_the_date() -> None:
    assert render("{{ strftime_now('%Y') }}", USER) in {str(datetime.date.today().year + step) for step in (-1, 0, 1)}


ESCAPES = [
    "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__['__builtins__'] }}",
    "{{ messages.__class__.__base__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ (messages | attr('append')).__self__.__class__.__subclasses__ }}",
    "{{ messages | map(attribute='__class__') | list | first | attr('__subclasses__') }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{m.__class__}'.format_map({'m': messages}) }}",
    "{{ (bos_token | attr('format'))('{0.__class__}') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends 'x' %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_no_way_out_of_the_sandbox(source: str) -> None:
    try:
        text = render(source, USER)
    except TemplateError:
        return
    assert text in ("", "<s>")  # what is forbidden is undefined, or the text that the filter was asked for


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ messages[0].__setitem__('role', 1) }}",
        "{% set messages[0].role = 'x' %}",
        "{% do messages.clear() %}",
    ],
)
def test_messages_cannot_be_changed(source: str) -> None:
    messages = [dict(USER)]
    with pytest.raises(TemplateError):
        ChatTemplate(source, "", "").render(messages, True)
    assert messages == [USER]


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{% endfor %}",
        "{{",
        "{% for %}",
        "{{ 'a' | nofilter }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content.x }}",
        "{{ none.x.y }}",
        "{{ 'a' + 1 }}",
        "{{ '\\ud800' }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(10 ** 9) }}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        "{{ '{:999999999999999999999d}'.format(1) }}",
    ],
)
def test_faults_are_template_errors_that_quote_nothing(source: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render(source, {"role": "user", "content": "SECRET"})
    assert not isinstance(caught.value, MessagesRefusedError)
    assert "SECRET" not in str(caught.value)
    assert len(str(caught.value)) < 100


def test_a_template_is_compiled_when_it_is_first_used() -> None:
    template = ChatTemplate("{% if %}", "", "")
    with pytest.raises(TemplateError, match="line 1"):
        template.compile()
    with pytest.raises(TemplateError, match="line 1"):
        template.render([USER], True)


def test_a_constant_that_would_hold_up_the_compiler_is_not_computed() -> None:
    ChatTemplate("{% if false %}{{ 9 ** (9 ** 9) }}{% endif %}x", "", "").compile()


def test_output_is_bounded_while_it_is_written() -> None:
    template = ChatTemplate("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "", "", max_output_chars=5000)
    with pytest.raises(TemplateError, match="5000"):
        template.render([USER], True)
    exact = ChatTemplate("{{ 'x' * 5000 }}", "", "", max_output_chars=5000)
    assert len(exact.render([USER], True)) == 5000


def test_the_template_itself_is_bounded_in_bytes() -> None:
    assert ChatTemplate("é" * (MAX_TEMPLATE_BYTES // 2), "", "").render([USER], True)
    with pytest.raises(TemplateError, match="65536"):
        ChatTemplate("é" * (MAX_TEMPLATE_BYTES // 2) + "x", "", "")


def test_messages_render_the_same_twice() -> None:
    template = ChatTemplate("{% set x = namespace(v=messages) %}{{ x.v[0].content }}", "", "")
    assert [template.render([{"role": "user", "content": text}], True) for text in "aba"] == ["a", "b", "a"]
