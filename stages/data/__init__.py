"""Data: files into rows, rows into parts, parts into token ids. Nothing here imports torch."""

from stages.data.encode import encode_demonstrations, encode_pairs, encode_prompts, prove_loss_mask
from stages.data.fingerprint import fingerprint
from stages.data.formatter import Formatter
from stages.data.read import read_demonstrations, read_pairs, read_prompts
from stages.data.rows import Demonstration, Loaded, Message, PreferencePair, Prompt, Report, as_messages
from stages.data.special_tokens import SpecialTokens, ensure_special_tokens
from stages.data.split import Splits, Splitter, group_key, one_per_group
from stages.data.templates import Template, resolve_template

__all__ = [
    "Demonstration",
    "Formatter",
    "Loaded",
    "Message",
    "PreferencePair",
    "Prompt",
    "Report",
    "SpecialTokens",
    "Splits",
    "Splitter",
    "Template",
    "as_messages",
    "encode_demonstrations",
    "encode_pairs",
    "encode_prompts",
    "ensure_special_tokens",
    "fingerprint",
    "group_key",
    "one_per_group",
    "prove_loss_mask",
    "read_demonstrations",
    "read_pairs",
    "read_prompts",
    "resolve_template",
]
