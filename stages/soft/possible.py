"""What can't be done with a soft prompt, said before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from configs.splitting import PROMPT_IS_SPLIT
from stages.soft.folder import is_prompt, method_of
from stages.soft.settings import METHODS

if TYPE_CHECKING:
    from stages.models import Origin


def check(cfg: Any, *origins: Origin) -> None:
    """Make sure that a stage can train a soft prompt, or under those of `origins` (what it starts from, the first is `init_from`).

    Raises:
        UserError: naming the setting that does not go with it.
    """
    technique = getattr(getattr(cfg, "technique", None), "method", None)
    trained = technique if technique in METHODS else None
    stacked = {method_of(origin): origin for origin in origins if is_prompt(origin)}
    if not trained and not stacked:
        return
    method = trained or next(iter(stacked))
    what = f"tune.method {trained}" if trained else f"{stacked[method].asked} has a soft prompt ({method}) in front, and with one"
    goes_on = getattr(getattr(cfg, "continued", None), "adapter", None) == "same"  # the very prompt is trained on
    if trained and is_prompt(origins[0]) and not goes_on:
        raise UserError(
            f"tune.method {trained}: {origins[0].asked} has a soft prompt ({method_of(origins[0])}) already, and two can't be stacked; start from the model under it, "
            "or train on with method full or lora"
        )
    if problem := next(filter(None, _problems(cfg, {trained, *stacked})), None):
        raise UserError(f"{what}: {problem}")


def _problems(cfg: Any, methods: set[str | None]) -> list[str | None]:
    from stages.zero.machine import zero_stage

    engine: Any = getattr(cfg, "engine", None)
    kind = getattr(engine, "kind", "native")
    packed = getattr(cfg, "packing", False) or getattr(cfg, "trainer", {}).get("padding_free")
    checkpointing = cfg.train.gradient_checkpointing and "prefix_tuning" in methods
    return [
        "rows that are packed into one sequence would share one prompt; set packing: false" if packed else None,
        f"engine.kind {kind} samples without the prompt; use engine.kind native or generate" if kind in ("vllm", "continuous") else None,
        "engine.static_cache has no room for the prompt; set it to false" if kind == "generate" and engine.static_cache else None,
        "train.gradient_checkpointing recomputes layers without the cache that a prefix lies in; set it to false, or use prompt_tuning or p_tuning" if checkpointing else None,
        PROMPT_IS_SPLIT if zero_stage() == 3 else None,
    ]


def refuse_merge(origin: Origin) -> None:
    """Raise where a model can't become plain weights."""
    if is_prompt(origin):
        raise UserError(
            f"--merge: {origin.asked} has a soft prompt ({method_of(origin)}) in front, which can't be merged into weights; leave --merge out: the exported folder is the "
            "prompt as peft reads it, with the weights under it in `base` where they are its own"
        )
