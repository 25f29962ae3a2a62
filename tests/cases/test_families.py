"""Every family is scored, sampled and adapted exactly, or refused: against the model alone."""

from __future__ import annotations

import pytest
import support
from tiny_world import LLAMA, byte_tokenizer, rlpost, save_model, save_recipe, save_rows, tiny_model

SAMPLE = (
    "llama",
    "phi3",
    "mixtral",
    "llama4_text",
    "deepseek_v3",
    "mamba",
    "rwkv",
    "minimax",
    "bloom",
    "bert",
    "xlm-roberta",
)
"""One of each kind, for every day; the whole table takes minutes."""


def found(family: str, tally) -> support.Verdict:
    verdict = support.judge(family)
    tally("model families", right=not verdict.wrong and not verdict.refused, refused=verdict.refused)
    assert verdict.wrong == []
    assert verdict.refused == (family in support.ENCODERS)
    return verdict


@pytest.mark.parametrize("family", SAMPLE)
def test_a_family_of_each_kind(family, tally):
    found(family, tally)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in support.FAMILIES if f not in SAMPLE])
def test_every_other_family(family, tally):
    found(family, tally)


def recipe(here, model: dict) -> None:
    save_rows(here / "rows.jsonl", [{"prompt": "a b c", "completion": f"d {i}"} for i in range(8)])
    stage = {
        "kind": "sft",
        "data": {"rows": {"path": "rows.jsonl"}},
        "steps": 2,
        "batch_size": 4,
        "learning_rate": 0.001,
        "max_length": 64,
    }
    save_recipe(
        here / "recipe.yaml", {"run": "r", "model": {**model, "precision": "float32"}, "stages": {"sft": stage}}
    )


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_from_scratch_is_refused_before_training(family, here, tally):
    save_model(here / "m")
    sizes = {k: v for k, v in LLAMA.items() if k.startswith(("hidden", "intermediate", "num_hidden", "num_att", "max"))}
    folder = save_model(here / "encoder", tiny_model(family, **sizes, pad_token_id=1))
    recipe(here, {"path": str(folder)})
    ran = rlpost("train", "recipe.yaml")
    assert ran.refused(4, "sees later tokens", "causal language model"), ran.err
    tally("models that look ahead", refused=1)


def test_experts_train_with_their_balance_loss(here, tally):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    tokenizer = byte_tokenizer()
    folder = save_model(here / "m", tiny_model("mixtral", len(tokenizer), **LLAMA, **experts), tokenizer)
    recipe(here, {"path": str(folder)})
    ran = rlpost("train", "recipe.yaml")
    assert ran.code == 0, ran.err
    metrics = [file.read_text("utf-8") for file in here.rglob("*.jsonl") if "rows" not in file.name]
    assert any('"router_balance"' in text for text in metrics)
    tally("mixtures of experts", right=1)
