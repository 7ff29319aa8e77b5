"""Training a soft prompt by SFT: peft makes and initialises the encoder and writes what is published, the prompt acts at the trunk (`prompt`).

So a loss, a metric or a sampler sees the positions of the text and nothing else; peft's own forward returns logits of the virtual tokens too,
gives padded prompts on the left other positions than when they are alone, and can't go on from a save (`load_adapter` refuses what is trained,
and the network that P-tuning and prefix projection train is not in it).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModelForCausalLM
from torch import Tensor, nn

from configs.errors import UserError
from stages.attention import computed_anywhere
from stages.soft.folder import ENCODER, KINDS, opened
from stages.soft.prompt import Shape, SoftPrompt, put_at, room
from stages.soft.settings import METHODS, peft_config

if TYPE_CHECKING:
    from stages.models import Origin

TOLERANCE = 1e-3  # of the largest logit
ROWS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3]]  # ids, taken modulo the vocabulary


class SoftPeftModel(PeftModelForCausalLM):
    """peft's model of a soft prompt, whose forward is the base model's: the prompt acts through hooks at the trunk."""

    def __init__(self, model: Any, config: Any) -> None:
        super().__init__(model, config)
        self.inner = (model,)
        self.prompt = (SoftPrompt(_shape(config), encode=partial(_encoded, self.encoder)),)  # in a tuple, lest it become a second child
        put_at(model, self.prompt[0])

    @property
    def encoder(self) -> nn.Module:
        """What is trained: a table of vectors, or the network that makes them."""
        return self.prompt_encoder[self.active_adapter]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base model returns, at the positions of the text."""
        return self.inner[0](*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's, which knows of no prompt and has one."""
        return self.inner[0].generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """The base model's."""
        return self.inner[0].prepare_inputs_for_generation(*args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is what it was before it was tuned."""
        with self.prompt[0].off():
            yield

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """What peft writes, and beside it ENCODER, which a run goes on from."""
        from safetensors.torch import save_file

        was_training = self.encoder.training
        self.encoder.eval()
        try:
            with torch.no_grad():
                super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.encoder.train(was_training)
        if kwargs.get("is_main_process", True):
            save_file({name: value.detach().cpu().contiguous() for name, value in self.encoder.state_dict().items()}, Path(save_directory) / ENCODER)

    def load_adapter(self, model_id: Any, adapter_name: str, is_trainable: bool = True, **kwargs: Any) -> Any:  # type: ignore[override]
        """Go on from a save of this model."""
        from safetensors.torch import load_file

        return self.encoder.load_state_dict(load_file(Path(model_id) / ENCODER))


def start(model: Any, cfg: Any, tokenizer_folder: str) -> Any:
    """What SFT trains: a model with a soft prompt where `tune.method` is one, else the model itself. See `tuned`."""
    if cfg.technique.method not in METHODS:
        return model
    if getattr(cfg.train, "neftune_alpha", None) is not None and not hasattr(model, "model"):  # where transformers looks for them under peft
        raise UserError(f"train.neftune_alpha with tune.method {cfg.technique.method}: the embeddings of {type(model).__name__} are not found under a soft prompt; leave it out")
    return tuned(model, cfg.technique, tokenizer_folder=tokenizer_folder, seed=cfg.seed)


def tuned(model: Any, tune: Any, *, tokenizer_folder: str, seed: int) -> SoftPeftModel:
    """A causal model whose soft prompt alone is trained. `tune` is a section of method prompt_tuning, prefix_tuning or p_tuning.

    `tokenizer_folder`: where the model's tokenizer lies (init_text is read with it).

    Raises:
        UserError: more virtual tokens than the model has positions, an architecture that soft prompts don't work on, a model that has one already.
    """
    limit = room(model)
    if limit is not None and tune.virtual_tokens >= limit:
        raise UserError(f"tune.virtual_tokens {tune.virtual_tokens}: {type(model).__name__} has {limit} positions, and text needs some of them; give fewer")
    torch.manual_seed(seed)
    try:
        made = SoftPeftModel(model, peft_config(tune, tokenizer_folder))
    except (ValueError, KeyError, AttributeError, NotImplementedError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"tune.method {tune.method}: peft can't make it for {type(model).__name__} ({error}); use lora") from error
    config: Any = made.peft_config[made.active_adapter]
    if getattr(config, "prompt_tuning_init", None) is not None:  # done, and no text goes into what is published
        config.prompt_tuning_init, config.prompt_tuning_init_text, config.tokenizer_name_or_path = "RANDOM", None, None
    prove(made)
    return made


def trained_on(model: Any, origin: Origin, cfg: Any) -> SoftPeftModel:
    """The prompt of `origin` on what lies under it (`model`), to be trained on: at first it is that prompt to the bit.

    A folder holds vectors and no network that made them, so those of P-tuning go on as prompt_tuning, which acts alike, and projected prefixes plainly.

    Raises:
        UserError: a config that would train another prompt than the folder's.
    """
    tune = cfg.technique
    shape, vectors, _ = opened(model, origin.folder)
    wanted = "prefix_tuning" if shape.is_prefix else "prompt_tuning"
    if tune.method != wanted or getattr(tune, "prefix_projection", False) or tune.virtual_tokens != shape.length:
        raise UserError(
            f"tune.method {tune.method}: {origin.asked} holds {shape.length} trained vectors ({shape.method}) and no network that made them; to train them on set tune: "
            f"{{method: {wanted}, virtual_tokens: {shape.length}}}" + (" (prefix_projection: false)" if shape.is_prefix else "")
        )
    made: SoftPeftModel = start(model, cfg, origin.folder)
    weight: Any = made.encoder.embedding.weight  # type: ignore[union-attr]
    if weight.shape != vectors.shape:
        raise UserError(f"{origin.asked}: its vectors are {list(vectors.shape)}, and peft would train {list(weight.shape)} for {type(model).__name__}; train a new prompt")
    with torch.no_grad():
        weight.copy_(vectors)
    return made


def _shape(config: Any) -> Shape:
    layers = (config.num_layers, config.num_attention_heads) if config.peft_type == "PREFIX_TUNING" else ()
    return Shape(KINDS[str(getattr(config.peft_type, "value", config.peft_type))], config.num_virtual_tokens, config.token_dim, *layers)


def _encoded(encoder: nn.Module) -> Tensor:
    """[n, columns] with gradients."""
    weight: Any = encoder.embedding.weight  # type: ignore[union-attr]
    return encoder(torch.arange(len(weight), device=weight.device).unsqueeze(0))[0]


@torch.no_grad()
def prove(model: SoftPeftModel) -> None:
    """Compare our forward with peft's own on two rows, one padded on the right, and with each alone.

    Raises:
        UserError: they differ, or one fails: the architecture does something that soft prompts don't go with.
    """
    was_training, device = model.training, next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    rows = [[token % vocabulary for token in row] for row in ROWS]
    ids = torch.tensor([row + [0] * (len(ROWS[0]) - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (len(ROWS[0]) - len(row)) for row in rows], device=device)
    model.eval()
    try:
        with computed_anywhere(model):
            ours = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            alone = model(input_ids=ids[1:, : len(rows[1])], use_cache=False).logits
            with model.prompt[0].off():
                theirs = PeftModelForCausalLM.forward(model, input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :]
    except Exception as error:  # whatever an architecture raises
        raise UserError(f"tune.method: soft prompts don't work with {type(model.base_model).__name__} ({type(error).__name__}: {error}); use lora") from error
    finally:
        model.train(was_training)
    real = mask.bool()
    gap = max(float((ours - theirs)[real].abs().max()), float((ours[1:, : len(rows[1])] - alone).abs().max()))
    if not gap <= TOLERANCE * max(1.0, float(theirs[real].abs().max())):
        raise UserError(f"tune.method: with {type(model.base_model).__name__} the logits are {gap:.3g} away from those that peft computes; use lora")
