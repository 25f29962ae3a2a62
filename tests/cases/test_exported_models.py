"""What a stage leaves: it stops where training did, in transformers too, and its run can be moved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from tiny_world import byte_tokenizer, rlpost, save_model, save_recipe, save_rows, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlpost.policy.load import load_policy
from rlpost.policy.params import Lora, Model
from rlpost.run.lookup import parent_of

HI = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
END, TURN = 256, 258
"""The tokenizer's end token, and the one that ends a turn of the template."""


def train(here: Path, model: dict[str, Any], steps: int = 50) -> None:
    rows = save_rows(here / "rows.jsonl", [HI] * 4)
    stage = {"kind": "sft", "data": {"c": {"path": str(rows)}}, "steps": steps, "batch_size": 4}
    stage |= {"learning_rate": 1e-2, "schedule": "constant"}
    path = save_recipe(here / "r.yaml", {"model": {"precision": "float32", **model}, "stages": {"sft": stage}})
    assert rlpost("train", path).code == 0


def base(here: Path) -> Path:
    made = tiny_model(eos_token_id=END)
    made.generation_config.eos_token_id = END
    return save_model(here / "m", made, byte_tokenizer(eos="<|endoftext|>"))


@pytest.mark.parametrize("lora", [None, {"r": 8, "alpha": 32}], ids=["full", "lora"])
def test_it_stops_in_transformers_where_training_did(
    here: Path, tally: Callable[..., None], lora: dict[str, Any] | None
) -> None:
    model = base(here)
    train(here, {"path": str(model), "lora": lora})
    final = here / "runs/r/sft/final"
    tokenizer = AutoTokenizer.from_pretrained(final)
    if lora is None:
        made = AutoModelForCausalLM.from_pretrained(final)
    else:
        made = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), final)
        made.generation_config = GenerationConfig.from_pretrained(final)
    assert made.generation_config.eos_token_id == [END, TURN]
    text = tokenizer.apply_chat_template(HI["messages"][:1], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    out = made.generate(**ids, max_new_tokens=20, do_sample=False)[0][ids["input_ids"].shape[1] :]
    assert tokenizer.decode(out).strip() == "yo<|im_end|>"
    again = load_policy(final, Model(lora=Lora(r=8, alpha=32.0) if lora else None))
    assert again.end_ids == (END, TURN)
    assert again.tokenizer.eos_token_id == END
    tally("exported models stop", right=1)


def test_a_merged_adapter_stops_too(here: Path) -> None:
    train(here, {"path": str(base(here)), "lora": {"r": 4}}, steps=1)
    (here / "runs/r").rename(here / "runs/first")
    train(here, {"path": "runs/first/sft/final"}, steps=1)
    assert GenerationConfig.from_pretrained(here / "runs/r/sft/final").eos_token_id == [END, TURN]
    assert "adapter_config.json" not in {x.name for x in (here / "runs/r/sft/final").iterdir()}


SCRATCH = {
    "config": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "tokenizer": {"kind": "characters", "alphabet": "hiyo"},
    "lora": {"r": 4},
}


def test_a_moved_run_of_adapters_goes_on(
    here: Path, tally: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its base lies in the run, and is found there wherever the run lies."""
    rows = save_rows(here / "rows.jsonl", [{"prompt": "hi", "completion": "yo"}] * 4)
    stage = {"kind": "sft", "data": {"c": {"path": str(rows)}}, "steps": 1, "batch_size": 4, "learning_rate": 1e-3}
    assert rlpost("train", save_recipe(here / "r.yaml", {"model": SCRATCH, "stages": {"sft": stage}})).code == 0
    (here / "elsewhere").mkdir()
    shutil.move(here / "runs/r", here / "elsewhere/moved")
    monkeypatch.chdir(here / "elsewhere")
    assert load_policy("moved/sft/final", Model(lora=Lora(r=4))).base == str(here / "elsewhere/moved/base")
    assert parent_of(Path("moved/sft/final")) == here / "elsewhere/moved/base"
    assert rlpost("sample", "moved", "hi").code == 0
    on = {"model": {"path": "moved/sft", "lora": {"r": 4}}, "stages": {"more": stage}}
    assert rlpost("train", save_recipe(here / "on.yaml", on)).code == 0
    about = json.loads((here / "elsewhere/runs/on/more/final/checkpoint.json").read_text())
    assert about["base"] == str(here / "elsewhere/moved/base")
    tally("moved runs", right=1)


def test_a_run_from_a_local_model_can_be_moved_and_used_from_anywhere(
    here: Path, tally: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    base(here)
    train(here, {"path": "m", "lora": {"r": 4}}, steps=1)
    shutil.move(here / "runs/r", here / "moved")
    (here / "below").mkdir()
    monkeypatch.chdir(here / "below")
    assert load_policy("../moved/sft/final", Model(lora=Lora(r=4))).base == str(here / "m")
    named = json.loads((here / "moved/sft/final/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(here / "m")  # for peft, which looks from where it runs
    tally("moved runs", right=1)
