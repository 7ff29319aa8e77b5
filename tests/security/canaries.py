"""Secrets and prompts that must not be found in what a run writes: planted before it, looked for afterwards in every file and encoding."""

from __future__ import annotations

import base64
import gzip
import io
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

PROMPT = "zq canary prompt xj"
TOKENS = {
    "HF_TOKEN": "hf_CanaryOfTheHubDoNotKeep0123456789",
    "HUGGING_FACE_HUB_TOKEN": "hf_CanaryOfTheOldHubVariable98765432",
    "WANDB_API_KEY": "ca0a12e5ecce70fca0a12e5ecce70fca0a12e5ec",
    "AWS_SECRET_ACCESS_KEY": "CanaryOfTheCloud/DoNotKeep/0123456789abcd",
}
ASKED_FOR = re.compile(r"(?:^|/)samples\.jsonl$")  # README: what a policy wrote at every evaluation, and what the last one compares


def plant(folder: Path, *names: str) -> None:
    """Put PROMPT into every prompt of the files of tests.tiny.tiny_data."""
    for name in names:
        file = folder / name
        file.write_text(file.read_text().replace('"prompt": "say ', f'"prompt": "{PROMPT} say '))


def forms(text: str) -> dict[str, bytes]:
    """How a text may lie in a file, by name of the encoding."""
    found = {name: text.encode(name) for name in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le")}
    for shift in range(3):  # base64 of a longer text holds one of three forms of a part of it
        inside = base64.b64encode(b"\0" * shift + text.encode())[4 if shift else 0 :]
        found[f"base64 + {shift}"] = inside[: len(inside) // 4 * 4 - 4]
    found["hex"] = text.encode().hex().encode()
    found["reversed"] = text[::-1].encode()
    return found


def contents(file: Path) -> Iterator[tuple[str, bytes]]:
    """What a file holds, and what it holds packed: (place, bytes)."""
    whole = file.read_bytes()
    yield "", whole
    if whole[:2] == b"\x1f\x8b":
        yield "!gzip", gzip.decompress(whole)
    elif whole[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            for name in archive.namelist():
                yield f"!{name}", archive.read(name)
    elif whole[:1] == b"\x78":
        try:
            yield "!zlib", zlib.decompress(whole)
        except zlib.error:
            return


def found(folder: Path, printed: str = "", *, asked_for: bool = True) -> tuple[int, list[str]]:
    """(files looked through, "place: which canary, in which form") of everything below a folder and of what was printed.

    `asked_for`: leave prompts in samples.jsonl out, which holds them on purpose; secrets are looked for there too.
    """
    wanted = {f"{name} as {form}": (name, pattern) for name, text in {**TOKENS, "prompt": PROMPT}.items() for form, pattern in forms(text).items()}
    files = [Path(root) / name for root, _, names in os.walk(folder) for name in names]
    leaks = []
    for file in files:
        if not file.is_file() or file.is_symlink():
            continue
        for place, content in contents(file):
            for title, (name, pattern) in wanted.items():
                exempt = asked_for and name == "prompt" and ASKED_FOR.search(file.as_posix())
                if pattern in content and not exempt:
                    leaks.append(f"{file.relative_to(folder)}{place}: {title}")
    leaks += [f"printed: {title}" for title, (_, pattern) in wanted.items() if pattern in printed.encode()]
    return len(files), leaks
