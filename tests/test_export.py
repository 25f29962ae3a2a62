"""A finished LoRA run as one model folder, with its card."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_recipes import GRPO, LORA, SFT, greedy, policy, run, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlpost.errors import DiskError, Interrupted, ModelError
from rlpost.inference import merge
from rlpost.inference.card import Written, card
from rlpost.inference.merge import about, merge_checkpoint
from rlpost.inference.provenance import licence_of, provenance
from rlpost.inference.sample import sample
from rlpost.policy.check import probe_groups
from rlpost.policy.score import logprobs
from rlpost.recipe.sampling import sampling_from

GREEDY = sampling_from(greedy=True, max_new_tokens=5)
EVALUATION = {
    "data": {"held_out": {"task": {"fn": "addition.held_out"}, "limit": 10}},
    "rewards": [{"fn": "rewards.py:digits"}],
    "sampling": {"max_new_tokens": 4},
    "samples": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a finished run of two stages on one LoRA."""
    made = tmp_path_factory.mktemp("export")
    run(made, {"sft": {**SFT, "steps": 8}, "grpo": {**GRPO, "steps": 1}}, LORA, evaluation=EVALUATION)
    return made


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """The run, merged."""
    out = folder / "whole"
    assert merge_checkpoint(str(folder / "runs/run"), str(out)) == str(out)
    return out


def test_a_merged_folder_is_the_adapter_on_its_base(folder, whole):
    adapter, merged = policy(folder / "runs/run/grpo/final"), policy(whole)
    assert adapter.has_adapter
    assert not merged.has_adapter
    groups = probe_groups(adapter.vocabulary, adapter.max_positions)
    torch.testing.assert_close(logprobs(merged, groups), logprobs(adapter, groups), rtol=0, atol=1e-5)
    base = policy(folder / "runs/run/base")
    assert (logprobs(merged, groups) - logprobs(base, groups)).abs().max() > 0.1
    assert not list(folder.glob("*.tmp-*"))


def test_transformers_alone_reads_the_folder_and_stops_at_the_trained_end(folder, whole):
    model = AutoModelForCausalLM.from_pretrained(whole, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(whole)
    ids = tokenizer("12+34=", return_tensors="pt", return_token_type_ids=False)
    made = model.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert [tokenizer.decode(made, skip_special_tokens=True)] == greedy(policy(whole), "12+34=")
    assert model.generation_config.eos_token_id == policy(whole).end_ids[0]


@pytest.fixture(scope="module")
def turns(folder) -> Path:
    """A base whose template ends turns with a token of its own, which its generation configuration leaves out."""
    base = folder / "turns"
    shutil.copytree(folder / "runs/run/base", base, ignore=shutil.ignore_patterns("MANIFEST.json", "checkpoint.json"))
    turn = "{{ '1' if m.role == 'user' else '2' }}{{ m.content }}+"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}2{{% endif %}}"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["+"]})
    tokenizer.save_pretrained(base)
    AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(base)
    config = json.loads((base / "generation_config.json").read_text("utf-8"))
    assert config["eos_token_id"] == tokenizer.eos_token_id
    return base


@pytest.mark.parametrize("overrides", [[LORA], []], ids=["adapter", "whole"])
def test_every_trained_end_is_named_and_the_cards_code_stops_there(folder, turns, tmp_path, capsys, overrides):
    model = {"path": str(turns), "precision": "float32"}
    final = run(tmp_path, {"sft": {**SFT, "steps": 2, "learning_rate": 1e-3}}, *overrides, model=model)
    merge_checkpoint(str(final), str(tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(final)
    trained = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("+")}
    for each in (final, tmp_path / "out"):
        assert set(json.loads((each / "generation_config.json").read_text("utf-8"))["eos_token_id"]) == trained
    assert (tmp_path / "out/chat_template.jinja").is_file()
    assert {w.dtype for w in weights(tmp_path / "out").values()} == {torch.bfloat16 if overrides else torch.float32}
    written = Written.adapter if overrides else Written.merged
    text = card(final, about(policy(final), written, "float32"), str(final))
    (code,) = re.findall(r"(?s)```python\n(.*?)```", text)
    code = code.replace("…", "3=").replace("max_new_tokens=256", "max_new_tokens=5, do_sample=False")
    names: dict[str, Any] = {}
    capsys.readouterr()
    exec(code, names)
    assert set(names["model"].generation_config.eos_token_id) == trained
    assert [capsys.readouterr().out.removesuffix("\n")] == sample(str(final), "3=", sampling=GREEDY)


def test_weights_have_the_precision_of_the_base_or_the_one_asked_for(folder, whole, tmp_path):
    assert {w.dtype for w in weights(whole).values()} == {torch.float32}
    merge_checkpoint(str(folder / "runs/run"), str(tmp_path / "half"), "bfloat16")
    assert {w.dtype for w in weights(tmp_path / "half").values()} == {torch.bfloat16}
    command = merge_checkpoint(str(tmp_path / "half"), str(tmp_path / "again"), gguf=True)
    assert {w.dtype for w in weights(tmp_path / "again").values()} == {torch.bfloat16}
    assert command.startswith(f"python llama.cpp/convert_hf_to_gguf.py {tmp_path}/again --outfile ")
    assert command.endswith("--outtype bf16")


def test_a_model_that_is_not_the_checkpoint_is_refused(folder, tmp_path, monkeypatch):
    """Weights that are written without the adapter."""
    monkeypatch.setattr(merge, "proven_merge", lambda bare, loaded, _: loaded.unload())
    with pytest.raises(ModelError, match="log-probabilities are off by"):
        merge_checkpoint(str(folder / "runs/run"), str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Interrupted)])
def test_a_signal_leaves_nothing_half_written(folder, tmp_path, monkeypatch, number, error):
    monkeypatch.setattr(merge, "save_policy", lambda *_: os.kill(os.getpid(), number))
    with pytest.raises(error):
        merge_checkpoint(str(folder / "runs/run"), str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_nothing_is_fetched(folder, tmp_path):
    with pytest.raises(DiskError, match="exists already"):
        merge_checkpoint(str(folder / "runs/run"), str(tmp_path))
    with pytest.raises(ModelError, match="hf download owner/model --local-dir"):
        merge_checkpoint("owner/model", str(tmp_path / "out"))


def test_the_card_tells_what_the_run_knows(folder, whole):
    text = (whole / "README.md").read_text("utf-8")
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "A llama model that began as a llama with random weights, trained by sft → grpo with LoRA (r=4" in text
    assert "ends with `<eos>`" in text
    assert "| stage | greedy |\n| --- | --- |\n| base | " in text
    assert "| grpo | grpo | 1 |" in text
    assert (
        "Held-out accuracy in %, by `rewards.py:digits`, with 95 % interval: 10 prompts (task addition.held_out)."
        in text
    )
    assert "sampled answers" not in text
    assert "no base model's licence binds it" in text
    assert "license:" not in text
    assert str(folder) not in text


def test_the_card_names_no_result_of_later_stages(folder):
    known = provenance(folder / "runs/run/sft/final")
    assert list(known.stages) == ["sft"]
    assert list(known.results) == ["base", "sft"]


@pytest.mark.parametrize(
    ("file", "text", "licence"),
    [
        ("README.md", "---\nlicense: apache-2.0\n---\n# A model\n", "apache-2.0"),
        ("README.md", "# A model\n", "unknown"),
        ("README.md", "---\nlicense: [\n---\n", "unknown"),
        ("LICENSE.txt", "You may.", "see LICENSE"),
    ],
)
def test_the_licence_is_that_of_the_base(tmp_path, file, text, licence):
    (tmp_path / file).write_text(text, "utf-8")
    assert licence_of(str(tmp_path)) == licence
