"""Chat templates against transformers' `apply_chat_template`, and what the sandbox refuses."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from galerne.errors import InputError
from galerne.runtime.bundle import Bundle, entry_of
from galerne.runtime.chat import TEMPLATE, TOKENIZER_CONFIG, ChatTemplate
from galerne.runtime.manifest import SCHEMA_VERSION, GraphFacts, Manifest, ModelFacts, Source

_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

# SmolLM2-135M-Instruct's own (Apache-2.0).
_SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

# The others are written in the manner of the models they are named for.
_MISTRAL = """{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- ' [INST] ' ~ message['content'] ~ ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('only user and assistant may speak') }}
    {%- endif %}
{%- endfor %}
"""

_LLAMA2 = """{% if messages[0]['role'] == 'system' %}
    {% set rest = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}{% set rest = messages %}{% set system = false %}{% endif %}
{% for message in rest %}
    {% if loop.index0 == 0 and system %}
        {% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {% else %}{% set content = message['content'] %}{% endif %}
    {% if message.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {% elif message.role == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{% endfor %}"""

_LLAMA3 = """{% set ns = namespace(count=0, tail='') %}{{ bos_token }}
{%- macro head(role) %}<|start_header_id|>{{ role }}<|end_header_id|>{{ '\\n\\n' }}{% endmacro %}
{%- if tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}
{%- for message in messages if message.content %}
    {%- set ns.count = ns.count + 1 %}
    {%- if loop.length > 99 %}{% break %}{% endif %}
    {{- head(message['role']) + message['content'] | trim + '<|eot_id|>' }}
    {%- if loop.last %}{% set ns.tail = loop.index ~ '/' ~ ns.count ~ '/' ~ loop.revindex ~ '=' * 3 %}{% endif %}
{%- endfor %}
{%- generation %}{{ ns.tail }}{{ messages | map(attribute='role') | list | tojson }}{% endgeneration %}
{{ pad_token }}{% for key, value in messages[0].items() %}{{ key }}={{ value | length }};{% endfor %}
{% if add_generation_prompt %}{{ head('assistant') }}{% endif %}"""

_TEMPLATES = {"smollm2": _SMOLLM2, "mistral": _MISTRAL, "llama2": _LLAMA2, "llama3": _LLAMA3}

_CHATS = {
    "question": [{"role": "user", "content": " What is <b>\"mistral\"</b>, & 'galerne'?\n"}],
    "turns": [
        {"role": "user", "content": "Hallo"},
        {"role": "assistant", "content": "Guten Tag  "},
        {"role": "user", "content": "日本 😀 {{ bos_token }}"},
    ],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
}


def _transformers(template: str, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    library = Library(models.BPE(vocab={token: i for i, token in enumerate(_TOKENS.values())}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, **_TOKENS)
    rendered = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert isinstance(rendered, str)
    return rendered


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    ("name", "chat"),
    # Mistral's refuses a system message: see the next test.
    [(name, chat) for name in _TEMPLATES for chat in _CHATS if (name, chat) != ("mistral", "system")],
)
def test_renders_as_transformers_does(name: str, chat: str, add_generation_prompt: bool) -> None:
    template, messages = _TEMPLATES[name], _CHATS[chat]
    ours = ChatTemplate(template, _TOKENS, "t").render(messages, add_generation_prompt=add_generation_prompt)
    assert ours == _transformers(template, messages, add_generation_prompt)


def test_says_why_the_template_refuses_the_messages() -> None:
    template = ChatTemplate(_MISTRAL, _TOKENS, "somewhere.jinja")
    with pytest.raises(InputError, match=r"^somewhere\.jinja: chat template: user and assistant must take turns; "):
        template.render(_CHATS["system"])


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(9999) if false %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{{ 'x' * 10 ** 12 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set ns = namespace(n=3) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    ],
)
def test_refuses_what_would_not_end_or_fit(template: str) -> None:
    with pytest.raises(InputError, match="chat template"):
        ChatTemplate(template, {}, "t").render(_CHATS["question"])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__ }}",
        "{{ (messages | attr('__class__')).__name__ }}x{{ messages['__class__'].__name__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ '{0.__class__.__init__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{{ missing.field }}",
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ messages | tojson(indent='a', nonsense=1) }}",
    ],
)
def test_refuses_what_breaks_out_or_breaks_down(template: str) -> None:
    with pytest.raises(InputError, match=r"^t: chat template: [^\n]+$"):
        ChatTemplate(template, {}, "t").render(_CHATS["question"])


def test_limits_count_for_each_rendering_anew() -> None:
    template = ChatTemplate("{% for i in range(90000) %}{% endfor %}{{ messages | length }}", {}, "t")
    assert [template.render(_CHATS["turns"]) for _ in range(15)] == ["3"] * 15


def test_leaves_the_messages_as_they_are() -> None:
    message = {"role": "user", "content": "a"}
    with pytest.raises(InputError):
        ChatTemplate("{{ messages[0].update(content='b') }}", {}, "t").render([message])
    assert message["content"] == "a"


def test_knows_the_date() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}, "t").render([]) == datetime.now().strftime("%Y")


def test_refuses_a_template_larger_than_a_mebibyte() -> None:
    with pytest.raises(InputError, match="expected at most 1048576 bytes, found 1048577"):
        ChatTemplate("x" * ((1 << 20) + 1), {}, "t")


def _bundle(folder: Path, contents: dict[str, bytes]) -> Bundle:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    files = {name: entry_of(folder / name) for name in contents}
    model = ModelFacts("MistralForCausalLM", 1, 8, 16, 2, 1, 4, 273, (16,), 1e4, 64, False, 1, (2,))
    graph = GraphFacts("opset24", 24, "float16", 16, (32,), None)
    return Bundle(folder, Manifest(SCHEMA_VERSION, "0", Source("safetensors", {}), model, graph, {}, {}, {}, files))


def _config(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ({}, None),
        ({TOKENIZER_CONFIG: _config(bos_token="<s>")}, None),
        ({TOKENIZER_CONFIG: _config(bos_token="<s>", chat_template="{{ bos_token }}a")}, "<s>a"),
        ({TOKENIZER_CONFIG: _config(bos_token={"content": "<b>"}, chat_template="{{ bos_token }}a")}, "<b>a"),
        ({TOKENIZER_CONFIG: _config(bos_token=None, chat_template="{{ bos_token }}a")}, "a"),
        (
            {
                TOKENIZER_CONFIG: _config(
                    chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
                )
            },
            "d",
        ),
        ({TOKENIZER_CONFIG: _config(bos_token="<s>", chat_template="old"), TEMPLATE: b"{{ bos_token }}new"}, "<s>new"),
        ({TEMPLATE: "日".encode()}, "日"),
    ],
)
def test_finds_template_and_tokens_in_a_bundle(
    tmp_path: Path, contents: dict[str, bytes], expected: str | None
) -> None:
    template = ChatTemplate.open(_bundle(tmp_path, contents))
    assert (None if template is None else template.render([])) == expected


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({TOKENIZER_CONFIG: b"{"}, "tokenizer_config.json: not JSON"),
        ({TOKENIZER_CONFIG: b"[]"}, "tokenizer_config.json: expected a table, found list"),
        ({TOKENIZER_CONFIG: b"\xff"}, "tokenizer_config.json: not UTF-8"),
        ({TOKENIZER_CONFIG: _config(chat_template=3)}, "chat_template: expected a text or a list"),
        ({TOKENIZER_CONFIG: _config(chat_template=[{"name": "rag", "template": "x"}])}, "named 'default', found .*rag"),
        ({TEMPLATE: b"\xff"}, "chat_template.jinja: not UTF-8"),
        ({TEMPLATE: b"{% if %}"}, "chat_template.jinja: chat template: "),
    ],
)
def test_names_a_garbled_file(tmp_path: Path, contents: dict[str, bytes], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ChatTemplate.open(_bundle(tmp_path, contents))
