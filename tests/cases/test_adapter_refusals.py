"""Adapters that cannot be proven right are refused in one line, and nothing is trained from fresh weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_made import GROUPS, LORA, base_model, gap, lora, save_adapter, transformers_alone
from peft import IA3Config, PromptTuningConfig
from safetensors.torch import load_file, save_file
from tiny_world import byte_tokenizer, rlpost, save_recipe, save_rows

from rlpost.errors import ModelError
from rlpost.policy.load import load_policy
from rlpost.policy.params import Lora, Model
from rlpost.policy.score import logprobs

PLAIN = {"target_modules": ["q_proj", "v_proj"]}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def recipe(path: Path, **lora_fields: Any) -> Path:
    rows = save_rows(path.parent / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    stage = {"kind": "sft", "data": {"c": {"path": str(rows)}}, "steps": 1, "batch_size": 2, "learning_rate": 1e-3}
    model = {"path": str(path), "precision": "float32", "lora": {"r": 4, "alpha": 8, **lora_fields}}
    return save_recipe(path.parent / "recipe.yaml", {"model": model, "stages": {"sft": stage}})


def change_weights(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def change_config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text()) | fields
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v != "(gone)"}))

    return change


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


FOREIGN = {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "a pickle": (only_pickle, "pickle"),
    "an empty file": (write(WEIGHTS, ""), "cannot be read"),
    "empty weights": (change_weights(lambda w: {}), "lacks weights"),
    "one missing": (change_weights(lambda w: dict(list(w.items())[1:])), "lacks weights"),
    "renamed": (change_weights(lambda w: {k.replace("q_proj", "o_proj"): x for k, x in w.items()}), "q_proj"),
    "foreign": (change_weights(lambda w: w | FOREIGN), "layers.7"),
    "another prefix": (change_weights(lambda w: {f"module.{k}": x for k, x in w.items()}), "lacks weights"),
    "whole numbers": (change_weights(lambda w: {k: x.int() for k, x in w.items()}), "a value that is not finite"),
    "nan": (change_weights(lambda w: {k: x * float("nan") for k, x in w.items()}), "a value that is not finite"),
    "no JSON": (write(CONFIG, "{"), "cannot be read"),
    "a list": (write(CONFIG, "[]"), "holds a list"),
    "no kind": (change_config(peft_type="(gone)"), "peft_type"),
    "a kind of number": (change_config(peft_type=5), "peft_type=5"),
    "an unknown kind": (change_config(peft_type="MAGIC"), "MAGIC"),
    "a sequence classifier": (change_config(task_type="SEQ_CLS"), "SEQ_CLS"),
    "biases": (change_config(bias="all"), "bias"),
    "biases of layers": (change_config(bias="lora_only"), "bias"),
    "a base that was changed": (change_config(init_lora_weights="pissa"), "pissa"),
    "a rank of text": (change_config(r="four"), "four"),
    "no rank": (change_config(r="(gone)"), "no r in"),
    "another rank": (change_config(r=8), "does not fit"),
    "another scale": (change_config(lora_alpha=16), "alpha=16"),
    "rank of others": (change_config(rank_pattern={"v_proj": 2}), "does not fit"),
    "a field of the future": (change_config(use_something_new=True), "use_something_new"),
    "experts": (change_config(target_parameters=["experts.down"]), "target_parameters"),
    "no base": (change_config(base_model_name_or_path=None), "names no base"),
    "no targets": (change_config(target_modules=["c_attn"]), "does not fit"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter on it, for copies."""
    folder = tmp_path_factory.mktemp("made")
    save_adapter(folder / "adapter", base_model(folder), lora(**PLAIN))
    return folder


@pytest.fixture
def adapter(here: Path, made: Path) -> Path:
    return shutil.copytree(made / "adapter", here / "adapter")


def refusal(folder: Path, settings: Model = LORA) -> str:
    with pytest.raises(ModelError) as caught:
        load_policy(folder, settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_adapter(adapter: Path, tally: Callable[..., None], monkeypatch: Any, damage: str) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("something was unpickled"))
    do, words = DAMAGE[damage]
    do(adapter)
    assert words in refusal(adapter)
    tally("adapters refused", refused=1)


@pytest.mark.parametrize("damage", ["one missing", "a pickle", "biases"])
def test_the_command_says_so_in_one_line(here: Path, adapter: Path, tally: Callable[..., None], damage: str) -> None:
    do, words = DAMAGE[damage]
    do(adapter)
    assert rlpost("train", recipe(adapter)).refused(4, words)
    tally("adapters refused", refused=1)


def test_other_kinds_of_peft(here: Path, made: Path, tally: Callable[..., None]) -> None:
    base = made / "base"
    for number, config in enumerate(
        (
            IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
            PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        )
    ):
        assert "LORA is supported" in refusal(save_adapter(here / str(number), base, config))
        tally("adapters refused", refused=1)


def test_an_adapter_on_an_adapter(here: Path, adapter: Path) -> None:
    second = shutil.copytree(adapter, here / "second")
    change_config(base_model_name_or_path=str(adapter))(second)
    assert "base model is expected" in refusal(second)


def test_an_embedding_of_its_own(here: Path) -> None:
    """As peft saves it when the vocabulary was resized: the base has another."""
    folder = save_adapter(here / "adapter", base_model(here), lora(target_modules=["q_proj", "embed_tokens"]))
    change_weights(lambda w: {k: x + 1 if "base_layer" in k else x for k, x in w.items()})(folder)
    assert "of its own" in refusal(folder)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    change_weights(lambda w: w | {key: torch.zeros(300, 32)})(folder)
    assert "of its own" in refusal(folder)


def test_the_recipes_modules_and_dropout_hold(adapter: Path, tally: Callable[..., None]) -> None:
    for targets, words in ((["q_proj"], "leaves out"), ("all-linear", "asks for"), (["q_proj", "k_proj"], "asks for")):
        message = refusal(adapter, Model(lora=Lora(r=4, alpha=8.0, target_modules=targets)))
        assert words in message
        assert "leave target_modules out" in message
    right = Model(lora=Lora(r=4, alpha=8.0, dropout=0.25, target_modules=["v_proj", "q_proj"]))
    policy = load_policy(adapter, right)
    rates = [m.p for m in policy.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    assert rates == [0.25] * 4
    change_config(lora_dropout=0.5)(adapter)
    assert not [m for m in load_policy(adapter, LORA).modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    assert gap(logprobs(policy, GROUPS), logprobs(load_policy(adapter, LORA), GROUPS)) == 0
    tally("adapters refused", right=1, refused=3)


def test_what_a_recipe_cannot_say_of_an_adapter_is_told(adapter: Path, capsys: Any) -> None:
    change_config(use_rslora=True)(adapter)
    load_policy(adapter, LORA)
    assert "goes on as it was saved, with use_rslora" in capsys.readouterr().err.replace("\n", " ")


def test_a_copy_that_says_other_things_is_no_reference(adapter: Path, monkeypatch: Any) -> None:
    from rlpost.policy import adapters
    from rlpost.policy.reference import reference_policy

    policy = load_policy(adapter, LORA)
    own = adapters.adapter_state
    monkeypatch.setattr(adapters, "adapter_state", lambda *a: {k: x * 1.5 for k, x in own(*a).items()})
    with pytest.raises(ModelError, match="cannot be the reference"):
        reference_policy(policy, adapter, adapter, LORA)


def test_a_merge_that_changes_the_model_is_refused(adapter: Path, made: Path, monkeypatch: Any) -> None:
    from rlpost.policy import load

    monkeypatch.setattr(load, "merged", lambda _: transformers_alone(made / "base"))
    assert "merging this adapter changes" in refusal(adapter, Model())


def test_a_tokenizer_of_its_own_ends_as_the_adapter_was_trained_to(adapter: Path) -> None:
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 65]}))
    byte_tokenizer().save_pretrained(adapter)
    assert load_policy(adapter, LORA).end_ids == (258, 65)
