"""Folders of models that are damaged, foreign, quantised or unsafe: loaded right, or refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_made import transformers_alone
from safetensors.torch import load_file, save_file
from tiny_world import byte_tokenizer, rlpost, save_model, save_recipe, save_rows, tiny_model

from rlpost.errors import ModelError
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
STAGE = {"kind": "sft", "steps": 1, "batch_size": 2, "learning_rate": 1e-3}


def change(name: str, **fields: Any) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        given = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps(given | fields))

    return do


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def change_weights(what: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    return lambda folder: save_file(what(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def pickled(*also: Callable[[Path], None]) -> Callable[[Path], None]:
    """Weights as a pickle alone, and what would have it opened."""

    def do(folder: Path) -> None:
        torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()
        for one in also:
            one(folder)

    return do


def index(name: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        names = {"weight_map": dict.fromkeys(load_file(folder / WEIGHTS), name), "metadata": {}}
        torch.save(load_file(folder / WEIGHTS), folder / "part.bin")
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(json.dumps(names))

    return do


def quantised(method: str) -> Callable[[Path], None]:
    return change("config.json", quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})


FURTHER = {"model.layers.2.mlp.up_proj.weight": torch.zeros(64, 32)}
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pickle": (pickled(), "pickle"),
    "a pickle, asked for": (pickled(change("config.json", use_safetensors=False)), "pickle"),
    "a pickle, named": (pickled(change("config.json", transformers_weights="adapter_model.bin")), "names its weights"),
    "pickles in an index": (index("part.bin"), "not a safetensors file"),
    "an index that leads out": (index("../elsewhere.safetensors"), "not a safetensors file"),
    "an index without a map": (pickled(write(INDEX, "{}")), "weight_map"),
    "bitsandbytes": (quantised("bitsandbytes"), "quantised"),
    "gptq": (quantised("gptq"), "quantised"),
    "awq": (quantised("awq"), "quantised"),
    "config of text": (write("config.json", "model"), "cannot be read"),
    "config of nothing": (write("config.json", ""), "cannot be read"),
    "config a list": (write("config.json", "[1]"), "holds a list"),
    "config with NaN": (change("config.json", rms_norm_eps=float("nan")), "NaN"),
    "width of text": (change("config.json", hidden_size="wide"), "hidden_size"),
    "heads that do not divide": (change("config.json", num_attention_heads=5), "cannot be loaded"),
    "another width": (change("config.json", hidden_size=64), "cannot be loaded"),
    "an unknown family": (change("config.json", model_type="magic"), "magic"),
    "an unknown activation": (change("config.json", hidden_act="magic"), "magic"),
    "code of its own": (change("config.json", model_type="magic", auto_map={"AutoConfig": "a.B"}), "cannot be loaded"),
    "more layers": (change("config.json", num_hidden_layers=3), "missing"),
    "fewer layers": (change("config.json", num_hidden_layers=1), "no place for"),
    "no layers": (change("config.json", num_hidden_layers=0), "no place for"),
    "biases left out": (change_weights(lambda w: w | {"lm_head.bias": torch.ones(259)}), "lm_head.bias"),
    "a layer more in the files": (change_weights(lambda w: w | FURTHER), "layers.2"),
    "whole numbers": (change_weights(lambda w: {k: x.int() for k, x in w.items()}), "whole numbers"),
    "nan": (change_weights(lambda w: {k: x * float("nan") for k, x in w.items()}), "nan"),
    "an end of text": (change("generation_config.json", eos_token_id="<|im_end|>"), "eos_token_id"),
    "an end beyond": (change("generation_config.json", eos_token_id=[258, 100000]), "100000"),
    "generation cut": (write("generation_config.json", "{"), "cannot be read"),
    "tokenizer of text": (write("tokenizer.json", "tokens"), "cannot be read"),
    "tokenizer a list": (write("tokenizer_config.json", "[]"), "holds a list"),
    "tokenizer empty": (write("tokenizer.json", "{}"), "no tokenizer"),
    "template empty": (write("chat_template.jinja", "\n"), "empty chat template"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("made") / "model")


@pytest.fixture
def model(here: Path, made: Path) -> Path:
    return shutil.copytree(made, here / "model")


def recipe(folder: Path, model: dict[str, Any]) -> Path:
    rows = save_rows(folder / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    stage = {**STAGE, "data": {"c": {"path": str(rows)}}}
    return save_recipe(folder / "recipe.yaml", {"model": {"precision": "float32", **model}, "stages": {"sft": stage}})


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_model(model: Path, tally: Callable[..., None], monkeypatch: Any, damage: str) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("something was unpickled"))
    do, words = DAMAGE[damage]
    do(model)
    with pytest.raises(ModelError) as caught:
        load_policy(model, Model())
    assert "\n" not in str(caught.value)
    assert words in str(caught.value)
    tally("model folders refused", refused=1)


@pytest.mark.parametrize("damage", ["a pickle, asked for", "gptq", "width of text", "tokenizer empty"])
def test_the_command_says_so_in_one_line(here: Path, model: Path, tally: Callable[..., None], damage: str) -> None:
    do, words = DAMAGE[damage]
    do(model)
    assert rlpost("train", recipe(here, {"path": str(model)})).refused(4, words)
    tally("model folders refused", refused=1)


SCRATCH = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 130}, "hidden_size"),
        ({"hidden_size": "abc"}, "hidden_size"),
        ({"num_attention_heads": 0}, "model.config"),
        ({"hidden_act": "magic"}, "magic"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"vocab_size": 5}, "vocab_size"),
        ({"model_type": "magic"}, "magic"),
        ({"rope_parameters": 3}, "model.config"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings"),
    ],
)
def test_a_model_that_a_recipe_cannot_make(
    here: Path, tally: Callable[..., None], fields: dict[str, Any], words: str
) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    made = {"config": SCRATCH | heads | fields, "tokenizer": {"kind": "characters", "alphabet": "abc"}}
    assert rlpost("train", recipe(here, made)).refused(2, words)
    assert not list(here.glob("runs/*/base"))
    tally("models from recipes refused", refused=1)


def test_what_a_model_file_holds_beside_its_model_is_told(model: Path, capsys: Any) -> None:
    change_weights(
        lambda w: w | {"mtp.weight": torch.ones(3), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    )(model)
    load_policy(model, Model())
    assert "1 weights in its files are not part of the model, mtp.weight" in capsys.readouterr().err.replace("\n", " ")


def test_a_padded_vocabulary_is_written_by_its_tokens_alone(here: Path) -> None:
    """What is drawn, scored and saved agrees, though most of the model's own mass lies beyond the tokenizer."""
    from engines import asked, local

    from rlpost.engine.params import Sampling
    from rlpost.policy.score import logprobs

    folder = save_model(here / "padded", tiny_model(vocabulary=1024, scale=2.0), byte_tokenizer(more=["<|a|>"]))
    policy = load_policy(folder, Model())
    assert policy.vocabulary == 260
    prompts = [(1, 2, 3), (4, 5)]
    sampling = Sampling(max_new_tokens=40)
    drawn = local(policy).generate(asked(prompts, 8, sampling, [1, 2]))
    every = [c for group in drawn for c in group]
    assert max(i for c in every for i in c.ids) < 260
    from rlpost.types import Group

    scored = logprobs(policy, [Group(p, g) for p, g in zip(prompts, drawn, strict=True)])
    assert (scored - torch.tensor([x for c in every for x in c.logprobs])).abs().max() < 1e-4
    with torch.no_grad():
        whole = transformers_alone(folder)(torch.tensor([prompts[0]])).logits[0, -1]
    assert float(whole.softmax(-1)[260:].sum()) > 0.3
    first = {c.ids[0]: c.logprobs[0] for c in drawn[0]}
    for token, logp in first.items():
        assert logp == pytest.approx(float(whole[:260].log_softmax(-1)[token]), abs=1e-4)


def test_ids_between_tokens_are_never_drawn(here: Path) -> None:
    from rlpost.policy.vocabulary import Vocabulary

    class Gappy:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 2, "c": 3}

    known = Vocabulary(Gappy(), 6)
    logp = known.cut(torch.zeros(2, 6)).log_softmax(-1)
    assert logp.shape == (2, 4)
    assert logp.exp().tolist() == [[pytest.approx(1 / 3), 0.0, pytest.approx(1 / 3), pytest.approx(1 / 3)]] * 2
    assert bool((logp.exp() * logp).isfinite().all())
