"""Each kind of LoRA that a recipe can ask for: what it trains, saves, merges and leaves alone, beside peft alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_made import (
    EVERYTHING,
    GROUPS,
    alone,
    base_model,
    gap,
    lora,
    peft_alone,
    save_adapter,
    shaken,
    transformers_alone,
)
from chains import REWARD_MODEL, same_after_interruptions
from engines import asked, local
from peft import get_peft_model
from processes import finish_on_ranks
from safetensors.torch import load_file
from tiny_recipes import SFT, prepared, run, sha256, write
from torch import Tensor

from rlpost.cli.app import main
from rlpost.engine.params import Sampling
from rlpost.errors import ModelError, UnexpectedError
from rlpost.pipeline import dry_run
from rlpost.policy import pissa, quantized
from rlpost.policy.fused import fused_model
from rlpost.policy.load import load_policy
from rlpost.policy.moving_reference import MovingReference
from rlpost.policy.params import Attention, Lora, Model, Quantization
from rlpost.policy.policy import Policy
from rlpost.policy.reference import reference_policy
from rlpost.policy.saved import save_policy
from rlpost.policy.score import logprobs
from rlpost.train.learner import Learner
from rlpost.types import Group

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "rank-stabilised": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa by iterations, rank-stabilised": {"init_lora_weights": "pissa_niter_4", "use_rslora": True},
    "head": {"modules_to_save": ["lm_head"], "target_modules": "all-linear"},
    "both ends, pissa": {"modules_to_save": ["lm_head", "embed_tokens"], "init_lora_weights": "pissa"},
    "a norm and a linear layer": {"modules_to_save": ["norm", "down_proj"], "use_dora": True},
}
FUSED = {"plain", "rank-stabilised", "pissa", "pissa by iterations, rank-stabilised"}
"""Kinds whose single tokens are decoded on packed weights."""
IN_ONE_OPERATION = {*FUSED, "head", "both ends, pissa"}
"""Kinds whose layers are read in one operation each; others by the model's own forward."""
QUICK = {("dora", False), ("both ends, pissa", True)}
"""With the head tied to the embedding or not, in every test run; the others when there is time."""
WORLDS = [
    pytest.param(kind, tied, id=f"{kind}{', tied' * tied}", marks=[] if (kind, tied) in QUICK else [pytest.mark.slow])
    for kind in KINDS
    for tied in (False, True)
]


def settings(base: Path, **fields: Any) -> Model:
    return Model(path=str(base), lora=Lora(**{"r": 4, "alpha": 8.0, **fields}))


def overrides(kind: str) -> list[str]:
    return [f"model.lora.{key}={json.dumps(value)}" for key, value in {"r": 4, "alpha": 8, **KINDS[kind]}.items()]


def sampled(policy: Policy) -> tuple[list[Group], Tensor]:
    """Completions of some prompts, and the log-probabilities they were sampled with."""
    prompts = [g.prompt.tolist() for g in GROUPS]
    found = local(policy).generate(asked(prompts, 3, Sampling(max_new_tokens=9), [0] * len(prompts)))
    groups = [Group(tuple(p), tuple(completions)) for p, completions in zip(prompts, found, strict=True)]
    return groups, torch.tensor([x for g in groups for c in g.completions for x in c.logprobs.tolist()])


def by_its_own_forward(policy: Policy, groups: list[Group]) -> Tensor:
    own = policy.around(policy.model, bfloat16=False)
    own.trunk = own.blocks = False
    return logprobs(own, groups)


@pytest.mark.parametrize(("kind", "tied"), WORLDS)
def test_right_from_the_first_step_to_the_merged_model(
    here: Path, tally: Callable[..., None], kind: str, tied: bool
) -> None:
    base = base_model(here, tied)
    recipe = settings(base, **KINDS[kind])
    bare = by_its_own_forward(load_policy(base, EVERYTHING), GROUPS)
    policy = load_policy(base, recipe)
    reference = reference_policy(policy, base, base, recipe)
    assert gap(logprobs(policy, GROUPS), bare) < 1e-5, "it is no no-op"

    shaken(list(policy.trained().values()), 6, 0.05)
    policy(policy.batch(GROUPS)).logp_N.sum().backward()
    policy.backward_done()
    got = {n for n, p in policy.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert got == set(policy.trained())
    assert {p.dtype for p in policy.trained().values()} == {torch.float32}
    moved = logprobs(policy, GROUPS)
    assert gap(moved, bare) > 0.05
    with policy.acting_as(None):
        assert torch.equal(by_its_own_forward(policy, GROUPS), bare), "the base has changed"
    assert gap(reference.logprobs(GROUPS), bare) < 1e-5, "the reference followed the policy"

    assert policy.trunk == (kind in IN_ONE_OPERATION)
    assert (fused_model(policy) is not None) == (kind in FUSED)
    assert gap(by_its_own_forward(policy, GROUPS), moved) < 1e-5
    groups, at_sampling = sampled(policy)
    assert gap(logprobs(policy, groups), at_sampling) < 1e-5

    save_policy(policy, here / "saved")
    assert gap(alone(peft_alone(base, here / "saved")), moved) < 1e-5
    assert gap(logprobs(load_policy(here / "saved", recipe), GROUPS), moved) < 1e-5
    assert gap(logprobs(load_policy(here / "saved", EVERYTHING), GROUPS), moved) < 1e-5
    tally("kinds of LoRA", right=1)


@pytest.mark.parametrize(("use_rslora", "power"), [(False, 1.0), (True, 0.5)])
def test_an_adapter_of_twice_the_rank_has_the_same_factor(use_rslora: bool, power: float) -> None:
    r, alpha = pissa.doubled(6, 9.0, use_rslora=use_rslora)
    assert r == 12
    assert alpha / r**power == pytest.approx(9.0 / 6**power, rel=1e-15)


def test_pissa_trains_as_pefts_does(here: Path) -> None:
    """peft changes the base and trains on the rest; the base here stays, and weights and gradients are the same."""
    base = base_model(here)
    padded = settings(base, init_lora_weights="pissa").model_copy(update={"attention": Attention.padded})
    policy = load_policy(base, padded)
    theirs = get_peft_model(transformers_alone(base), lora(target_modules="all-linear", init_lora_weights="pissa"))
    before = transformers_alone(base).model.layers[0].mlp.up_proj.weight
    assert not torch.allclose(theirs.get_base_model().model.layers[0].mlp.up_proj.weight, before, atol=0.01)
    assert torch.equal(policy.causal_lm.model.layers[0].mlp.up_proj.get_base_layer().weight, before)
    mine = {n.replace(".policy.", "."): p for n, p in policy.trained().items()}
    other = {n.replace(".default.", "."): p for n, p in theirs.named_parameters() if p.requires_grad}
    row = torch.tensor([GROUPS[0].prompt.tolist()])
    for _ in range(3):
        for model, parameters in ((policy.model, mine), (theirs, other)):
            found = torch.autograd.grad(model(row).logits.square().mean(), list(parameters.values()))
            with torch.no_grad():
                for p, g in zip(parameters.values(), found, strict=True):
                    p.sub_(g, alpha=0.1)
    assert len(mine) == len(other) == 28
    for name, p in mine.items():
        assert torch.allclose(p, other[name.removeprefix("model.")], rtol=0, atol=1e-4), name


def test_a_moving_reference_follows_a_pissa(here: Path) -> None:
    base = base_model(here)
    recipe = settings(base, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"])
    policy = load_policy(base, recipe)
    moving = MovingReference(policy, base, recipe)
    assert gap(moving.logprobs(GROUPS), by_its_own_forward(load_policy(base, EVERYTHING), GROUPS)) < 1e-5
    shaken(list(policy.trained().values()), 6, 0.05)
    assert gap(moving.logprobs(GROUPS), logprobs(policy, GROUPS)) > 0.05
    moving.move(1.0)
    assert gap(moving.logprobs(GROUPS), logprobs(policy, GROUPS)) < 1e-4


@pytest.mark.parametrize("stage", [{**SFT, "checkpoint_every": 2}, REWARD_MODEL], ids=["sft", "reward_model"])
def test_a_resumed_pissa_has_the_part_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: dict[str, Any]
) -> None:
    """A decomposition made anew may differ in its last bits; here it differs in more."""
    lora = "model.lora={r: 4, alpha: 8, init_lora_weights: pissa}"
    run(tmp_path, {"stage": stage}, lora, "run=whole")
    update, calls = Learner.update, []

    def until_the_third(self: Learner, *args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("stopped")
        return update(self, *args, **more)

    with monkeypatch.context() as stopped:
        stopped.setattr(Learner, "update", until_the_third)
        with pytest.raises(UnexpectedError):
            run(tmp_path, {"stage": stage}, lora)
    begin = pissa.begin

    def otherwise(model: Any, adapter: str, how: str) -> None:
        begin(model, adapter, how)
        shaken([p for n, p in model.named_parameters() if "lora_" in n], 8, 0.01)

    monkeypatch.setattr(pissa, "begin", otherwise)
    run(tmp_path, {"stage": stage}, lora)
    whole, resumed = (tmp_path / f"runs/{name}/stage/final/adapter_model.safetensors" for name in ("whole", "run"))
    assert sha256(whole) == sha256(resumed)


@pytest.mark.slow  # 25 s each
@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_goes_on_bit_for_bit(tmp_path: Path, kind: str) -> None:
    same_after_interruptions(tmp_path, *overrides(kind))


def test_every_rank_begins_with_the_first_ones_part(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summed: list[Tensor] = []
    monkeypatch.setattr(pissa.ranks, "is_first", lambda: False)
    monkeypatch.setattr(pissa.ranks, "sum_over_ranks", summed.extend)
    base = base_model(here)
    policy = load_policy(base, settings(base, init_lora_weights="pissa"))
    own = {p.data_ptr() for n, p in policy.named_parameters() if "lora_" in n}
    assert {x.data_ptr() for x in summed} == own
    assert len(own) == 4 * 14
    assert not any(bool(x.any()) for x in summed), "another rank's part would be added to the first one's"


@pytest.mark.slow  # 15 s each
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_what_one_trains(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path, {"sft": SFT})
    found = []
    for count, strategy in ((1, "ddp"), (2, "ddp"), (2, "fsdp2")):
        words = ["train", str(file), *overrides(kind), f"parallel.strategy={strategy}", f"run=by{count}{strategy}"]
        assert finish_on_ranks(count, words, tmp_path / "said") == [0] * count
        found.append(load_file(tmp_path / f"runs/by{count}{strategy}/sft/final/adapter_model.safetensors"))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.allclose(x, found[0][name], rtol=0, atol=1e-5) for name, x in other.items())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a module that is not there": ({"modules_to_save": ["lm_haed"]}, "has no lm_haed"),
    "an embedding": (
        {"init_lora_weights": "pissa", "target_modules": ["q_proj", "embed_tokens"]},
        "embed_tokens is no linear layer",
    ),
    "more than all singular vectors": (
        {"init_lora_weights": "pissa", "r": 17},
        r"model\.lora\.r=17: .*k_proj is \(16, 32\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_for_a_new_adapter(here: Path, case: str) -> None:
    fields, words = REFUSED[case]
    base = base_model(here)
    with pytest.raises(ModelError, match=words) as caught:
        load_policy(base, settings(base, **fields))
    assert "\n" not in str(caught.value)


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no dora": ({}, {"use_dora": True}, "model.lora.use_dora=True, and its adapter was made with False"),
    "no rslora": ({}, {"use_rslora": True}, "model.lora.use_rslora=True, and"),
    "other modules": (
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["norm"]},
        r"model.lora.modules_to_save=\['norm'\], and its adapter was made with \['lm_head'\]",
    ),
    "another rank": ({"r": 6, "lora_alpha": 12}, {"init_lora_weights": "pissa"}, "has r=6, alpha=12"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_refused_for_a_saved_adapter(here: Path, case: str) -> None:
    made, asks, words = OTHERS[case]
    base = base_model(here)
    folder = save_adapter(here / "adapter", base, lora(target_modules=["q_proj"], **made))
    with pytest.raises(ModelError, match=words):
        load_policy(folder, settings(base, **asks))


RECIPES = {
    ("model.quantization=nf4",): "model.quantization: weights in four bits cannot be trained themselves",
    ("model.lora={use_dora: true, init_lora_weights: pissa}",): "model.lora.init_lora_weights: a DoRA divides",
    ("model.lora={init_lora_weights: pisa}",): "model.lora.init_lora_weights",
    ("model.lora={modules_to_save: []}",): "model.lora.modules_to_save: an empty list",
    ("model.lora={init_lora_weights: pissa}", "model.quantization=nf4"): "model.lora.init_lora_weights: PiSSA begins",
    ("model.lora={r: 4}", "model.quantization=nf4", "parallel.strategy=fsdp2"): "model.quantization: weights in four",
}


@pytest.mark.parametrize("words", RECIPES)
def test_refused_in_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    prepared(tmp_path, {"sft": SFT})
    monkeypatch.setattr(sys, "argv", ["rlpost", "train", str(tmp_path / "tiny.yaml"), *words])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert RECIPES[words] in said
    assert not (tmp_path / "runs").exists()


def test_without_bitsandbytes_it_is_one_line_before_anything_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    recipe = prepared(tmp_path, {"sft": SFT}, "model.lora={r: 4}", "model.quantization=nf4")
    with pytest.raises(ModelError) as caught:
        dry_run(recipe)
    assert str(caught.value) == ("model.quantization=nf4: needs the package bitsandbytes: pip install 'rlpost[bnb]'")


def test_an_adapter_of_a_quantised_base_goes_on_there_alone(here: Path) -> None:
    """The folder says so; it would say something else on other weights."""
    base = base_model(here)
    folder = save_adapter(here / "adapter", base, lora(target_modules=["q_proj"]))
    file = folder / quantized.FILE
    file.write_text(json.dumps({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}))
    with pytest.raises(ModelError, match="quantised in a way that is not supported"):
        load_policy(folder, settings(base))
    file.write_text(json.dumps(quantized.NF4))
    with pytest.raises(ModelError, match=r"trained on weights in nf4; set model\.quantization=nf4 to go on"):
        load_policy(folder, settings(base))
    file.unlink()
    (folder / "checkpoint.json").write_text(json.dumps({"base": str(base)}))
    recipe = settings(base).model_copy(update={"quantization": Quantization.nf4})
    with pytest.raises(ModelError, match=r"in full precision; set model\.quantization=null to go on"):
        load_policy(folder, recipe)


def test_a_dry_run_says_what_is_trained(tmp_path: Path) -> None:
    def said(lora: str) -> str:
        return next(
            line for line in dry_run(prepared(tmp_path, {"sft": SFT}, f"model.lora={lora}")) if "training" in line
        )

    assert said("{r: 4}").endswith("training LoRA r=4")
    assert said("{r: 4, use_dora: true, modules_to_save: [lm_head]}").endswith("training DoRA r=4 and lm_head")
    assert said("{r: 4, use_rslora: true, init_lora_weights: pissa}").endswith("rank-stabilised PiSSA LoRA r=4")
