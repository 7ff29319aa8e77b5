"""An export goes to the Hugging Face hub: only when told, with what would be sent shown before, and without the token ever being printed."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from stages.registry.exporting import CARD, SUMS, Exported, Options, export, is_adapter
from stages.registry.manifest import MODEL

if TYPE_CHECKING:
    from stages.registry.registry import Registry


@dataclass(frozen=True)
class Sending:
    """What a push sends, or would send. files: path -> bytes, None for those that are written on the way."""

    ref: str
    repo: str
    private: bool
    licence: str | None
    files: dict[str, int | None]
    url: str | None = None  # once it is there


def plan(registry: Registry, ref: str, repo: str, options: Options, *, private: bool) -> Sending:
    """What would be sent; neither the hub nor a token is needed. Raises UserError."""
    check_repo(repo)
    checkpoint = registry.resolve(ref)
    if options.merge and not is_adapter(checkpoint):
        raise UserError(f"--merge: {checkpoint.ref} is no adapter, its weights are whole; leave --merge out")
    files: dict[str, int | None] = {name.removeprefix(f"{MODEL}/"): entry["size"] for name, entry in checkpoint.manifest["files"].items()}
    if options.merge:
        files = {name: size for name, size in files.items() if not name.startswith("adapter_")} | {"config.json": None, "model.safetensors": None}
    return Sending(checkpoint.ref, repo, private, options.licence or checkpoint.info("licence"), {**files, CARD: None, SUMS: None})


def push(registry: Registry, ref: str, repo: str, options: Options, *, private: bool, say: Callable[[str], None] = lambda line: None) -> Sending:
    """Export a checkpoint to a folder for temporary files and upload that. Raises UserError: no licence, no network, no token, what the hub refuses."""
    planned = plan(registry, ref, repo, options, private=private)
    if planned.licence is None:
        raise UserError(f"{planned.ref} records no licence; say under which one it is published: --licence apache-2.0 (a model inherits obligations from its base and its data)")
    token = _token()
    with tempfile.TemporaryDirectory(prefix="align-push-") as place:
        done = export(registry, ref, Path(place) / "model", replace(options, name=repo), say)
        url = _upload(done, repo, private, token)
    return replace(planned, files=dict(done.files), url=url)


def check_repo(repo: str) -> None:
    """Raise UserError unless this is ORG/NAME as the hub writes it."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", repo) or ".." in repo or "--" in repo:
        raise UserError(f"{repo!r} is no name on the hub; expected ORG/NAME")


def _token() -> str:
    """The token of whoever is logged in. Raises UserError offline or without one."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be sent to the hub; unset it, or export to a folder and upload that from another machine: align registry export REF DIR")
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise UserError("no token for the hub: log in with `hf auth login`, or set HF_TOKEN to a token that may write")
    return token


def _upload(done: Exported, repo: str, private: bool, token: str) -> str:
    from huggingface_hub import HfApi

    try:
        api: Any = HfApi(token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=str(done.folder), commit_message=f"{done.checkpoint.ref} ({done.checkpoint.id})"))
    except Exception as error:  # which client the hub's library uses changes; and a traceback could show the token
        first = next((line for line in str(error).replace(token, "…").splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"pushing {done.checkpoint.ref} to {repo} failed: {first}. Nothing in the registry has changed; the same command tries again") from None
