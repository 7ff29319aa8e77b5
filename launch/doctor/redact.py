"""Takes out of a report what must not be pasted in public: secrets, and what names a person or a machine."""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|AUTH|COOKIE|SESSION|DSN|WEBHOOK|PRIVATE|_PAT$|^PAT$", re.IGNORECASE)
NOT_SECRET = re.compile(r"^TOKENIZERS_|_FILE$|_PATH$|_DIR$|SOCK$|^KEYMAP|MAX_TOKENS|SESSION_(?:TYPE|CLASS|ID|DESKTOP)$|^DESKTOP_SESSION$|^XDG_", re.IGNORECASE)
HIDDEN = "***"
SHAPES = (
    re.compile(r"\bhf_[A-Za-z0-9]{6,}"),  # Hugging Face
    re.compile(r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{12,}"),  # OpenAI, Anthropic and others
    re.compile(r"\bgh[opsur]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,}"),
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}"),
    re.compile(r"\bxox[abposr]-[\w-]{8,}"),
    re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{4,}"),  # JSON web token
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"\b[0-9a-f]{40}\b"),  # a Weights & Biases key (or a git commit: no loss in a report that has the version)
)
ASSIGNED = re.compile(r"(?i)\b([\w-]*(?:token|api[-_]?key|secret|password|passwd|signature|credential)[\w-]*)(\s*[=:]\s*)([^\s&,;'\"]+)")
BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}")
LOGIN = re.compile(r"(?<=://)[^/\s@]+@")
EMAIL = re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b")
ADDRESS = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])")
SHARED_NAMES = {"root", "user", "users", "home", "localhost", "admin", "ubuntu", "runner", "local", "default", "main", "host", "test", "work", "data"}


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """Values of the variables whose names say that they are secret, longest first; shorter than 6 characters they would hit plain words."""
    found = {value for name, value in environment.items() if SECRET_NAME.search(name) and not NOT_SECRET.search(name) and len(value) >= 6}
    return sorted(found, key=len, reverse=True)


class Redactor:
    """Redacts strings by what this process knows: its environment, its person, its machine."""

    def __init__(self, environment: Mapping[str, str] | None = None, home: str | None = None, user: str | None = None, host: str | None = None) -> None:
        environment = os.environ if environment is None else environment
        self._secrets = secrets_of(environment)
        self._home = (home if home is not None else str(Path.home())).rstrip("/")
        self._names = {_name(user if user is not None else _user()): "USER", _name(host if host is not None else socket.gethostname()): "HOST"}
        if "." in (full := host if host is not None else socket.gethostname()):
            self._names = {full.lower(): "HOST", **self._names}

    def text(self, text: str) -> str:
        """`text` without secrets, home directory, the names of user and host, e-mail and network addresses (loopback stays)."""
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        text = LOGIN.sub(f"{HIDDEN}@", text)
        for shape in SHAPES:
            text = shape.sub(HIDDEN, text)
        text = ASSIGNED.sub(lambda match: f"{match[1]}{match[2]}{HIDDEN}", text)
        text = BEARER.sub(lambda match: f"{match[1]} {HIDDEN}", text)
        text = EMAIL.sub("EMAIL", text)
        if len(self._home) > 1:
            text = re.sub(re.escape(self._home) + r"(?![\w.-])", "~", text)
        text = re.sub(r"(/(?:home|Users)/)[^/\s'\",:;)]+", r"\1USER", text)
        for name, instead in self._names.items():
            if len(name) > 2 and name not in SHARED_NAMES:
                text = re.sub(rf"(?<![A-Za-z0-9_]){re.escape(name)}(?![A-Za-z0-9_])", instead, text, flags=re.IGNORECASE)
        return ADDRESS.sub(lambda match: match[0] if match[0].startswith(("127.", "0.0.0.0")) else "IP", text)

    def value(self, value: Any) -> Any:
        """Any JSON value with every string in it redacted, names of keys too."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return value


def _name(text: str) -> str:
    return text.partition(".")[0].lower()


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user id without a name
        return ""
