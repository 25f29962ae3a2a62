"""On a GPU a model says, learns and samples what it does on a CPU, up to rounding, and waits as rarely as is told."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import warnings
from dataclasses import replace

import golden
import pytest
import torch
from exactness import sample_groups
from families import VOCABULARY, EndTokenOnly, tiny
from flat_layouts import random_options, random_segments, tensors
from invariance import WHOLE, gap, measured
from stage_updates import CASES
from tiny_folders import save
from worlds import World

from rlpost.engine.local import LocalEngine
from rlpost.engine.params import Sampling
from rlpost.objectives.weights import token_mean
from rlpost.policy import adapters
from rlpost.policy.attention import FLAT, AttentionOptions, use_attention
from rlpost.policy.check import probe_groups
from rlpost.policy.kernel_check import FLEX, VARLEN, exact_kernels
from rlpost.policy.layout import FlatLayout
from rlpost.policy.load import decide_bfloat16, load_policy, remove_dropout
from rlpost.policy.params import Lora, Model, Precision
from rlpost.policy.policy import Policy
from rlpost.policy.score import logprobs
from rlpost.policy.segment_attention import TILES, Kernels
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner
from rlpost.types import Group, Request

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

FAMILIES = ["llama", "mistral", "gemma2", "gpt2"]
ROUNDING = 1e-3
"""Of a gradient in float32, relative to its length: kernels add in other orders."""


class Tokens(EndTokenOnly):
    """A tokenizer for completions that nobody reads."""

    def decode(self, ids: list[int], **_) -> str:
        return " ".join(map(str, ids))


def policy_on(device: str, family: str = "llama", lora: bool = False, kernels: Kernels = TILES) -> Policy:
    model = tiny(family, wide=family == "llama")
    remove_dropout(model)
    use_attention(model, FLAT)
    if lora:
        torch.manual_seed(0)
        model = adapters.add_policy_adapter(model.requires_grad_(False), Lora(r=2, alpha=4.0))
    return Policy(model.to(device), Tokens(), flat=True, kernels=kernels).eval()


def packed(groups: list[Group]) -> list[Group]:
    """Without shared prompts."""
    return [Group(g.prompt, (c,)) for g in groups for c in g.completions]


def learning(policy: Policy, **settings) -> tuple[Learner, Experience]:
    experience = Experience(tuple(sample_groups(VOCABULARY)))
    weight_N = token_mean(experience.rows, experience.rows.actions)
    return Learner(policy, learning_rate=1e-2, **settings), experience.with_actions(weight=weight_N)


def nll(output, part):
    return -(output.logp_N * part["weight"]).sum(), {"nll": -output.logp_N.detach()}


# --- Attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flex_attention_gives_what_tiles_give_and_so_do_its_gradients(dtype):
    draw = random.Random(0)
    for number in range(30):
        segments, tokens = random_segments(draw, shared=number % 4 > 0)
        options = random_options(draw)
        compared(segments, tokens, options, FLEX, tensors(draw, tokens, 4, draw.choice([1, 2, 4]), dtype, width=32))


def test_flash_attention_gives_what_tiles_give_and_so_do_its_gradients():
    draw = random.Random(1)
    for _ in range(30):
        segments, tokens = random_segments(draw, shared=False)
        options = AttentionOptions(draw.choice([None, 0.3]), random_options(draw).window)
        inputs = tensors(draw, tokens, 4, draw.choice([1, 2, 4]), torch.bfloat16, width=32)
        compared(segments, tokens, options, VARLEN, inputs)


def compared(segments, tokens, options, kernels, inputs) -> None:
    """With tiles in float64 on the CPU, forward and backward."""
    found, expected = [], []
    for device, these, to, dtype in (("cpu", TILES, expected, torch.float64), ("cuda", kernels, found, None)):
        layout = FlatLayout(segments, tokens)
        layout.kernels = these
        own = [x.to(device, dtype).requires_grad_() for x in inputs]
        out = layout.to(device).attend(*own, options)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
        to += [out, *torch.autograd.grad((out * cotangent).sum(), own)]
    most = 2e-2 if inputs[0].dtype == torch.bfloat16 else 1e-5
    for a, b in zip(found, expected, strict=True):
        assert float((a.cpu().double() - b).norm() / b.norm().clamp_min(1e-6)) < most, (segments, options)


# --- Loading


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_runs_in_the_kernels_and_says_what_it_says_on_a_cpu(family, tmp_path):
    folder = save(tmp_path / family, tiny(family, wide=family == "llama"))
    here = load_policy(folder, Model(path=str(folder)))
    there = load_policy(folder, Model(path=str(folder)), device="cuda")
    assert there.flat
    assert there.kernels.flex or family != "llama"
    groups = sample_groups(VOCABULARY)
    for some in (groups, packed(groups)):
        assert float((logprobs(there, some) - logprobs(here, some)).abs().max()) < 1e-3


def test_in_bfloat16_packed_rows_run_in_flash_attention():
    policy = policy_on("cuda")
    policy.in_bfloat16 = True
    found, reason = exact_kernels(policy, probe_groups(policy.vocabulary, policy.max_positions))
    assert (found, reason) == (Kernels(flex=True, varlen=True), "")
    groups = packed(sample_groups(VOCABULARY))
    tiles = logprobs(policy, groups)
    policy.kernels = VARLEN
    assert float((logprobs(policy, groups) - tiles).abs().mean()) < 0.05


def test_autocast_is_near_float32_and_learns():
    assert decide_bfloat16(Precision.auto, "cuda") == torch.cuda.is_bf16_supported(including_emulation=False)
    policy = policy_on("cuda")
    groups = sample_groups(VOCABULARY)
    wide = logprobs(policy, groups)
    policy.in_bfloat16 = True
    assert float((logprobs(policy, groups) - wide).abs().mean()) < 0.05
    learner, experience = learning(policy)
    lines = [learner.update(nll, experience) for _ in range(20)]
    assert lines[-1]["nll"] < 0.8 * lines[0]["nll"]


# --- Updates


@pytest.mark.parametrize("name", CASES)
def test_every_stages_update_is_that_of_a_cpu(name):
    found, expected = (
        measured(CASES[name](world), world, WHOLE)[0]
        for world in (World("llama", torch.float32, device) for device in ("cuda", "cpu"))
    )
    assert max(gap((found[0].cpu(), found[1]), expected)) < ROUNDING


@pytest.mark.parametrize("kernels", [TILES, FLEX], ids=["tiles", "flex"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_steps_are_those_of_a_cpu(lora, kernels):
    ends = {}
    for device in ("cpu", "cuda"):
        learner, experience = learning(policy_on(device, lora=lora, kernels=kernels if device == "cuda" else TILES))
        lines = [learner.update(nll, experience) for _ in range(3)]
        ends[device] = lines
    for here, there in zip(ends["cpu"], ends["cuda"], strict=True):
        assert there == pytest.approx(here, rel=ROUNDING, abs=ROUNDING)


@pytest.mark.parametrize("budget", [10**6, 60])
@pytest.mark.parametrize("name", ["sft nll", "grpo token_mean", "grpo kl in loss", "dpo dpo, nll", "ppo critic"])
def test_an_update_waits_for_the_device_twice(name, budget):
    """For its metrics, and for the gradient's norm."""
    world = World("llama", torch.float32, "cuda")
    case = CASES[name](world)
    model = world.scalar() if case.scalar else world.policy()
    learner = Learner(model, learning_rate=1e-3, max_tokens_per_microbatch=budget, whole_groups=case.whole_groups)
    update = case.prepare(list(range(len(case.groups))), learner)
    learner.update(update.loss, update.experience, update.stats)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            learner.update(update.loss, update.experience, update.stats)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in said if "synchronizing CUDA operation" in str(w.message)]
    assert len(waits) == 2, [f"{w.filename}:{w.lineno}" for w in waits]


def test_forward_and_backward_wait_for_nothing():
    policy = policy_on("cuda")
    learner, experience = learning(policy)
    learner.update(nll, experience)
    policy.train()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        total, _ = nll(policy(policy.batch(experience.groups)), experience.to("cuda"))
        total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_learner_that_goes_on_from_its_state_ends_with_the_same_bits(deterministic):
    def learner_of() -> tuple[Learner, Experience]:
        return learning(policy_on("cuda", kernels=FLEX))

    through, experience = learner_of()
    for _ in range(4):
        through.update(nll, experience)
    first, _ = learner_of()
    for _ in range(2):
        first.update(nll, experience)
    weights = {n: x.clone() for n, x in first.weights().items()}
    moments = {n: x.clone() for n, x in first.optimizer_state().items()}
    second, _ = learner_of()
    second.load(weights, moments, first.updates)
    for _ in range(2):
        second.update(nll, experience)
    assert all(torch.equal(x, second.weights()[n]) for n, x in through.weights().items())


# --- Sampling


@pytest.mark.parametrize("more", [{}, {"top_k": 5, "top_p": 0.9, "min_p": 0.01}, {"temperature": 0.0}], ids=str)
def test_a_seed_gives_the_same_tokens_with_the_scorers_log_probabilities(more):
    policy = policy_on("cuda")
    engine = LocalEngine(policy)
    engine.update_weights(policy, 0)
    sampling = Sampling(max_new_tokens=12).model_copy(update=more)
    requests = [Request(g.prompt, 4, sampling, seed=i) for i, g in enumerate(sample_groups(VOCABULARY)[:3])]
    once, again = engine.generate(requests), engine.generate(requests)
    for a, b in zip(once, again, strict=True):
        assert [c.ids.tolist() for c in a] == [c.ids.tolist() for c in b]
    if more:
        return
    groups = [
        Group(r.prompt, tuple(replace(c, reward=0.0) for c in some)) for r, some in zip(requests, once, strict=True)
    ]
    sampled = torch.cat([torch.tensor(c.logprobs) for g in groups for c in g.completions])
    assert float((logprobs(policy, groups) - sampled).abs().max()) < 1e-3


# --- The command line


def trained(folder, *words: str) -> list[dict]:
    """The metrics of the golden run of `sft`."""
    golden.write_recipe({run.key: run for run in golden.listed()}["sft"], folder)
    env = {**os.environ, "ACCELERATE_USE_CPU": "false"}
    command = [sys.executable, "-m", "rlpost", "train", str(folder / "tiny.yaml"), *words]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "runs/run/sft/metrics.jsonl").read_text("utf-8").splitlines()]


def test_a_run_goes_through_and_is_that_of_a_cpu(tmp_path, monkeypatch):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "without").mkdir()
    found = trained(tmp_path / "gpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    expected = trained(tmp_path / "without")
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_ranks_by_nccl_learn_what_one_does(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = trained(tmp_path / "one"), trained(tmp_path / "two", "parallel.processes=2")
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-2)
