"""`--continue` takes a checkpoint's config over, and none of the code that it names."""

from __future__ import annotations

from types import SimpleNamespace

from launch.continuing import _config_of


def parent(evaluation):
    config = {"name": "a", "max_length": 64, "evaluation": evaluation}
    return SimpleNamespace(ref="sft/a@1", info=lambda key: config if key == "config" else None)


def test_a_checkpoint_names_no_function_that_is_imported(capsys):
    own = {"metrics": ["rouge", {"kind": "python", "function": "os:system"}], "metric": "evaluation/system", "generate": {"rows": 8}}
    assert _config_of(parent(own), {}, "sft/a") == {"max_length": 64}
    assert "evaluation" not in _config_of(parent(own), {"evaluation": {"test": False}}, "sft/a")
    assert "measured by os:system; a checkpoint names no code to run here: give `evaluation:` in --config FILE" in capsys.readouterr().err


def test_metrics_of_ours_are_taken_over_and_a_file_that_gives_its_own_is_followed(capsys):
    plain = {"metrics": ["rouge"], "generate": {"rows": 8}}
    assert _config_of(parent(plain), {}, "sft/a") == {"max_length": 64, "evaluation": plain}
    own = {"metrics": [{"kind": "python", "function": "mine:score"}]}
    assert _config_of(parent(own), {"evaluation": own}, "sft/a")["evaluation"] == own
    assert capsys.readouterr().err == ""
