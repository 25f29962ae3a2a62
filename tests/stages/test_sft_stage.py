"""Supervised fine-tuning from a recipe to a checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from moved import assert_only_the_policy_moved
from tiny_recipes import LORA, MODEL, SFT, base, greedy, group, jsonl, metrics, policy, run, weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlpost.errors import DataError, DivergedError, ModelError, RecipeError
from rlpost.policy.load import load_policy
from rlpost.policy.score import logprobs
from rlpost.stages import sft as stage

ROWS = [{"prompt": f"{n}+1=", "completion": f"{n + 1}" * (1 + n % 3)} for n in range(6)]
MEMORISE = {**SFT, "data": {"rows": {"path": "rows.jsonl"}}, "batch_size": 6, "steps": 60}
MEMORISE |= {"learning_rate": 2e-2, "schedule": "cosine", "warmup": 5}


def test_a_few_rows_are_learned_by_heart(tmp_path):
    jsonl(tmp_path / "rows.jsonl", ROWS)
    final = run(tmp_path, {"sft": MEMORISE})
    lines = metrics(tmp_path, "sft")
    assert lines[0]["nll"] > 2
    assert lines[-1]["nll"] < 0.01
    trained = policy(final)
    assert greedy(trained, *(row["prompt"] for row in ROWS)) == [row["completion"] for row in ROWS]
    assert all(not torch.equal(w, weights(final)[name]) for name, w in weights(base(tmp_path)).items())


def test_an_adapter_learns_and_the_base_stays(tmp_path):
    jsonl(tmp_path / "rows.jsonl", ROWS)
    final = run(tmp_path, {"sft": MEMORISE}, LORA)
    lines = metrics(tmp_path, "sft")
    assert lines[-1]["nll"] < 0.2 * lines[0]["nll"]
    moved = weights(final)
    assert all(("lora_A" in name) or ("lora_B" in name) for name in moved)
    assert all(float(w.abs().max()) > 0 for w in moved.values())
    assert not list(final.glob("model*.safetensors"))
    trained, untrained = policy(final), policy(base(tmp_path))
    frozen = dict(trained.causal_lm.named_parameters())
    for name, w in untrained.causal_lm.named_parameters():
        wrapped = name.replace("_proj.", "_proj.base_layer.")
        assert torch.equal(frozen[wrapped], w), name
    question = [group(trained, row["prompt"], row["completion"]) for row in ROWS]
    assert float(-logprobs(trained, question).mean()) < 0.3 * float(-logprobs(untrained, question).mean())


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        # Completions of 2, 3 and 4 tokens, their end token included; max_length is 16.
        ("token_mean", lambda a, b, c: (a.sum() + b.sum() + c.sum()) / 9),
        ("sequence_mean", lambda a, b, c: (a.mean() + b.mean() + c.mean()) / 3),
        ("sequence_sum", lambda a, b, c: (a.sum() + b.sum() + c.sum()) / 3),
        ("constant_length", lambda a, b, c: (a.sum() + b.sum() + c.sum()) / 3 / 16),
    ],
)
def test_the_first_loss_is_what_the_base_model_says_by_hand(tmp_path, weight, expected):
    jsonl(tmp_path / "rows.jsonl", ROWS[:3])
    settings = {**MEMORISE, "batch_size": 3, "steps": 1, "weight": weight, "max_tokens_per_microbatch": 1}
    run(tmp_path, {"sft": settings})
    model = policy(base(tmp_path))
    nll = [-logprobs(model, [group(model, row["prompt"], row["completion"])]) for row in ROWS[:3]]
    assert [len(x) for x in nll] == [2, 3, 4]
    (line,) = metrics(tmp_path, "sft")
    assert line["loss"] == pytest.approx(float(expected(*nll)), rel=1e-5)
    assert line["nll"] == pytest.approx(float(torch.cat(nll).mean()), rel=1e-5)
    assert line["tokens"] == 9


def test_what_is_logged(tmp_path):
    run(tmp_path, {"sft": {**SFT, "log_every": 2}})
    lines = metrics(tmp_path, "sft")
    assert [line["step"] for line in lines] == [2, 4]
    assert [set(line) for line in lines] == 2 * [{"step", "loss", "nll", "tokens", "grad_norm", "learning_rate"}]
    assert [line["learning_rate"] for line in lines] == pytest.approx([2e-2 * 0.75, 2e-2 * 0.25])
    timings = (tmp_path / "runs/run/sft/timings.jsonl").read_text("utf-8").splitlines()
    rates = {"tokens_per_second", "samples_per_second"}
    assert [set(json.loads(line)) for line in timings] == 2 * [{"step", "seconds", "peak_memory", *rates}]
    for line in map(json.loads, timings):
        assert line["tokens_per_second"] == pytest.approx(4 * line["samples_per_second"])
        assert line["samples_per_second"] * line["seconds"] == pytest.approx(SFT["batch_size"])


def test_epochs_are_steps_enough_to_see_every_row_so_often(tmp_path):
    run(tmp_path, {"sft": {**SFT, "steps": None, "epochs": 2.5, "batch_size": 24}})
    assert len(metrics(tmp_path, "sft")) == 7  # 2.5 * 64 / 24 = 6.67
    assert sum(line["tokens"] for line in metrics(tmp_path, "sft")) == 7 * 24 * 4


def distributions(folder, rows) -> tuple[Tensor, Tensor]:
    """[N, V] log-probabilities before each token of the rows' completions, by transformers alone; [N] the tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), policy(folder).tokenizer
    logp, targets = [], []
    for row in rows:
        asked = tokenizer.encode(row["prompt"])
        said = [*tokenizer.encode(row["completion"]), tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([asked + said])).logits[0]
        logp.append(logits[len(asked) - 1 : -1].double().log_softmax(-1))
        targets += said
    return torch.cat(logp), torch.tensor(targets)


LOSSES = {
    "dynamic_fine_tuning": ({"fn": "dynamic_fine_tuning"}, lambda logp, _: -logp.exp() * logp),
    "label_smoothing": (
        {"fn": "label_smoothing", "args": {"epsilon": 0.2}},
        lambda logp, every: -0.8 * logp - 0.2 * every.mean(-1),
    ),
    "unlikelihood": ({"fn": "unlikelihood"}, lambda logp, _: -(1 - logp.exp()).log()),
    "their own": (
        {"fn": "mine.py:squared", "args": {"times": 3.0}},
        lambda logp, every: 3 * (logp - every.amax(-1)) ** 2,
    ),
}


@pytest.mark.parametrize("lora", [(), (LORA,)], ids=["full", "lora"])
def test_other_losses_are_named_in_the_recipe(tmp_path, lora):
    """The first loss of each by hand; the last is a user's, which asks for all that there is to know of the data."""
    jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "mine.py").write_text(
        "def squared(logp_NV, target_N, *, times):\n"
        "    return times * (logp_NV.gather(1, target_N[:, None])[:, 0] - logp_NV.amax(-1)) ** 2\n"
    )
    one = {**MEMORISE, "start": "base", "steps": 1, "warmup": 0, "max_tokens_per_microbatch": 20}
    run(tmp_path, {name.replace(" ", "_"): {**one, "loss": loss} for name, (loss, _) in LOSSES.items()}, *lora)
    logp_NV, target_N = distributions(base(tmp_path), ROWS)
    logp_N = logp_NV.gather(1, target_N[:, None])[:, 0]
    for name, (_, by_hand) in LOSSES.items():
        (line,) = metrics(tmp_path, name.replace(" ", "_"))
        assert line["loss"] == pytest.approx(float(by_hand(logp_N, logp_NV).mean()), rel=1e-4), name
        assert line["nll"] == pytest.approx(-float(logp_N.mean()), rel=1e-5)


def test_smoothed_labels_are_not_learned_by_heart(tmp_path):
    """With ε of 16 tokens spread, the least loss has 1 − ε + ε/16 at the target: its −log is 0.236 for ε = 0.225."""
    jsonl(tmp_path / "rows.jsonl", ROWS)
    loss = {"fn": "label_smoothing", "args": {"epsilon": 0.225}}
    run(tmp_path, {"sft": {**MEMORISE, "loss": loss}})
    assert metrics(tmp_path, "sft")[-1]["nll"] == pytest.approx(0.236, abs=0.05)


def test_unlikely_is_what_it_makes_of_the_rows(tmp_path):
    jsonl(tmp_path / "rows.jsonl", ROWS)
    run(tmp_path, {"good": MEMORISE, "bad": {**MEMORISE, "loss": {"fn": "unlikelihood"}, "steps": 20}})
    first, *_, last = metrics(tmp_path, "bad")
    assert first["nll"] < 0.1
    assert last["nll"] > 2


IMITATIONS = {
    "forward_kl": lambda student, teacher: (teacher.exp() * (teacher - student)).sum(-1),
    "reverse_kl": lambda student, teacher: (student.exp() * (student - teacher)).sum(-1),
    "jensen_shannon": lambda student, teacher: (
        0.25 * towards_mixture(teacher, student, 0.25) + 0.75 * towards_mixture(student, teacher, 0.75)
    ),
}


def towards_mixture(logp: Tensor, other: Tensor, own: float) -> Tensor:
    """[N] KL to a mixture of which so much is its own."""
    mixture = (own * logp.exp() + (1 - own) * other.exp()).log()
    return (logp.exp() * (logp - mixture)).sum(-1)


@pytest.mark.parametrize("lora", [(), (LORA,)], ids=["full", "lora"])
def test_a_teacher_is_imitated_and_does_not_move(tmp_path, lora, monkeypatch):
    jsonl(tmp_path / "rows.jsonl", ROWS)
    teachers = []

    def record(*args, **options):
        teachers.append(load_policy(*args, **options))
        return teachers[-1]

    monkeypatch.setattr(stage, "load_policy", record)
    args = {"forward_kl": {}, "reverse_kl": {}, "jensen_shannon": {"mix": 0.25}}
    learns = {**MEMORISE, "start": "base", "teacher": "sft", "steps": 12, "schedule": "constant", "warmup": 0}
    learns["max_tokens_per_microbatch"] = 30
    stages = {name: {**learns, "loss": {"fn": name, "args": args[name]}} for name in IMITATIONS}
    final = tmp_path / "runs/run/sft/final"
    run(tmp_path, {"sft": {**MEMORISE, "steps": 10}, **stages}, *lora)
    student_NV, target_N = distributions(base(tmp_path), ROWS)
    teacher_NV, _ = distributions(final, ROWS)
    for name, by_hand in IMITATIONS.items():
        first, *_, last = metrics(tmp_path, name)
        expected_N = by_hand(student_NV, teacher_NV)
        assert float(expected_N.min()) > 0
        assert first["loss"] == pytest.approx(float(expected_N.mean()), rel=1e-4)
        assert first["nll"] == pytest.approx(-float(student_NV.gather(1, target_N[:, None]).mean()), rel=1e-5)
        assert last["loss"] < 0.3 * first["loss"]
        assert_only_the_policy_moved(tmp_path, name, bool(lora))
    assert len(teachers) == 3
    saved = dict(policy(final).named_parameters())
    for teacher in teachers:
        assert all(torch.equal(p, saved[name]) for name, p in teacher.named_parameters())


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path):
    other = {**MODEL, "tokenizer": {"kind": "characters", "alphabet": "0123456789=+"}}
    folder = run(tmp_path, {"sft": {**SFT, "steps": 1}}, "run=other", model=other)
    imitates = {**SFT, "teacher": str(folder), "loss": {"fn": "forward_kl"}}
    with pytest.raises(ModelError, match=r"stages\.sft\.teacher: .*another vocabulary"):
        run(tmp_path, {"sft": imitates})


def test_a_users_loss_that_imitates_needs_a_teacher(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def near(logp_NV, teacher_NV):\n    return ((logp_NV - teacher_NV) ** 2).sum(-1)\n"
    )
    with pytest.raises(RecipeError, match=r"stages\.sft\.teacher: missing - near imitates a teacher"):
        run(tmp_path, {"sft": {**SFT, "loss": {"fn": "mine.py:near"}}})
    # The base is its own teacher: there is nothing to learn.
    run(tmp_path, {"sft": {**SFT, "steps": 1, "loss": {"fn": "mine.py:near"}, "teacher": "base"}}, "run=taught")
    assert metrics(tmp_path, "sft", "taught")[0]["loss"] == pytest.approx(0, abs=1e-6)


def test_the_seed_is_all_that_chance_hangs_on(tmp_path):
    finals = [
        run(tmp_path, {"sft": SFT}, f"run={name}", f"seed={seed}") for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    one, same, other = (weights(final) for final in finals)
    assert all(torch.equal(w, same[name]) for name, w in one.items())
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert metrics(tmp_path, "sft", "a") == metrics(tmp_path, "sft", "b") != metrics(tmp_path, "sft", "c")
    # From the same model too: the seed also deals the rows.
    model = {"path": str(base(tmp_path, "a")), "precision": "float32"}
    run(tmp_path, {"sft": SFT}, "run=d", "seed=4", model=model)
    assert metrics(tmp_path, "sft", "d")[0]["nll"] != metrics(tmp_path, "sft", "a")[0]["nll"]


def test_numbers_that_run_away_stop_the_run(tmp_path):
    with pytest.raises(DivergedError, match=r"update \d: the gradient of \S+ is not finite.*learning_rate"):
        run(tmp_path, {"sft": {**SFT, "learning_rate": 1e30}})
    assert not (tmp_path / "runs/run/sft/DONE").exists()


def test_no_row_is_longer_than_the_model_has_positions(tmp_path, capsys):
    jsonl(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "completion": "2" * n} for n in (1, 40)])
    stage = {**SFT, "data": {"rows": {"path": "rows.jsonl"}}, "steps": 1, "max_length": 64}
    with pytest.raises(DataError, match=r"rows.jsonl:2\) has 45 tokens, the limit is 32, the positions of the model"):
        run(tmp_path, {"sft": stage})
    run(tmp_path, {"sft": {**stage, "too_long": "drop"}}, "run=dropped")
    assert "limited by the model's 32 positions" in capsys.readouterr().err


def test_several_completions_of_a_row_train_as_rows_of_their_own(tmp_path):
    """Token means are over the same tokens, whether a prompt stands once or again and again."""
    answers = {"1+2=": ["31", "3", "42"], "4+4=": ["8", "81"]}
    jsonl(tmp_path / "together.jsonl", [{"prompt": p, "completions": c} for p, c in answers.items()])
    jsonl(tmp_path / "alone.jsonl", [{"prompt": p, "completion": c} for p, own in answers.items() for c in own])
    for name, rows in (("together", 2), ("alone", 5)):
        settings = {**SFT, "data": {"rows": {"path": f"{name}.jsonl"}}, "batch_size": rows, "steps": 3}
        run(tmp_path, {"sft": settings}, f"run={name}")
    together, alone = (metrics(tmp_path, "sft", name) for name in ("together", "alone"))
    for one, other in zip(together, alone, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["nll"] == pytest.approx(other["nll"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
