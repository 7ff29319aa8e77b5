"""The one place where text becomes token ids: what a policy is trained on is what a rollout sees.

A conversation is cut into segments, a prompt segment and a completion by turns, and each is tokenised on its own
(no tokenizer may merge across the border, because in a rollout the completion is sampled after the prompt's last id).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple

from configs.errors import UserError
from stages.data import trial
from stages.data.layouts import WITH_TOOLS
from stages.data.rows import Demonstration, Message, Messages, PreferencePair, as_messages
from stages.data.templates import Template, check_tokens, resolve_template
from stages.data.tools import check_shown, has_tools


class NotAPrefix(Exception):
    """The template rewrites earlier turns once later ones follow (as templates with thinking blocks do)."""


class Segment(NamedTuple):
    """Token ids of one stretch of a conversation, and whether the assistant wrote them."""

    ids: list[int]
    is_completion: bool


class Ending(NamedTuple):
    """What a template puts after the assistant's text: `tail` is all of it, of which `kept` stands before the end token."""

    tail: str
    kept: str
    token: str  # "" where the template writes no end token; EOS is then appended as an id
    eos_id: int
    separator: str  # what stands between the generation prompt and the assistant's text


class Formatter:
    """Renders conversations with a chat template and tokenises them segment by segment.

    `eos_ids`: every id that ends a rollout; a template's own end-of-turn token is added. `eos_id`: the one completions end with.
    The template is installed as `tokenizer.chat_template`, so that a saved tokenizer carries it to the next stage.
    Raises UserError when the template cannot render a question and its answer, and when pad is one of the EOS.
    """

    def __init__(self, tokenizer: Any, template: Template | str = "auto", eos_ids: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.template = resolve_template(tokenizer, template) if isinstance(template, str) else template
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer names no EOS token; ensure_special_tokens sets one from the model's config")
        check_tokens(tokenizer, self.template)
        tokenizer.chat_template = self.template.jinja
        if not self.template.is_ours:
            trial.try_out(self.template.name, self._try_shapes)
        self._adds_space = self._decode_joined("a", "b") == "a b"
        known = tuple(dict.fromkeys((int(tokenizer.eos_token_id), *eos_ids)))
        self._ending = self._find_ending(known)
        self.eos_id = self._ending.eos_id
        self.eos_ids = tuple(dict.fromkeys((self.eos_id, *known)))
        if tokenizer.pad_token_id in self.eos_ids:
            raise UserError(
                f"the pad token {tokenizer.pad_token!r} also ends completions (EOS {list(self.eos_ids)} with template "
                f"{self.template.name!r}), so padding would hide EOS from the loss; give the tokenizer another pad_token"
            )

    # -- what stages call

    def prompt_ids(self, messages: str | Messages, tools: str = "") -> list[int]:
        """Ids up to and with the generation prompt; what a policy is given. Plain text is one user message. `tools`: a demonstration's."""
        return [token for segment in self._prompt_segments(as_messages(messages), tools)[0] for token in segment.ids]

    def completion_ids(self, text: str, prompt: str | Messages = "?") -> list[int]:
        """Ids that a policy would sample to say `text` after `prompt`, ending with `eos_id` and nothing after it."""
        messages = as_messages(prompt)
        return self._completion(messages, Message("assistant", text), self.render(messages, generate=True))[0]

    def demonstration(self, row: Demonstration, loss_on: str = "all") -> dict[str, list[int]]:
        """{"input_ids", "completion_mask"}, both [tokens]; the mask is 1 on what the loss covers.

        `loss_on`: "all" assistant turns, or the "last". A tool call is part of its turn, a tool's result never is.
        The ids before the last completion are `prompt_ids(row.prompt, row.tools)`. Raises UserError, with the row's place, when the template cannot
        render the row, leaves out a part of its tool turns, or rewrites earlier turns ("all").
        """
        try:
            if has_tools(row):
                check_shown(self.template, self.render, row)
            segments, rendered = self._prompt_segments(row.prompt, row.tools)
            several = sum(message.role == "assistant" for message in row.messages) > 1
            if loss_on == "all" and several and not any(segment.is_completion for segment in segments):
                raise UserError(
                    f"the template {self.template.name!r} rewrites earlier assistant turns when a later one follows, so the loss cannot "
                    "cover all of them in one row; set `loss_on: last`, or another `template`"
                )
            last, _ = self._completion(row.prompt, row.messages[-1], rendered, row.tools)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None
        input_ids = [token for segment in segments for token in segment.ids] + last
        mask = [int(segment.is_completion and loss_on == "all") for segment in segments for _ in segment.ids] + [1] * len(last)
        return {"input_ids": input_ids, "completion_mask": mask}

    def pair(self, row: PreferencePair) -> dict[str, list[int]]:
        """{"prompt_ids", "chosen_ids", "rejected_ids"}; both completions end with `eos_id`. Raises UserError with the place."""
        try:
            segments, rendered = self._prompt_segments(row.prompt)
            chosen, rejected = (self._completion(row.prompt, Message("assistant", text), rendered)[0] for text in (row.chosen, row.rejected))
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None
        prompt = [token for segment in segments for token in segment.ids]
        return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens shown."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def completion_text(self, ids: Sequence[int]) -> str:
        """What a rollout says: up to the first EOS, special tokens and the template's separator left out."""
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), len(ids))
        text = str(self.tokenizer.decode(list(ids[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        # A decoder that takes away the space before a text has taken away a separating space already.
        separator = self._ending.separator
        return text if self._adds_space and separator == " " else text.removeprefix(separator)

    def facts(self) -> dict[str, Any]:
        """What a manifest records, for the contract between stages."""
        return {
            "template": self.template.name,
            "template_digest": self.template.digest,
            "eos_id": self.eos_id,
            "eos_ids": list(self.eos_ids),
            "pad_id": self.tokenizer.pad_token_id,
        }

    def render(self, messages: Messages, generate: bool, tools: str = "") -> str:
        """The template's text, in transformers' sandbox, within a time limit. Raises UserError with what the template objects to."""
        try:
            with nullcontext() if self.template.is_ours else trial.limited(self.template.name):
                return self._rendered(messages, generate, tools)
        except UserError:
            raise
        except Exception as error:  # a template is a program: it may raise whatever it likes
            roles = ", ".join(message.role for message in messages)
            others = " or ".join(WITH_TOOLS if tools or "tool" in roles else ("plain", "chatml"))
            raise UserError(f"the template {self.template.name!r} cannot render turns of {roles}: {error}; correct it, or set `template` to {others}") from None

    def _rendered(self, messages: Messages, generate: bool, tools: str = "") -> str:
        turns, given = [message.as_dict() for message in messages], json.loads(tools) if tools else None
        return str(
            self.tokenizer.apply_chat_template(turns, tools=given, chat_template=self.template.jinja, tokenize=False, add_generation_prompt=generate)
        )

    def _try_shapes(self) -> None:
        """Render conversations of several shapes, whatever the template objects to in one of them."""
        import jinja2

        question, answer, system = Message("user", "?"), Message("assistant", "word " * 400), Message("system", "Be brief.")
        for turns in ((question,), (question, answer), (system, *(question, answer) * 8)):
            for generate in (True, False):
                with suppress(jinja2.TemplateError):
                    self._rendered(turns, generate)

    # -- segments

    def _prompt_segments(self, messages: Messages, tools: str = "") -> tuple[list[Segment], str]:
        """Segments of a prompt and its rendered text; one segment where the template rewrites earlier turns."""
        rendered = self.render(messages, True, tools)
        try:
            return self._by_turns(messages, rendered, tools), rendered
        except NotAPrefix:
            return [Segment(self._tokenise(rendered, first=True), False)], rendered

    def _by_turns(self, messages: Messages, rendered: str, tools: str) -> list[Segment]:
        segments: list[Segment] = []
        consumed = ""
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self.render(messages[:index], True, tools)
            if not before.startswith(consumed):
                raise NotAPrefix
            segments.append(Segment(self._tokenise(before[len(consumed) :], first=not segments), False))
            ids, consumed = self._completion(messages[:index], message, before, tools)
            segments.append(Segment(ids, True))
            if not rendered.startswith(consumed):
                raise NotAPrefix
        segments.append(Segment(self._tokenise(rendered[len(consumed) :], first=not segments), False))
        return segments

    def _completion(self, prompt: Messages, answer_turn: Message, rendered: str, tools: str = "") -> tuple[list[int], str]:
        """Ids of an answer to `prompt` (rendered: its text with the generation prompt), and all text up to its end token."""
        whole = self.render((*prompt, answer_turn), False, tools)
        answer = self._after(rendered, whole)
        if not answer.endswith(self._ending.tail):
            raise UserError(f"the template {self.template.name!r} ends this answer in another way than others: …{answer[-40:]!r}")
        body = answer[: len(answer) - len(self._ending.tail)] + self._ending.kept
        ids = self._tokenise(body, first=False)
        if any(token in self.eos_ids for token in ids):
            # An EOS spelled out in the data is text: a rollout would have ended there.
            ids = self._tokenise(body, first=False, split_special_tokens=True)
        if not ids:
            raise UserError("the completion has no tokens")
        return [*ids, self.eos_id], rendered + body + self._ending.token

    def _after(self, rendered: str, whole: str) -> str:
        if not whole.startswith(rendered):
            raise UserError(
                f"the template {self.template.name!r} shows a policy another beginning of its answer than the one in a finished conversation "
                f"(…{rendered[-30:]!r} is not how it goes on there), so training and rollouts would differ; set `template` to "
                "chatml, plain or a .jinja file whose generation prompt is the beginning of the answer"
            )
        return whole[len(rendered) :]

    def _find_ending(self, known: tuple[int, ...]) -> Ending:
        """Render a probe; the end token is the first known EOS after the text, else the template's own special token."""
        self.eos_ids, self._ending = known, Ending("", "", "", known[0], "")
        probe = uuid.uuid4().hex
        question = as_messages("?")
        answer = self._after(self.render(question, True), self.render((*question, Message("assistant", probe)), False))
        if probe not in answer:
            raise UserError(f"the template {self.template.name!r} does not show what the assistant says; it must write message['content'] of every turn")
        separator, _, tail = answer.partition(probe)
        names = {token.content: index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        names |= {self.tokenizer.convert_ids_to_tokens(index): index for index in known}
        found = sorted((tail.find(name), -len(name), name) for name in names if name in tail)
        known_names = [entry for entry in found if names[entry[2]] in known]
        if not found:
            return Ending(tail, tail.rstrip(), "", known[0], separator)
        position, _, name = (known_names or found)[0]
        return Ending(tail, tail[:position], name, names[name], separator)

    # -- tokens

    def _tokenise(self, text: str, first: bool, split_special_tokens: bool = False) -> list[int]:
        """Ids of one segment. A tokenizer that puts a space before every text gets none of ours, and loses a lone one."""
        if not text:
            return []
        spaced = text.startswith(" ")
        if self._adds_space and not first and spaced:
            text = text[1:]
        ids: list[int] = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=split_special_tokens, verbose=False
        ).input_ids
        if self._adds_space and not first and not spaced and ids and self._is_lone_space(ids[0]):
            ids = ids[1:]
        bos = self.tokenizer.bos_token_id
        while first and bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        return list(ids)

    def _is_lone_space(self, token: int) -> bool:
        return self.tokenizer.convert_ids_to_tokens(token) == "▁"

    def _decode_joined(self, left: str, right: str) -> str:
        ids = [token for text in (left, right) for token in self.tokenizer(text, add_special_tokens=False).input_ids]
        return self.decode(ids)
