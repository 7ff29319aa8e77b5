"""The schema of every config, as pydantic models."""

from configs.schema.chain import Chain, Prepare
from configs.schema.common import Lora, Source, Split, StageConfig, Strict, Train
from configs.schema.engines import VLLM, RolloutEngine
from configs.schema.evaluation import EvalConfig, EvalSettings
from configs.schema.guard import Guard
from configs.schema.health import Health
from configs.schema.monitoring import Evaluation, Stopping
from configs.schema.ppo import PTX, AdaptiveKL, PPOStage, PPOTrain, Sampling
from configs.schema.scorers import ScorerSpec
from configs.schema.supervised import DPOStage, RewardStage, SFTStage, TRLStage

__all__ = [
    "PTX", "VLLM", "AdaptiveKL", "Chain", "DPOStage", "EvalConfig", "EvalSettings", "Evaluation", "Guard", "Health", "Lora", "PPOStage", "PPOTrain",
    "Prepare", "RewardStage", "RolloutEngine", "SFTStage", "Sampling", "ScorerSpec", "Source", "Split", "StageConfig", "Stopping", "Strict",
    "TRLStage", "Train",
]  # fmt: skip
