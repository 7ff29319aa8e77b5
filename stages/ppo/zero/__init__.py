"""PPO where DeepSpeed ZeRO splits the optimizer, the gradients and (stage 3) the weights over the processes."""
