"""python -m stages.ppo --config FILE, also under accelerate launch."""

from stages.ppo.train import main
from stages.training.entry import run

if __name__ == "__main__":
    run(main, "ppo")
