"""Offline state: what may be fetched from the Hugging Face hub, and what is cached already. Asks the hub nothing."""

from __future__ import annotations

import os
from pathlib import Path

from launch.doctor.check import Findings, Settings

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
SHOWN = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_DISABLE_TELEMETRY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
TRUE = ("1", "ON", "YES", "TRUE")


def check_hub(_: Settings) -> Findings:
    """Offline or not, the cache, whether there is a token (never which)."""
    found = Findings()
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    offline = [name for name in OFFLINE if os.environ.get(name, "").upper() in TRUE]
    token = bool(os.environ.get("HF_TOKEN")) or Path(os.environ.get("HF_TOKEN_PATH") or home / "token").is_file()
    try:
        names = sorted(os.listdir(cache)) if cache.is_dir() else []
    except OSError as error:
        found.warn(f"the cache {cache} cannot be read: {error.strerror}", "check its owner, or choose another with HF_HOME")
        names = []
    models, data = (sum(name.startswith(kind) for name in names) for kind in ("models--", "datasets--"))
    found.facts = {
        "offline": ", ".join(f"{name}={os.environ[name]}" for name in offline) or "no", "token": "present" if token else "none",
        "cache": str(cache), "cached models": models, "cached datasets": data, **{name: os.environ[name] for name in SHOWN if name in os.environ},
    }  # fmt: skip
    found.summary = f"{'offline' if offline else 'online'}, {models} model(s) and {data} data set(s) cached, {'a' if token else 'no'} token"
    if offline and "HF_HUB_OFFLINE" not in offline:
        found.warn(f"{offline[0]} is set and HF_HUB_OFFLINE is not", "set HF_HUB_OFFLINE=1: it holds for every library")
    return found
