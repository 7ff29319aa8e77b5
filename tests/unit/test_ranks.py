"""What the process group of a run is made with."""

from __future__ import annotations

from datetime import timedelta

import pytest

from stages.training import ranks


@pytest.mark.parametrize("gpus", [False, True])
def test_the_others_wait_for_one_that_publishes_longer_than_nccl_would(monkeypatch, gpus):
    """On its own NCCL ends a run after 10 minutes in one collective; rank 0 may write a large model for longer."""
    import accelerate
    import torch

    asked: dict = {}
    monkeypatch.setattr(accelerate, "PartialState", lambda **keywords: asked.update(keywords))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    ranks.process_group()
    assert asked["cpu"] is not gpus
    assert asked["timeout"] >= timedelta(hours=1)
