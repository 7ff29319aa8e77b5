"""What the stages that TRL trains share: arguments, data order, progress, health, resume, exact evaluation, publishing."""

import os
import warnings

# TRL reports usage to the hub when a trainer is built, unless this is set before.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# The stages print one line per log; the libraries' bars and advice would bury it. The person's own setting wins.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# TRL turns this argument on by default and reads it, so it must be given until TRL itself renames it.
warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing` is deprecated", category=FutureWarning)
