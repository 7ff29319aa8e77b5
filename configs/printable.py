"""Text of others (data, models, files) made harmless for a terminal and for a log of one record a line.

A prompt may hold escape sequences that clear the screen, rewrite lines that were printed before, set the window's title or, in some terminals, type
on the person's behalf; and characters that turn the direction of writing, so that a line reads as another one than it is.
"""

from __future__ import annotations

import re
import unicodedata

_HARMLESS = re.compile(r"[ -~\n\t]*")


def printable(text: str) -> str:
    """`text` with every control, format and lone surrogate character but newline and tab written out, as `\\x1b` or `\\u202e`."""
    if _HARMLESS.fullmatch(text):
        return text
    return "".join(character if _is_harmless(character) else _written_out(character) for character in text)


def _is_harmless(character: str) -> bool:
    return character in "\n\t\u200d" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # u200d joins emoji


def _written_out(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
