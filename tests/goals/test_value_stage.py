"""Value networks against the exact probability, what moves with them, and where they lead."""

from __future__ import annotations

import itertools
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from tiny_recipes import LORA, SFT, base, group, jsonl, metrics, policy, run, weights

from rlpost.data.codec import make_codec
from rlpost.engine.params import Sampling
from rlpost.errors import DataError, ModelError
from rlpost.goals.goal_sampler import GoalSampler
from rlpost.goals.goal_set import GoalSet, ends_in
from rlpost.goals.params import Goals, ValueTarget
from rlpost.goals.sample import guided_sample
from rlpost.goals.value import ValueExample, _taken, goal_value_loss, value_example, weighted
from rlpost.goals.value_network import conditioned
from rlpost.inference.sample import sample
from rlpost.policy.params import Model
from rlpost.policy.score import logprobs
from rlpost.policy.value_head import HEAD_FILE, Values, load_value_head_model
from rlpost.recipe.specs.value import Value
from rlpost.train.experience import Experience
from rlpost.types import Completion, Group

VALUE = {
    "kind": "value",
    "data": SFT["data"],
    "steps": 40,
    "prompts_per_step": 16,
    "group_size": 8,
    "sampling": {"max_new_tokens": 2},
    "goals": {"texts": ["1", "22"], "truncated_counts": True},
    "learning_rate": 3e-3,
    "max_length": 20,
}
LORA_OR_NOT = pytest.mark.parametrize("lora", [(), (LORA,)], ids=["full", "lora"])
PROMPTS = ("1+2=", "33+4=", "70+19=", "5+55=")


def final(folder, stage="value"):
    return folder / "runs/run" / stage / "final"


def exact(model, prompts, goal: GoalSet, length: int) -> list[float]:
    """V of each prompt, by summing over all completions."""
    end = model.tokenizer.eos_token_id
    others = [t for t in range(model.vocabulary) if t != end]
    texts = [(*body, end) for k in range(length) for body in itertools.product(others, repeat=k)]
    texts += list(itertools.product(others, repeat=length))
    every = tuple(Completion(t, (True,) * len(t), finish="stop" if t[-1] == end else "length") for t in texts)
    reached = torch.tensor([ends_in(goal, c, [end], truncated_counts=True) for c in every])
    found = []
    for prompt in prompts:
        group = Group(tuple(model.tokenizer.encode(prompt)), every)
        logp_S = torch.stack([x.sum() for x in torch.split(logprobs(model, [group]), [len(t) for t in texts])])
        assert float(logp_S.exp().sum()) == pytest.approx(1, abs=1e-4)
        found.append(float(logp_S.exp()[reached].sum()))
    return found


def said(folder, model, prompts) -> list[float]:
    """V of each prompt as the saved network has it."""
    network = load_value_head_model(final(folder), Model(), bfloat16=False, device="cpu")
    groups = [Group(tuple(model.tokenizer.encode(p)), (Completion((0,), (True,)),)) for p in prompts]
    return torch.sigmoid(network.score(groups).before_N).tolist()


@pytest.mark.parametrize("target", ["monte_carlo", "bootstrap"])
def test_it_comes_near_the_exact_value(tmp_path, target):
    run(tmp_path, {"sft": SFT, "value": {**VALUE, "target": target, "steps": 80}})
    model = policy(final(tmp_path, "sft"))
    goal = GoalSet([tuple(model.tokenizer.encode(t)) for t in VALUE["goals"]["texts"]])
    true, found = exact(model, PROMPTS, goal, 2), said(tmp_path, model, PROMPTS)
    assert max(abs(a - b) for a, b in zip(true, found, strict=True)) < 0.08
    assert 0.05 < sum(true) / len(true) < 0.9


def test_avoiding_is_the_rest(tmp_path):
    run(tmp_path, {"sft": SFT, "value": {**VALUE, "avoid": True, "steps": 80}})
    model = policy(final(tmp_path, "sft"))
    goal = GoalSet([tuple(model.tokenizer.encode(t)) for t in VALUE["goals"]["texts"]])
    true, found = exact(model, PROMPTS, goal, 2), said(tmp_path, model, PROMPTS)
    assert max(abs(1 - a - b) for a, b in zip(true, found, strict=True)) < 0.08


@LORA_OR_NOT
def test_the_network_moves_and_the_policy_does_not(tmp_path, lora):
    last = run(tmp_path, {"sft": SFT, "value": {**VALUE, "steps": 3}}, *lora)
    assert last.parent.name == "sft"
    names = {f.name for f in final(tmp_path).glob("*.safetensors")}
    assert names == {HEAD_FILE, ("adapter_model" if lora else "model") + ".safetensors"}
    (before,) = final(tmp_path, "sft").glob("*model.safetensors")
    after = weights_beside_head(final(tmp_path))
    start = {n: x for n, x in weights(before.parent).items() if "lm_head" not in n}
    assert all(not torch.equal(after[n], x) for n, x in start.items())
    assert set(start) == {n for n in after if "lm_head" not in n}
    assert base(tmp_path).is_dir()


def weights_beside_head(folder):
    from safetensors.torch import load_file

    return load_file(next(f for f in folder.glob("*.safetensors") if f.name != HEAD_FILE))


def test_guided_samples_reach_the_goal_and_stay_away_from_it(tmp_path):
    stages = {
        "sft": SFT,
        "value": VALUE,
        "away": {**VALUE, "avoid": True, "goals": {**VALUE["goals"], "texts": ["1"]}},
    }
    run(tmp_path, stages)
    here, how = str(tmp_path / "runs/run"), Sampling(max_new_tokens=2)
    free = sample(here + "/sft", "33+4=", sampling=how, n=200)
    led = guided_sample(here + "/sft", "33+4=", here + "/value", ["1", "22"], candidates=0, sampling=how, n=200)

    def hits(texts):
        return sum(t.endswith(("1", "22")) for t in texts)

    assert hits(free) < 70
    assert hits(led) > 160
    kept = guided_sample(here + "/sft", "33+4=", here + "/away", ["1"], avoid=True, candidates=0, sampling=how, n=200)
    # Two characters are two tokens; a shorter text may have a special token after it, which nobody sees.
    assert not [t for t in kept if t.endswith("1") and len(t) == 2]
    assert [t for t in free if t.endswith("1") and len(t) == 2]
    with pytest.raises(ModelError, match="trained to reach its goals, and --avoid asks for the other"):
        guided_sample(here + "/sft", "1+1=", here + "/value", ["1"], avoid=True, sampling=how)
    with pytest.raises(ModelError, match=r"no value network, since it has no value\.json"):
        guided_sample(here + "/sft", "1+1=", here + "/sft", ["1"], sampling=how)


@LORA_OR_NOT
def test_a_stopped_stage_goes_on_bit_for_bit(tmp_path, lora, monkeypatch):
    from rlpost.goals import value as module

    stages = {"value": {**VALUE, "steps": 6, "checkpoint_every": 3, "condition": "{goal}+", "hindsight": 0.5}}
    whole = weights_beside_head(run_in(tmp_path / "whole", stages, *lora))
    examples = module.value_example

    def stop_at_the_fifth_step(*given):
        if next(calls) == 4 * VALUE["prompts_per_step"]:
            raise KeyboardInterrupt
        return examples(*given)

    calls = itertools.count()
    monkeypatch.setattr(module, "value_example", stop_at_the_fifth_step)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "parts", stages, *lora)
    monkeypatch.setattr(module, "value_example", examples)
    parts = weights_beside_head(run_in(tmp_path / "parts", stages, *lora))
    assert all(torch.equal(x, parts[n]) for n, x in whole.items())
    assert metrics(tmp_path / "whole", "value") == metrics(tmp_path / "parts", "value")


def run_in(folder, stages, *overrides):
    folder.mkdir(exist_ok=True)
    run(folder, stages, *overrides)
    return final(folder)


class Surroundings:
    """What `GoalSampler` asks of a context."""

    name = "value"


def answers(*texts: tuple[int, ...]) -> Group:
    return Group((5, 6), tuple(Completion((*t, 0), (True,) * (len(t) + 1), finish="stop") for t in texts))


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec")
    run(folder, {"sft": {**SFT, "steps": 1}})
    return make_codec(policy(base(folder)).tokenizer)


def test_an_ending_that_was_reached_is_the_goal_of_the_others(codec):
    """Three completions, the second ends as the first does; whichever is taken does not count itself."""
    one, two = codec.ids("41", ""), codec.ids("32", "")
    stop = codec.end
    group = Group((9,), tuple(Completion((*t, stop), (True,) * 3, finish="stop") for t in (one, one, two)))
    cfg = Value(learning_rate=1.0, goals=Goals(), condition="{goal}+", hindsight=1.0, hindsight_tokens=2, group_size=3)
    seen = set()
    for seed in range(20):
        found = value_example(group, GoalSampler(cfg.goals, codec, Surroundings()), cfg, codec, random.Random(seed))
        at = found.counts.index(False)
        goal = tuple(group.completions[at].ids[:-1])
        assert found.label == tuple(float(tuple(c.ids[:-1]) == goal) for c in group.completions)
        assert tuple(found.group.prompt) == conditioned("{goal}+", goal, (9,), codec)
        seen.add(at)
    assert seen == {0, 1, 2}


def test_a_contrastive_example_knows_its_own(codec):
    one, stop = codec.ids("41", ""), codec.end
    group = Group((9,), tuple(Completion((*one, stop), (True,) * 3, finish="stop") for _ in range(3)))
    cfg = Value(learning_rate=1.0, condition="{goal}+", target=ValueTarget.contrastive, group_size=3)
    found = value_example(group, GoalSampler(cfg.goals, codec, Surroundings()), cfg, codec, random.Random(0))
    assert sorted(found.label) == [0, 0, 1]
    assert found.counts == (True,) * 3


def test_without_an_ending_there_is_nothing_to_learn(codec):
    group = Group((9,), (Completion((3, 4), (True, True), finish="length"),) * 2)
    cfg = Value(learning_rate=1.0, goals=Goals(), condition="{goal}+", hindsight=1.0, group_size=2)
    assert (
        value_example(group, GoalSampler(cfg.goals, codec, Surroundings()), cfg, codec, random.Random(0)).counts
        == (False,) * 2
    )


def test_a_column_holds_each_prompts_goal(codec):
    cfg = Value(learning_rate=1.0, goals=Goals(column="answer"), condition="{goal}+", group_size=2)
    ids, stop = codec.ids("41", ""), codec.end
    done = Completion((*ids, stop), (True,) * 3, finish="stop")
    group = Group((9,), (done, Completion((stop,), (True,), finish="stop")), {"answer": "1"})
    found = value_example(group, GoalSampler(cfg.goals, codec, Surroundings()), cfg, codec, random.Random(0))
    assert (found.label, found.counts) == ((1.0, 0.0), (True, True))


def test_a_policy_that_imitates_guided_samples_needs_no_guide(tmp_path):
    stages = {
        "sft": SFT,
        "value": VALUE,
        "led": {
            "kind": "guided",
            "data": SFT["data"],
            "network": "value",
            "goals": VALUE["goals"],
            "sampling": VALUE["sampling"],
            "candidates": 0,
        },
        "imitate": {**SFT, "data": {"own": {"stage": "led"}}, "steps": 40},
    }
    run(tmp_path, stages)
    rows = (tmp_path / "runs/run/led/final/rows.jsonl").read_text().splitlines()
    assert len(rows) > 100
    assert all(json.loads(row)["completion"].endswith(("1", "22")) for row in rows)
    here, how = str(tmp_path / "runs/run"), Sampling(max_new_tokens=3)
    before, after = (sample(f"{here}/{s}", "33+4=", sampling=how, n=200) for s in ("sft", "imitate"))
    share = [sum(t.endswith(("1", "22")) for t in texts) / 200 for texts in (before, after)]
    assert share[0] < 0.45
    assert share[1] > 0.6


def test_annotations_are_the_networks_values_in_tenths(tmp_path):
    asked = [["1", "12+"], [], ["3+4="]]
    jsonl(tmp_path / "asked.jsonl", [{"prompt": "1+1=", "parts": parts, "n": i} for i, parts in enumerate(asked)])
    annotate = {
        "kind": "value_annotations",
        "data": {"rows": {"path": "asked.jsonl"}},
        "network": "value",
        "about": "parts",
    }
    stages = {"sft": SFT, "value": {**VALUE, "steps": 3}, "annotated": {**annotate, "goals": VALUE["goals"]}}
    run(tmp_path, stages)
    rows = [json.loads(x) for x in (tmp_path / "runs/run/annotated/final/rows.jsonl").read_text().splitlines()]
    assert [(r["prompt"], r["parts"], r["n"]) for r in rows] == [("1+1=", parts, i) for i, parts in enumerate(asked)]
    start = policy(tmp_path / "runs/run/sft/final")
    network = load_value_head_model(tmp_path / "runs/run/value/final", Model(), bfloat16=False, device="cpu")
    for row in rows:
        value = [float(torch.sigmoid(network.score([group(start, text, "1")]).before_N[0])) for text in row["parts"]]
        assert row["value_annotations"] == "".join(str(int(v * 10)) for v in value)
    with pytest.raises(DataError, match=r"stages\.annotated\.about: a row has no list of texts in 'n'"):
        run(tmp_path, {**stages, "annotated": {**stages["annotated"], "about": "n"}}, "run=other")


def test_own_endings_stand_against_those_of_the_others_of_a_group():
    """Three of four completions are negatives: a logit of log 3 says that own and other endings are as likely."""
    cfg = SimpleNamespace(target=ValueTarget.contrastive, group_size=4)
    part = Experience((Group((1,), (Completion((5, 6), (True, True)),)),))
    part = part.with_actions(label=torch.tensor([1.0, 0.0]), weight=torch.tensor([1.0, 10.0]))
    logit_N = torch.full((2,), math.log(3))
    total, _ = goal_value_loss(cfg)(Values(logit_N, logit_N, logit_N[:1]), part)
    assert float(total) == pytest.approx(11 * math.log(2))


def test_hindsight_takes_the_last_tokens_of_a_completion():
    cfg = SimpleNamespace(hindsight_tokens=2, goals=SimpleNamespace(truncated_counts=False))
    said = Completion((5, 6, 7, 2), (True,) * 4, finish="stop")
    cut = Completion((8, 9, 10), (True,) * 3, finish="length")
    assert _taken([cut, said], cfg, SimpleNamespace(stops={2}), random.Random(0)) == (1, (6, 7))
    assert _taken([cut], cfg, SimpleNamespace(stops={2}), random.Random(0)) is None


def test_a_completion_that_gave_the_goal_has_no_weight():
    both = Group((1,), (Completion((5, 6), (True,) * 2), Completion((7,), (True,))))
    update = weighted([ValueExample(both, (1.0, 0.0), (False, True))] * 2)
    assert update["weight"].tolist() == [0.0, 0.0, 0.5] * 2
    assert update["label"].tolist() == [1.0, 1.0, 0.0] * 2
