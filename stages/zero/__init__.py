"""What the stages share where DeepSpeed ZeRO splits a model over processes: its config, gathering, saves, and how a process leaves."""
