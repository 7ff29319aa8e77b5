"""Schema of the engines that sample a rollout."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from configs.schema.common import PositiveInt, Strict


class VLLM(Strict):
    """Where vLLM runs, and what it may use."""

    mode: Literal["colocate", "server"] = Field(default="colocate", description="colocate: on the GPUs that train; server: a `vllm serve` of its own.")
    url: str | None = Field(default=None, description="server: its address, such as http://127.0.0.1:8000.")
    gpu_memory: float = Field(default=0.3, gt=0, le=1, description="colocate: share of each GPU's memory for vLLM's weights and cache.")
    sleep: bool = Field(default=True, description="colocate: give that memory back while the policy is updated.")
    requests: PositiveInt = Field(default=64, description="server: requests in flight at once.")

    @model_validator(mode="after")
    def _server_has_an_address(self) -> VLLM:
        if (self.mode == "server") != (self.url is not None):
            raise ValueError("engine.vllm.url is the server's address: give it with mode: server, and leave it out with mode: colocate")
        return self


class RolloutEngine(Strict):
    """What samples the completions, and how far the update trusts its log-probs."""

    kind: Literal["native", "generate", "continuous", "vllm"] = Field(
        default="native",
        description="native: our own loop, the same samples for any batch and number of processes; generate: transformers' generate; "
        "continuous: transformers' continuous batching; vllm: vLLM, weights sent after every update.",
    )
    importance_cap: float | None = Field(
        default=2.0, ge=1,
        description="Each token's policy loss is weighed by policy / engine probability, at most this; null weighs none. native is never weighed: it is the policy.",
    )  # fmt: skip
    old_logprobs: Literal["auto", "sampler", "forward"] = Field(
        default="auto",
        description="Log-probs that the update starts from. sampler: the engine's, where they are those of a training forward in every iteration, else that one's "
        "(compared over the rows of its first optimizer step, drawn anew each time, with kind native in fp32; over the whole rollout with the others); forward: one more "
        "forward pass over each rollout; auto: the sampler's with kind native in fp32, where both are one arithmetic, else forward.",
    )  # fmt: skip
    static_cache: bool = Field(default=False, description="generate: a key-value cache of fixed size instead of one that grows.")
    gather: Literal["rollout", "layer"] = Field(
        default="rollout",
        description="At ZeRO-3. rollout: the policy's weights are gathered once per rollout, whole on every GPU while it samples; layer: layer by layer for each token, "
        "all processes in step, for a policy that no GPU can hold (native only, many times slower).",
    )  # fmt: skip
    vllm: VLLM | None = Field(default=None, description="vllm: where it runs; null is colocated.")

    @model_validator(mode="after")
    def _settings_of_the_kind(self) -> RolloutEngine:
        if self.vllm is not None and self.kind != "vllm":
            raise ValueError(f"engine.vllm is read by kind: vllm only, and kind is {self.kind}; leave it out")
        if self.gather == "layer" and self.kind != "native":
            raise ValueError(f"engine.gather: layer is for kind: native only, and kind is {self.kind}; leave it out")
        if self.static_cache and self.kind != "generate":
            raise ValueError(f"engine.static_cache is read by kind: generate only, and kind is {self.kind}; leave it out")
        return self


def _as_engine(value: Any) -> Any:
    """Accept a bare name where an engine mapping is meant."""
    return {"kind": value} if isinstance(value, str) else value


EngineChoice = Annotated[RolloutEngine, BeforeValidator(_as_engine, json_schema_input_type=str | RolloutEngine)]
