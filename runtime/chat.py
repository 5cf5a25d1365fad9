"""Renders a conversation to a prompt with the bundle's chat template, as transformers' `apply_chat_template` does.

A template is a Jinja program from whoever published the checkpoint. It runs in Jinja's sandbox, which keeps it from
Python's internals, and within limits on loops, calls and sizes that no honest one reaches.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from galerne.errors import InputError, one_line
from galerne.runtime.bundle import Bundle

TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"

_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_TEMPLATE_BYTES = 1 << 20
_MAX_STEPS = 250_000  # loop rounds and calls of one rendering
_MAX_SIZE = 1 << 24  # characters or items of one value


class ChatTemplate:
    """The chat template of a bundle, compiled."""

    def __init__(self, source: str, tokens: Mapping[str, str], where: str) -> None:
        """Compile a template.

        Args:
            source: the Jinja text.
            tokens: what the template may use as `bos_token`, `eos_token` and so on.
            where: what to call the template in an error, such as its file.
        Raises: InputError if it is larger than 1 MiB or no valid template.
        """
        size = len(source.encode(errors="surrogatepass"))
        if size > _MAX_TEMPLATE_BYTES:
            raise InputError(f"{where}: chat template: expected at most {_MAX_TEMPLATE_BYTES} bytes, found {size}")
        self._where = where
        self._tokens = dict(tokens)
        self._environment = _Sandbox()
        try:
            self._template = self._environment.from_string(source)
        except Exception as exc:  # the bundle's program: whatever it raises is the bundle's fault
            raise self._refusal(exc) from exc

    @staticmethod
    def open(bundle: Bundle) -> "ChatTemplate | None":
        """Load the template from `chat_template.jinja`, or else from `tokenizer_config.json`; None if there is none.

        Raises: InputError if a file is garbled, or there are several templates and none is called "default".
        """
        config_file, template_file = bundle.file(TOKENIZER_CONFIG), bundle.file(TEMPLATE)
        config: Mapping[str, Any] = {}
        if TOKENIZER_CONFIG in bundle.manifest.files:
            config = _read_json(config_file)
        if TEMPLATE in bundle.manifest.files:
            return ChatTemplate(_read_text(template_file), _tokens(config), str(template_file))
        source = _default_template(config.get("chat_template"), str(config_file))
        return None if source is None else ChatTemplate(source, _tokens(config), str(config_file))

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Render a conversation. Encode the result with `special=False`: the template brings its own special tokens.

        Args:
            messages: each with at least a "role" and a "content", oldest first.
            add_generation_prompt: whether to end with what opens the model's answer.
        Raises: InputError if the template refuses the messages, fails, or goes beyond the sandbox or its limits.
        """
        self._environment.steps = 0
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except Exception as exc:  # the bundle's program: whatever it raises is the bundle's fault
            raise self._refusal(exc) from exc

    def _refusal(self, exc: Exception) -> InputError:
        return InputError(
            f"{self._where}: chat template: {one_line(exc)}; change the messages, or pass the prompt as text"
        )


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the functions that transformers gives to templates, and with limits."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.steps = 0
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        metered: nodes.Template = _Meter().visit(source)
        return super()._generate(metered, name, filename, defer_init)

    def metered(self, items: Iterable[Any]) -> Iterator[Any]:
        """Pass on what a loop goes over, counting."""
        for item in items:
            self._count()
            yield item

    def joined(self, *parts: object) -> str:
        """Do the work of the operator `~`."""
        text = "".join(map(str, parts))
        _check_size(len(text))
        return text

    # Jinja calls this with the context and the object by position; names with underscores cannot meet a keyword's.
    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __self._count()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_size(_result_size(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        # Jinja's own would print as nothing, and hide what the template tried.
        raise SecurityError(f"it may not use the attribute {attribute!r} of a {type(obj).__name__}")

    def _count(self) -> None:
        self.steps += 1
        if self.steps > _MAX_STEPS:
            raise SecurityError(f"it takes more than {_MAX_STEPS} loop rounds and calls")


class _Meter(NodeTransformer):
    """Puts the counting into a template's syntax tree, for what the sandbox offers no hook."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        self.generic_visit(node)
        node.iter = self._call("metered", [node.iter], node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:  # noqa: N802
        self.generic_visit(node)
        return self._call("joined", node.nodes, node)

    def _call(self, method: str, args: Sequence[nodes.Node], at: nodes.Node) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(method), list(args), [], None, None, lineno=at.lineno)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks the model's turns for training and changes nothing here."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _result_size(operator: str, left: Any, right: Any) -> int:
    """Return about how large a result will be, or 0 where it cannot be large."""
    if operator == "**":
        return _size(left) * abs(right) if isinstance(left, int) and isinstance(right, int) else 0
    if operator == "*" and isinstance(left, int) != isinstance(right, int):
        count, value = (left, right) if isinstance(left, int) else (right, left)
        return count * _size(value)
    return _size(left) + _size(right)


def _size(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length() * 64  # multiplying numbers takes far longer than joining texts of as many characters
    return len(value) if isinstance(value, str | list | tuple) else 0


def _check_size(size: int) -> None:
    if size > _MAX_SIZE:
        raise SecurityError(f"it makes a value of size {size}, expected at most {_MAX_SIZE}")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _default_template(entry: Any, where: str) -> str | None:
    """Read the config's `chat_template`: a text, or a list of named ones."""
    if entry is None or isinstance(entry, str):
        return entry
    try:
        named: dict[str, Any] = {item["name"]: item["template"] for item in entry}
    except (TypeError, KeyError) as exc:
        raise InputError(f"{where}: chat_template: expected a text or a list of name and template") from exc
    source = named.get("default")
    if not isinstance(source, str):
        raise InputError(
            f"{where}: chat_template: expected a template named 'default', found {sorted(map(str, named))}"
        )
    return source


def _tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {name: config.get(name) for name in _TOKENS}
    texts = {name: token.get("content") if isinstance(token, Mapping) else token for name, token in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        tree = json.loads(_read_text(path))
    except ValueError as exc:
        raise InputError(f"{path}: not JSON ({exc}); export the bundle again") from exc
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a table, found {type(tree).__name__}; export the bundle again")
    return tree


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise InputError(f"{path}: not UTF-8 ({exc.reason} at byte {exc.start}); export the bundle again") from exc
