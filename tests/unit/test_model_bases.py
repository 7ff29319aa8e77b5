"""Models whose weights are loaded though no config names them: the bases under adapters."""

from __future__ import annotations

from types import SimpleNamespace

from stages import models


def test_the_base_under_an_adapter_is_among_what_is_fetched(tmp_path, monkeypatch):
    """Each process downloaded a hub's model under a published adapter for itself: only the names of the config were fetched once per node."""
    from stages.training import ready

    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/somemodel", "peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    adapter = models.Origin(str(tmp_path), None, None)
    assert [origin.asked for origin in models.with_bases(adapter)] == [str(tmp_path), "somebody/somemodel"]
    asked: list[str] = []
    monkeypatch.setattr(ready, "from_rank_0", lambda *_: None)
    monkeypatch.setattr(ready.agree, "check_shared", lambda _: None)
    monkeypatch.setattr(ready, "fetch", asked.extend)
    ready.check(SimpleNamespace(registry=tmp_path, output=tmp_path, name="x"), "sft", adapter)
    assert asked == [str(tmp_path), "somebody/somemodel"]
