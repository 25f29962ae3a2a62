"""Models of reversed text in a pipeline: what they leave, who may use them, and what they say of prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_recipes import GRPO, LORA, MODEL, SFT, lora_policy, metrics, policy, prepared, run

from rlpost.cli.app import main
from rlpost.engine.params import Sampling
from rlpost.engine.sampling import greedy as greedily
from rlpost.errors import ModelError, RecipeError
from rlpost.goals.infill_text import infill_text
from rlpost.inference import checkpoint
from rlpost.inference.sample import sample
from rlpost.pipeline import train
from rlpost.policy.judge import ReverseJudge, RewardModelJudge, load_judge
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model
from rlpost.policy.policy import Policy
from rlpost.rewards.models import reverse_likelihood
from rlpost.run.lookup import find_checkpoint
from rlpost.types import Completion, Group

BACK = {
    **SFT,
    "data": {"problems": {**SFT["data"]["problems"], "direction": "reverse"}},
    "steps": 6,
}
LIKELIHOOD = {"fn": "reverse_likelihood", "model": "back", "weight": 0.1}
STAGES = {
    "sft": {**SFT, "steps": 2},
    "back": BACK,
    "grpo": {**GRPO, "steps": 1, "rewards": [{"fn": "rewards.py:digits"}, LIKELIHOOD]},
}
EVALUATION = {
    "data": {"held_out": {"task": {"fn": "addition.held_out"}, "limit": 4}},
    "rewards": [{"fn": "rewards.py:digits"}],
    "sampling": {"max_new_tokens": 4},
    "samples": 3,
    "judge": "back",
}
FEW = Sampling(max_new_tokens=4)
BEGIN, END = 1, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the recipe tiny.yaml and its finished run."""
    made = tmp_path_factory.mktemp("reverse")
    run(made, STAGES, evaluation=EVALUATION)
    return made


@pytest.fixture(scope="module")
def stages(folder) -> Path:
    return folder / "runs/run"


def reverse_policy(path: Path) -> Policy:
    return load_policy(path, Model(), trainable=False, backwards=True)


def about(stage: Path) -> dict:
    return json.loads((stage / "final/checkpoint.json").read_text("utf-8"))


@torch.no_grad()
def log_p(model: Policy, ids: list[int], given: int) -> float:
    """Of all tokens from number `given` on, by one plain pass."""
    model.model.set_attn_implementation("eager")
    logp_TV = model.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logp_TV[t - 1, ids[t]]) for t in range(given, len(ids)))


def written(*texts: str, prompt: str = "12+3=", finish: str = "stop") -> Group:
    """Completions as the tiny recipes' tokenizer has them: digits are 4 to 13, + is 14, = is 15."""
    tokens = {c: i for i, c in enumerate("0123456789+=", start=4)}
    ids = [(*(tokens[c] for c in text), *((END,) if finish == "stop" else ())) for text in texts]
    every = tuple(Completion(i, (True,) * len(i), t, finish) for i, t in zip(ids, texts, strict=True))
    return Group(tuple(tokens[c] for c in prompt), every, {"prompt": prompt})


# --- What such a stage leaves


def test_the_checkpoint_says_so_and_the_next_stage_starts_before_it(stages):
    assert about(stages / "back")["direction"] == "reverse"
    assert "direction" not in about(stages / "sft")
    assert about(stages / "grpo")["parent"] == about(stages / "back")["parent"] == str((stages / "sft/final").resolve())


def test_it_is_not_what_a_run_leaves(stages, tmp_path):
    assert find_checkpoint(stages) == stages / "grpo/final"
    last = run(tmp_path, {"sft": {**SFT, "steps": 1}, "back": {**BACK, "steps": 1}})
    assert last == (tmp_path / "runs/run/sft/final").resolve()
    assert find_checkpoint(tmp_path / "runs/run") == tmp_path / "runs/run/sft/final"


def test_it_is_evaluated_no_more_than_a_judge(stages):
    assert sorted(p.stem for p in (stages / "evaluation").glob("*.jsonl")) == ["base", "grpo", "sft"]


def test_it_is_no_policy(stages, tmp_path):
    back = stages / "back"
    with pytest.raises(ModelError, match=r"back/final: it reads backwards .* so it is not a policy"):
        policy(back / "final")
    with pytest.raises(ModelError, match=r"sft/final: it reads forwards"):
        reverse_policy(stages / "sft/final")
    start = {k: v for k, v in MODEL.items() if k not in ("config", "tokenizer")} | {"path": str(back)}
    with pytest.raises(ModelError, match="it reads backwards"):
        train(prepared(tmp_path, {"sft": {**SFT, "steps": 1}}, model=start))


# --- Rewards


def test_the_reward_is_the_log_probability_of_the_prompt(stages):
    back = reverse_policy(stages / "back/final")
    found = reverse_likelihood([written("15", "7"), written("")], ReverseJudge(back, None, back.tokenizer))
    # begin, the answer backwards; then "=3+21" and the end token.
    prompt = [15, 7, 14, 6, 5, END]
    by_hand = [log_p(back, [BEGIN, *answer, *prompt], 1 + len(answer)) for answer in ([9, 5], [11], [])]
    assert found == pytest.approx(by_hand, abs=1e-4)


def test_tokens_of_the_answer_are_given_and_its_begin_token_is_one_of_the_texts(stages):
    back = reverse_policy(stages / "back/final")
    judge = ReverseJudge(back, None, back.tokenizer)
    plain, cut = written("15"), written("15", finish="length")
    begun = Group((BEGIN, *plain.prompt), plain.completions)
    assert judge.scores([begun]) == judge.scores([cut]) == judge.scores([plain])
    assert judge.by_group([written("1", "2"), plain]) == [judge.scores([written("1", "2")]), judge.scores([plain])]


def test_a_judge_with_another_tokenizer_reads_the_text(stages, tmp_path):
    other = {**MODEL, "tokenizer": {"kind": "characters", "alphabet": "=+9876543210"}}
    run(tmp_path, {"sft": {**SFT, "steps": 1}}, model=other)
    writer = policy(tmp_path / "runs/run/sft/final")
    back = reverse_policy(stages / "back/final")
    ids = tuple(writer.tokenizer.encode("15"))
    foreign = Group((5, 6), (Completion((*ids, END), (True,) * 3, "15", "stop"),), {"prompt": "12+3="})
    own = ReverseJudge(back, None, back.tokenizer).scores([written("15")])
    assert ReverseJudge(back, None, writer.tokenizer).scores([foreign]) == pytest.approx(own, abs=1e-5)


def test_a_model_that_reads_forwards_is_refused():
    with pytest.raises(RecipeError, match="reverse_likelihood: asks a model of reversed text - name an sft stage"):
        reverse_likelihood([], RewardModelJudge.__new__(RewardModelJudge))


def test_steps_are_none_of_its_business(stages):
    back = reverse_policy(stages / "back/final")
    with pytest.raises(ModelError, match="scores whole completions"):
        ReverseJudge(back, None, back.tokenizer).step_scores([], "\n")


def test_a_text_it_has_no_room_for(stages):
    back = reverse_policy(stages / "back/final")
    with pytest.raises(ModelError, match="has 37 tokens and the reward model reads 32"):
        ReverseJudge(back, None, back.tokenizer).scores([written("1" * 30)])


def test_grpo_is_rewarded_by_it(stages):
    (line,) = metrics(stages.parents[1], "grpo")
    assert line["reward/reverse_likelihood"] < 0
    total = line["reward/digits"] + 0.1 * line["reward/reverse_likelihood"]
    assert line["reward"] == pytest.approx(total, abs=1e-4)


def test_an_evaluation_chooses_by_it(stages):
    rows = [json.loads(x) for x in (stages / "evaluation/grpo.jsonl").read_text("utf-8").splitlines()]
    sampled = [row for row in rows if row["mode"] == "sampled"]
    judge = load_judge(stages / "back/final", Model(), policy(stages / "grpo/final"))
    for row in sampled[:3]:
        ended = "stop" if row["finish"] == "stop" else "length"
        group = written(row["completion"], prompt=row["prompt"], finish=ended)
        assert row["judged"] == pytest.approx(judge.scores([group])[0], abs=1e-4)


def test_with_adapters_it_shares_the_base_and_scores_the_same(tmp_path):
    run(tmp_path, STAGES, LORA)
    base, back = tmp_path / "runs/run/sft/final", tmp_path / "runs/run/back/final"
    writer = lora_policy(base)
    shared = load_judge(back, Model(), writer, name="back")
    assert isinstance(shared, ReverseJudge)
    assert "back" in writer.model.peft_config
    alone = reverse_policy(back)
    expected = ReverseJudge(alone, "policy", alone.tokenizer).scores([written("15", "7")])
    assert shared.scores([written("15", "7")]) == pytest.approx(expected, abs=1e-5)
    assert metrics(tmp_path, "grpo")[0]["reward/reverse_likelihood"] < 0


# --- Commands


def test_sample_says_what_comes_before(stages):
    texts = sample(str(stages / "back"), "=3", sampling=FEW, n=4, seed=3)
    assert len(set(texts)) > 1
    back = reverse_policy(stages / "back/final")
    (greedy,) = sample(str(stages / "back"), "=3", sampling=greedily(FEW))
    ids = [BEGIN, 7, 15]
    for _ in range(4):
        back.model.set_attn_implementation("eager")
        ids.append(int(back.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == END:
            break
    said = [token for token in ids[3:] if token != END]
    assert greedy == back.tokenizer.decode(said[::-1])


def test_sample_has_no_best_and_no_stop_backwards(stages):
    with pytest.raises(ModelError, match="it reads backwards; leave out --best-of, --stop and --engine"):
        sample(str(stages / "back"), "3", sampling=FEW, best_of=2, judge=str(stages / "back"))
    with pytest.raises(ModelError, match="it reads backwards"):
        sample(str(stages / "back"), "3", sampling=Sampling(max_new_tokens=4, stop=["="]))


def test_sample_takes_the_best_of_several_by_it(stages):
    final = str(stages / "grpo/final")
    every = sample(final, "12+34=", sampling=FEW, n=6)
    (best,) = sample(final, "12+34=", sampling=FEW, best_of=6, judge=str(stages / "back"))
    judge = load_judge(stages / "back/final", Model(), policy(Path(final)))
    scores = judge.scores([written(*every, prompt="12+34=")])
    assert scores[every.index(best)] == pytest.approx(max(scores), abs=1e-5)


def test_infill_ranks_middles(stages, monkeypatch):
    # Which precision is quicker depends on what else the machine does.
    monkeypatch.setattr(checkpoint, "decide_bfloat16", lambda *_: False)
    found, sampled = infill_text(str(stages / "sft"), str(stages / "back"), "12+", "=15", n=3, sampling=FEW, seed=1)
    assert 6 <= sampled <= 24
    scores = [m.score for _, m in found]
    assert scores == sorted(scores, reverse=True)
    text, best = found[0]
    ahead, back = policy(stages / "sft/final"), reverse_policy(stages / "back/final")
    m = back.tokenizer.encode(text)
    assert best.forward == pytest.approx(log_p(ahead, [BEGIN, 5, 6, 14, *m, 15, 5, 9, END], 4), abs=1e-4)
    assert best.reverse == pytest.approx(log_p(back, [BEGIN, 9, 5, 15, *m[::-1], 14, 6, 5, END], 4), abs=1e-4)
    bare, _ = infill_text(
        str(stages / "sft"), str(stages / "back"), "12+", "=15", n=3, sampling=FEW, seed=1, begin=False
    )
    forward = {text: m.forward for text, m in bare}[""]
    assert forward == pytest.approx(log_p(ahead, [5, 6, 14, 15, 5, 9, END], 3), abs=1e-4)


@pytest.mark.parametrize(
    ("forward", "reverse", "said"),
    [("sft", "grpo", "grpo/final: it reads forwards"), ("back", "back", "back/final: it reads backwards")],
)
def test_infill_refuses_a_model_that_reads_the_wrong_way(stages, forward, reverse, said, monkeypatch, capsys):
    words = ["goals", "infill", str(stages / forward), str(stages / reverse), "1", "2"]
    monkeypatch.setattr(sys, "argv", ["rlpost", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_infill_refuses_two_tokenizers(stages, tmp_path):
    other = {**MODEL, "tokenizer": {"kind": "characters", "alphabet": "=+9876543210"}}
    run(tmp_path, {"sft": {**SFT, "steps": 1}}, model=other)
    with pytest.raises(ModelError, match="have different tokenizers; train both from one model"):
        infill_text(str(tmp_path / "runs/run"), str(stages / "back"), "1", "2", n=1, sampling=FEW)
