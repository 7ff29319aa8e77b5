"""The schema of every config, as pydantic models."""

from configs.schema.chain import Chain, Prepare
from configs.schema.common import Lora, Source, Split, StageConfig, Strict, Train
from configs.schema.engines import VLLM, RolloutEngine
from configs.schema.evaluation import EvalConfig, EvalSettings
from configs.schema.guard import Guard
from configs.schema.health import Health, SFTHealth
from configs.schema.monitoring import Evaluation, Stopping
from configs.schema.ppo import PTX, AdaptiveKL, PPOStage, PPOTrain, Sampling
from configs.schema.rehearsal import Rehearsal
from configs.schema.scorers import ScorerSpec
from configs.schema.supervised import DPOStage, RewardStage, SFTStage, SFTTrain, TRLStage
from configs.schema.tuning import (
    IA3,
    Freeze,
    Full,
    LoraTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    QLoraTuning,
    Technique,
    freezes_base,
    lora_of,
    technique_of,
)
from configs.schema.validation import Validation

__all__ = [
    "IA3", "PTX", "VLLM", "AdaptiveKL", "Chain", "DPOStage", "EvalConfig", "EvalSettings", "Evaluation", "Freeze", "Full", "Guard", "Health", "Lora",
    "LoraTuning", "PPOStage", "PPOTrain", "PTuning", "PrefixTuning", "Prepare", "PromptTuning", "QLoraTuning", "Rehearsal", "RewardStage", "RolloutEngine", "SFTHealth", "SFTStage",
    "SFTTrain", "Sampling", "ScorerSpec", "Source", "Split", "StageConfig", "Stopping", "Strict", "TRLStage", "Technique", "Train", "Validation", "freezes_base", "lora_of",
    "technique_of",
]  # fmt: skip
