"""Chat templates: the tokenizer's own, a built-in one by name, or a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from configs.errors import UserError
from stages.data.layouts import LAYOUTS, TOKENS

_BOS = "{{- bos_token }}"
_PLAIN = """\
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{{- 'System: ' + message['content'] + '\\n' }}
{%- elif message['role'] == 'user' %}
{{- 'User: ' + message['content'] + '\\n' }}
{%- else %}
{{- 'Assistant: ' + message['content'] + eos_token + '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- 'Assistant:' }}
{%- endif %}"""
_CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] }}
{{- eos_token if message['role'] == 'assistant' else '<|im_end|>' }}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
_RAW = """\
{%- for message in messages %}
{%- if message['role'] == 'system' or loop.index > 2 %}
{{- raise_exception('the raw template holds one prompt and one completion: no system message, no further turns') }}
{%- endif %}
{{- message['content'] }}
{%- if message['role'] == 'assistant' %}
{{- eos_token }}
{%- endif %}
{%- endfor %}"""
BUILT_IN = {"plain": _PLAIN, "chatml": _CHATML, "raw": _RAW, **LAYOUTS}


@dataclass(frozen=True)
class Template:
    """A chat template in Jinja; `name` is for people, `digest` for contracts between stages."""

    name: str
    jinja: str

    @property
    def is_ours(self) -> bool:
        """Whether it is one of the built-in ones; any other is somebody's program."""
        return bool(self.layout)

    @property
    def layout(self) -> str:
        """The built-in one that it is; "" for any other."""
        jinja = self.jinja.removeprefix(_BOS)
        return next((name for name, known in BUILT_IN.items() if known == jinja), "")

    @property
    def digest(self) -> str:
        """BLAKE3 (hex) of the Jinja text."""
        return blake3(self.jinja.encode()).hexdigest()


def adds_bos(tokenizer: Any) -> bool:
    """Whether this tokenizer begins every text with BOS by default (so that its model was trained on that)."""
    return tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("").input_ids[:1]


def built_in(name: str, bos: bool) -> Template:
    """A built-in template, beginning with BOS once where the model expects it. chatml ends turns of the assistant with EOS."""
    return Template(name, (_BOS if bos else "") + BUILT_IN[name])


def check_tokens(tokenizer: Any, template: Template) -> None:
    """Raise UserError where the tokenizer lacks special tokens that the template's turns are made of."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | set(tokenizer.all_special_tokens)
    missing = [token for token in TOKENS.get(template.layout, ()) if token not in special]
    if missing:
        raise UserError(
            f"the template {template.layout!r} is made of special tokens, of which this tokenizer lacks {', '.join(missing)}: start from a model that has them "
            f"(they are learned with it), or set `template` to one that any tokenizer can write: {', '.join(name for name in BUILT_IN if name not in TOKENS)}"
        )


def resolve_template(tokenizer: Any, choice: str = "auto") -> Template:
    """The template that `choice` names: auto (the tokenizer's own, else plain), one of BUILT_IN or a .jinja file.

    A tokenizer saved by a stage carries its template, so `auto` in the next stage gives the same digest and name.
    Raises UserError for an unknown name, a missing file, or an empty template.
    """
    if choice == "auto":
        own = tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own
        if not own:
            return built_in("plain", adds_bos(tokenizer))
        known = (built_in(name, bos) for name in BUILT_IN for bos in (True, False))
        return next((template for template in known if template.jinja == own), Template("tokenizer", own))
    if choice in BUILT_IN:
        return built_in(choice, adds_bos(tokenizer))
    path = Path(choice)
    if not path.is_file():
        raise UserError(f"template {choice!r}: no such file, and not one of auto, {', '.join(BUILT_IN)}")
    jinja = path.read_text(encoding="utf-8")
    if not jinja.strip():
        raise UserError(f"template {choice}: the file is empty")
    return Template(path.name, jinja)
