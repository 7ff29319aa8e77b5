"""SFT, reward model and DPO under ZeRO-1, 2 and 3 with two processes give what one process gives: in full and with adapters.

One run of everything in this process, then one real `accelerate launch` per ZeRO stage with the machine file that ships.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.registry import Registry
from tests.launch.zero_worker import TRAIN, cases, extras, prepare
from tests.stage.runs import ENVIRONMENT, ROOT

TOLERANCE = 1e-4  # relative, fp32
# `stopped` trains at a rate at which rounding is amplified in every step; bf16 rounds at the third digit, and Accelerate's bf16 on one process is another one (autocast).
LOOSE = {"stopped": 1e-3, "bf16": 5e-2, "bf16-lora": 5e-2}
MATRIX = [(zero, case) for zero in (1, 2, 3) for case in cases(Path(), f"zero{zero}") if zero == 3 or case not in extras(Path(), "")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = prepare(tmp_path_factory.mktemp("zero"))
    one = subprocess.run([sys.executable, "-m", "tests.launch.zero_worker", str(folder), "one"], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert one.returncode == 0, one.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def launched(place):
    """Runs the worker under a ZeRO stage once, when its first case is asked for."""
    done: set[int] = set()

    def launch(zero: int) -> None:
        if zero in done:
            return
        machine = ["--config_file", str(ROOT / f"configs/accelerate/cpu_zero{zero}.yaml"), "--main_process_port", "0"]
        command = [sys.executable, "-m", "accelerate.commands.launch", *machine, "-m", "tests.launch.zero_worker", str(place), f"zero{zero}"]
        ended = subprocess.run(command, env=ENVIRONMENT | {"TOKENIZERS_PARALLELISM": "false"}, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert ended.returncode == 0, ended.stderr[-5000:]
        done.add(zero)

    return launch


def results(place: Path, case: str, label: str):
    """(lines of metrics.jsonl, published checkpoint) of a case."""
    stage, values = cases(place, label)[case]
    lines = [json.loads(line) for line in (Path(values["output"]) / "metrics.jsonl").read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if key != "evaluation/seconds"} for line in lines]
    return lines, Registry(place / "registry").resolve(f"{stage}/{values['name']}")


def tensors(checkpoint):
    from safetensors.torch import load_file

    return load_file(next(checkpoint.model_dir.glob("*.safetensors")))


@pytest.mark.parametrize(("zero", "case"), MATRIX)
def test_two_processes_equal_one(place, launched, zero, case):
    """Losses, gradient norms, evaluations, published weights, and what a reward model's scores come to."""
    launched(zero)
    tolerance = LOOSE.get(case, TOLERANCE)
    (one, expected), (two, found) = (results(place, case, label) for label in ("one", f"zero{zero}"))
    assert len(one) == len(two)
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        assert first.get("evaluation/written") != -1.0, "something was written"
        for key in first.keys() if tolerance == TOLERANCE else {k for k in first if k.endswith("loss")}:
            assert second[key] == pytest.approx(first[key], rel=tolerance, abs=1e-6), key
    mine, theirs = tensors(expected), tensors(found)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items() if not case.startswith("bf16") else ():
        assert (theirs[name] - tensor).norm() <= tolerance * tensor.norm() + 1e-9, name
    facts = [{k: v for k, v in {**c.info("metrics"), **c.info("stage_info")}.items() if isinstance(v, float)} for c in (expected, found)]
    assert facts[1] == pytest.approx(facts[0], rel=tolerance, abs=1e-5 if tolerance == TOLERANCE else 5e-2)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_engine_is_told_what_the_stage_decides_and_splits_what_it_should(place, launched, zero):
    launched(zero)
    seen = json.loads((place / f"facts-zero{zero}.json").read_text())
    for case, facts in seen.items():
        assert (facts["stage"], facts["clipping"], facts["micro_batch"], facts["accumulation"]) == (zero, TRAIN["max_grad_norm"], 2, 2), case
        if zero == 3 and not case.startswith("grown"):
            assert facts["held"] == facts["whole"] / 2, f"{case}: parameters are not split over the processes"
            assert facts["loaded"] <= 0.55 * facts["whole"], f"{case}: a process held the whole model when it had been loaded"


def test_what_zero_3_publishes_loads_with_plain_from_pretrained(place, launched):
    """Logits of the consolidated weights, and of base and adapter, equal those of the run on one process; bf16 is published in 16 bit."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    launched(3)
    ids = torch.arange(20)[None]
    for case in ("sft-full", "grown-dpo", "sft-lora", "grown-sft"):
        logits = []
        for label in ("one", "zero3"):
            folder = results(place, case, label)[1].model_dir
            model = AutoModelForCausalLM.from_pretrained(folder) if case in ("sft-full", "grown-dpo") else None
            if model is None:
                base = AutoModelForCausalLM.from_pretrained(place / ("grown" if case == "grown-sft" else "base"))
                base.resize_token_embeddings(259)
                model = PeftModel.from_pretrained(base, folder)
            logits.append(model.eval()(ids).logits)
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4, msg=lambda text, case=case: f"{case}: {text}")
    assert {tensor.dtype for case in ("bf16", "bf16-lora") for tensor in tensors(results(place, case, "zero3")[1]).values()} == {torch.bfloat16}


def test_what_was_frozen_in_a_base_in_16_bits_is_published_as_it_was(place, launched):
    """ZeRO-3 gives the whole tensors in float32."""
    launched(3)
    for label in ("one", "zero3"):
        found = tensors(results(place, "frozen", label)[1])
        frozen = {name for name in found if "layers.0." in name or "embed_tokens" in name}
        assert {name for name, tensor in found.items() if tensor.dtype == torch.bfloat16} == frozen


def test_a_model_that_grew_publishes_its_embeddings_with_the_adapter(place, launched):
    launched(3)
    found = tensors(results(place, "grown-sft", "zero3")[1])
    assert {name for name in found if "lora" not in name} == {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}
    assert all(found[name].shape == (259, 32) for name in found if "lora" not in name)


def test_early_stopping_publishes_the_best_state(place, launched):
    launched(3)
    lines, checkpoint = results(place, "stopped", "zero3")
    losses = [line["sft/eval_loss"] for line in lines if "sft/eval_loss" in line]
    assert 2 < len(losses) < 10, "it stopped before the end, and not at once"
    assert checkpoint.info("metrics")["loss"] == pytest.approx(min(losses), rel=1e-6)


def test_training_on_compares_the_same_before_and_after(place, launched):
    """Before there is an engine, the weights are gathered for completions and for labels too."""
    launched(3)
    one, two = (results(place, "on", label)[1].info("continued")["sets"] for label in ("one", "zero3"))
    assert [found["name"].partition("@")[0].replace("-one", "-zero3") for found in one] == [found["name"].partition("@")[0] for found in two]
    for mine, theirs in zip(one, two, strict=True):
        for when in ("before", "after"):
            assert theirs["loss"][when] == pytest.approx(mine["loss"][when], rel=TOLERANCE)
            for name in ("written", "accuracy"):
                assert theirs["metrics"][name][when] == pytest.approx(mine["metrics"][name][when], rel=TOLERANCE), name
            assert mine["metrics"]["written"][when] != -1.0, "something was written"


def test_an_engine_without_a_compiler_trains_over_gloo(place, tmp_path):
    """Nothing on the PATH, and nothing compiled before."""
    from tests.stage.runs import settings

    (tmp_path / "bin").mkdir()
    config = tmp_path / "sft.json"
    config.write_text(json.dumps(settings(place, "sft", {"max_steps": 1}, name="bare", output=str(tmp_path / "out"))))
    machine = ["--config_file", str(ROOT / "configs/accelerate/cpu_zero2.yaml"), "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *machine, "-m", "stages.sft", "--config", str(config)]
    bare = ENVIRONMENT | {"PATH": str(tmp_path / "bin"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "CXX": "no-such-compiler"}
    done = subprocess.run(command, env=bare, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "there is no no-such-compiler" in done.stdout
    assert "published sft/bare@1" in done.stdout
    assert not os.path.exists(tmp_path / "extensions")
