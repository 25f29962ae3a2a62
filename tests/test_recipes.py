"""Every recipe that comes with rlpost runs: two steps of each stage on a tiny model, with data in its own format."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_recipes import jsonl
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM

from rlpost.data.params import Tokenizer, TokenizerKind
from rlpost.data.tasks import maze
from rlpost.data.tokenizers import make_tokenizer
from rlpost.goals.maze_escapes import escapes
from rlpost.goals.maze_plot import draw, in_text, plot_mazes, report
from rlpost.goals.maze_run import solved
from rlpost.pipeline import train
from rlpost.recipe.files import packaged
from rlpost.recipe.resolve import resolve
from rlpost.recipe.rules import Leaves

CHATML = (
    "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHOPPING = [
    {
        "question": f"Ann buys {n} apples at $3 each. How much does she pay?",
        "answer": f"Each apple costs $3.\nShe pays {n} * 3 = <<{n}*3={3 * n}>>{3 * n} dollars.\n#### {3 * n}",
    }
    for n in range(2, 14)
]
CONVERSATIONS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {n} and {n}?"},
            {"role": "assistant", "content": f"It is {2 * n}."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ]
    }
    for n in range(6)
]
PREFERRED = [
    {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "Hello!", "rejected": "What?"},
    {"prompt": [{"role": "user", "content": "Bye"}], "chosen": "Good bye.", "rejected": "No."},
]
TWO = ("steps=2", "checkpoint_every=1")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """A folder with a Qwen2 of random weights, whose tokenizer has the ChatML template."""
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = make_tokenizer(
        Tokenizer(kind=TokenizerKind.bpe, vocab_size=400), [row["question"] + row["answer"] for row in SHOPPING]
    )
    marks = [AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token = "<|im_end|>", "<|endoftext|>", None
    tokenizer.chat_template = CHATML
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=len(tokenizer) + 5,  # padded, as published ones are
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory) -> Path:
    """The published files with other rows: jsonl, example solutions, and the hub's folder with its configurations."""
    folder = tmp_path_factory.mktemp("gsm8k")
    jsonl(folder / "train.jsonl", SHOPPING[:8])
    jsonl(folder / "test.jsonl", SHOPPING)
    solved = [
        {
            "question": row["question"],
            "ground_truth": row["answer"].replace("#### ", "A: "),
            "6B_finetuning": {"solution": "She pays 5.\nA: 5", "is_correct": False},
            "175B_verification": {"solution": row["answer"].replace("#### ", "A: "), "is_correct": True},
        }
        for row in SHOPPING
    ]
    jsonl(folder / "example_model_solutions.jsonl", solved)
    hub = folder / "hub"
    (hub / "main").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(SHOPPING[:8]), hub / "main/train-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(SHOPPING[8:]), hub / "main/test-00000-of-00001.parquet")
    splits = "".join(f"  - split: {name}\n    path: main/{name}-*\n" for name in ("train", "test"))
    (hub / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{splits}---\n", "utf-8")
    return folder


def stage(name: str, *settings: str) -> list[str]:
    return [f"stages.{name}.{setting}" for setting in settings]


def run(folder: Path, recipe: str, *overrides: str) -> Path:
    """Train; every stage that trains has logged two steps and every model was evaluated."""
    resolved = resolve(recipe, [f"runs={folder}", "threads=1", "model.precision=float32", *overrides])
    final = train(resolved)
    for name, settings in resolved.config.stages.items():
        if settings.enabled and settings.leaves is not Leaves.rows:
            lines = (folder / recipe / name / "metrics.jsonl").read_text("utf-8").splitlines()
            assert [json.loads(line)["step"] for line in lines] == [1, 2]
            assert all(json.loads(line)["loss"] is not None for line in lines)
    measured = sorted(f.stem for f in (folder / recipe / "evaluation").glob("*.json"))
    trained = [name for name, s in resolved.config.stages.items() if s.enabled and s.leaves is Leaves.policy]
    assert measured == (sorted(["base", *trained]) if resolved.config.evaluation else [])
    return final


def test_demo(tmp_path):
    small = [f"model.config.{key}" for key in ("hidden_size=32", "intermediate_size=48", "num_hidden_layers=1")]
    final = run(
        tmp_path,
        "demo",
        *small,
        *stage("sft", *TWO, "batch_size=8"),
        # The model is far from a right answer yet: pairs of short and long ones.
        *stage("pairs", "prompts=32", "rewards=[{fn: length, args: {target: 3}}]"),
        *stage("dpo", *TWO, "epochs=null", "batch_size=4"),
        *stage("grpo", *TWO, "prompts_per_step=4"),
        "evaluation.data.held_out.limit=8",
    )
    assert final == tmp_path / "demo/grpo/final"


TINY = [f"model.config.{key}" for key in ("hidden_size=32", "intermediate_size=48", "num_hidden_layers=1")]


def test_demo_ppo(tmp_path):
    final = run(
        tmp_path,
        "demo_ppo",
        *TINY,
        *stage("sft", *TWO, "batch_size=8"),
        *stage("pairs", "prompts=32", "rewards=[{fn: length, args: {target: 3}}]"),
        *stage("dpo", *TWO, "epochs=null", "batch_size=4"),
        *stage("ppo", *TWO, "prompts_per_step=4", "critic.warmup_steps=0"),
        "evaluation.data.held_out.limit=8",
    )
    assert final == tmp_path / "demo_ppo/ppo/final"


def test_calculator(tmp_path):
    run(
        tmp_path,
        "calculator",
        *TINY,
        *stage("sft", *TWO, "batch_size=8"),
        *stage("grpo", *TWO, "prompts_per_step=4"),
        *stage("ppo", *TWO, "prompts_per_step=4", "critic.warmup_steps=0"),
        "evaluation.data.held_out.limit=8",
    )


@pytest.mark.slow
def test_distill(tmp_path):
    small = [*TINY, *stage("sft", *TWO, "batch_size=8"), "evaluation.data.held_out.limit=8"]
    run(tmp_path, "distill_teacher", *small)
    final = run(
        tmp_path,
        "distill",
        *small,
        *stage("distill", *TWO, "prompts_per_step=4"),
        f"vars.teacher={tmp_path}/distill_teacher",
    )
    assert final == tmp_path / "distill/distill/final"


@pytest.mark.slow
def test_running_sum(tmp_path):
    run(
        tmp_path,
        "running_sum",
        *TINY,
        *stage("sft", *TWO, "batch_size=8"),
        *stage("grpo", *TWO, "prompts_per_step=4"),
        *stage("ppo", *TWO, "prompts_per_step=4", "critic.warmup_steps=0"),
        "evaluation.data.held_out.limit=8",
    )


@pytest.mark.slow
def test_tictactoe(tmp_path):
    # What a model of two steps writes is no move: the stop string ends its turns anyway.
    small = [*TINY, *stage("sft", *TWO, "batch_size=8"), *stage("grpo", *TWO, "prompts_per_step=4", "group_size=2")]
    final = run(tmp_path, "tictactoe_self_play", *small, "evaluation.samples=1", "evaluation.data.held_out.limit=2")
    assert final == tmp_path / "tictactoe_self_play/grpo/final"
    # It is the other recipe but for the opponent.
    whole, other = resolve("tictactoe").config, resolve("tictactoe_self_play").config
    assert other.stages["sft"] == whole.stages["sft"]
    changed = {"environment": whole.stages["grpo"].environment, "opponents": None}
    assert other.stages["grpo"].model_copy(update=changed) == whole.stages["grpo"]


@pytest.mark.slow
def test_programs(tmp_path):
    run(
        tmp_path,
        "programs",
        *TINY,
        *stage("sft", *TWO, "batch_size=8"),
        *stage("grpo", *TWO, "prompts_per_step=4", "sampling.max_new_tokens=8"),
        "evaluation.data.held_out.limit=8",
    )


SMALL_EPISODES = ["prompts_per_step=4", "group_size=2"]


def test_tool_calculator(tmp_path):
    few = [*stage("sft", *TWO, "batch_size=8"), *stage("grpo", *TWO, *SMALL_EPISODES)]
    run(tmp_path, "tool_calculator", *TINY, *few, "evaluation.data.held_out.limit=8")


@pytest.mark.slow
def test_tool_search(tmp_path):
    few = [*stage("sft", *TWO, "batch_size=8"), *stage("grpo", *TWO, *SMALL_EPISODES)]
    run(tmp_path, "tool_search", *TINY, *few, "evaluation.data.held_out.limit=8")


@pytest.mark.slow
def test_tool_search_echo(tmp_path):
    few = [*stage("sft", *TWO, "batch_size=8"), *stage("grpo", *TWO, *SMALL_EPISODES)]
    final = run(tmp_path, "tool_search_echo", *TINY, *few, "evaluation.data.held_out.limit=8")
    lines = [json.loads(line) for line in (final.parent / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 2


TINY_GPT2 = [f"model.config.{key}" for key in ("n_embd=32", "n_layer=1", "n_head=2")]


def test_maze(tmp_path, capsys):
    final = run(
        tmp_path,
        "maze",
        *TINY_GPT2,
        "vars.mazes=1",
        *stage("sft", *TWO, "batch_size=8"),
        *stage("value", *TWO, "prompts_per_step=4"),
        *stage("ppo", *TWO, "prompts_per_step=4", "critic.warmup_steps=0"),
    )
    found = solved(final.parents[1])
    assert [s.maze for s in found] == [maze.train(mazes=1)[0]["maze"]]
    capsys.readouterr()
    picture = plot_mazes(final.parents[1], tmp_path / "maze.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().err.splitlines()
    assert len(in_text(found[0])) == maze.SIDE
    trained, held_out = report(found)
    assert trained.startswith(f"starts trained on: {len(maze.train(mazes=1))}, optimal moves ")
    assert ", mean |V − exact| 0." in trained
    assert held_out.startswith(f"starts held out: {len(maze.held_out(mazes=1))}, ")
    names = ["random walker", "led by its value network", "policy"]
    assert [line.split(",")[0] for line in said if "of walks escape" in line] == names
    assert set(in_text(found[0])) <= set(said)
    # The value network's values of the cells go into the prompts of another policy.
    rows = final.parents[1] / "value_annotations/final/rows.jsonl"
    small = [
        *TINY_GPT2,
        f"vars.rows={rows}",
        *stage("sft", *TWO, "batch_size=8"),
        *stage("ppo", *TWO, "prompts_per_step=4"),
    ]
    run(tmp_path, "maze_value_annotations", *small, "stages.ppo.critic.warmup_steps=0")
    (prompt, *_) = [json.loads(x) for x in rows.read_text("utf-8").splitlines()]
    (read,) = maze.read_value_annotations(prompt, part="train")
    assert read["prompt"].translate(str.maketrans("0123456789", "." * 10)) == prompt["prompt"]


@pytest.mark.slow
def test_maze_grpo(tmp_path):
    small = [
        *TINY_GPT2,
        "vars.mazes=1",
        *stage("sft", *TWO, "batch_size=8"),
        *stage("grpo", *TWO, "prompts_per_step=4"),
    ]
    final = run(tmp_path, "maze_grpo", *small)
    assert final == tmp_path / "maze_grpo/grpo/final"
    # Without a value network there is less to draw and to say.
    found = solved(final.parents[1])
    draw(found, tmp_path / "maze.png")
    assert not any("exact" in line for line in report(found))
    assert len(escapes(final.parents[1])) == 2


def test_maze_shaped(tmp_path):
    small = [
        *TINY_GPT2,
        "vars.mazes=1",
        *stage("sft", *TWO, "batch_size=8"),
        *stage("value", *TWO, "prompts_per_step=4"),
    ]
    final = run(tmp_path, "maze_shaped", *small, *stage("grpo", *TWO, "prompts_per_step=4"))
    assert final == tmp_path / "maze_shaped/grpo/final"


def test_gsm8k_tiny(tmp_path, gsm8k):
    small = [f"model.config.{key}" for key in ("hidden_size=32", "intermediate_size=48", "num_hidden_layers=1")]
    run(
        tmp_path,
        "gsm8k_tiny",
        f"vars.data={gsm8k}",
        *small,
        "model.tokenizer.vocab_size=300",
        *stage("sft", *TWO, "epochs=null", "batch_size=4"),
        *stage("dpo", *TWO, "epochs=null", "batch_size=2"),
        *stage("grpo", *TWO, "prompts_per_step=2", "group_size=2", "sampling.max_new_tokens=8"),
        *("evaluation.data.held_out.limit=2", "evaluation.samples=4", "evaluation.sampling.max_new_tokens=8"),
    )


@pytest.mark.parametrize("files", [False, True], ids=["hub", "files"])
def test_grpo_math(tmp_path, qwen, gsm8k, files, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = [f"vars.data={gsm8k}/hub", f"vars.held_out={gsm8k}/hub"]
    if files:
        data = [f"vars.data={gsm8k}/train.jsonl", f"vars.held_out={gsm8k}/test.jsonl", "vars.config=null"]
    final = run(
        tmp_path,
        "grpo_math",
        *data,
        f"model.path={qwen}",
        *stage("grpo", *TWO, "prompts_per_step=2", "group_size=2", "sampling.max_new_tokens=8"),
        *("evaluation.data.held_out.limit=2", "evaluation.sampling.max_new_tokens=8"),
    )
    (first,) = (tmp_path / "grpo_math/grpo/rollouts").glob("step-*.jsonl")
    row = json.loads(first.read_text("utf-8").splitlines()[0])
    assert row["example"]["prompt"][0]["role"] == "user"
    assert float(row["example"]["answer"]) % 3 == 0
    assert (final / "adapter_model.safetensors").is_file()


def test_sft_chat(tmp_path, qwen):
    data = jsonl(tmp_path / "conversations.jsonl", CONVERSATIONS)
    run(tmp_path, "sft_chat", f"vars.data={data}", f"model.path={qwen}", *stage("sft", *TWO, "epochs=null"))


def test_dpo_pairs(tmp_path, qwen):
    data = jsonl(tmp_path / "pairs.jsonl", PREFERRED)
    run(tmp_path, "dpo_pairs", f"vars.data={data}", f"model.path={qwen}", *stage("dpo", *TWO, "epochs=null"))


def test_dpo_identity(tmp_path, qwen):
    run(
        tmp_path,
        "dpo_identity",
        f"model.path={qwen}",
        *stage("dpo", *TWO, "batch_size=4"),
        *("evaluation.data.held_out.limit=2", "evaluation.samples=1", "evaluation.sampling.max_new_tokens=8"),
    )


@pytest.mark.extras
def test_smollm2(tmp_path, qwen):
    """Its stages, on a model of random weights; tests/test_import_gguf.py has the model itself."""
    final = run(
        tmp_path,
        "smollm2",
        f"model.path={qwen}",
        *("vars.problems.train.task.args.size=16", "evaluation.data.held_out.task.args.size=3"),
        *("vars.problems.train.task.args.system=Add", "evaluation.data.held_out.task.args.system=Add"),
        *stage("sft", *TWO, "batch_size=2"),
        # A model of random weights is never right, and seldom ends: lengths of answers that do give pairs.
        *stage("pairs", "prompts=8", "group_size=32", "rewards=[{fn: length, args: {target: 3}}]"),
        *stage("dpo", *TWO, "epochs=null", "batch_size=2"),
        *stage("grpo", *TWO, "prompts_per_step=2", "group_size=2", "sampling.max_new_tokens=8"),
        "evaluation.sampling.max_new_tokens=8",
    )
    (first,) = (tmp_path / "smollm2/grpo/rollouts").glob("step-*.jsonl")
    row = json.loads(first.read_text("utf-8").splitlines()[0])
    assert row["example"]["problem"]["task"] == "chain_sum"
    assert (final / "adapter_model.safetensors").is_file()


def test_no_recipe_is_left_out():
    tests = "".join(file.read_text("utf-8") for file in Path(__file__).parent.glob("test_recipe*.py"))
    trained = set(re.findall(r"(?:run\(\s*tmp_path,|resolve\()\s*\"(\w+)\"", tests))
    # Those of methods/ have a test of their own.
    assert {name for name in packaged() if "/" not in name} <= trained


@pytest.mark.slow
def test_the_chain_of_commands(tmp_path, qwen, gsm8k):
    """scripts/pipeline.sh: each command's stdout is the next one's model."""
    small = {
        "sft_chat": stage("sft", *TWO, "epochs=null"),
        "dpo_pairs": stage("dpo", *TWO, "epochs=null"),
        "grpo_math": [
            *(f"vars.data={gsm8k}/train.jsonl", f"vars.held_out={gsm8k}/test.jsonl", "vars.config=null"),
            *stage("grpo", *TWO, "prompts_per_step=2", "group_size=2", "sampling.max_new_tokens=8"),
            *("evaluation.data.held_out.limit=2", "evaluation.sampling.max_new_tokens=8"),
        ],
    }
    cases = "".join(f'{recipe}) set -- "$@" {" ".join(words)};;\n' for recipe, words in small.items())
    command = tmp_path / "bin/rlpost"
    command.parent.mkdir()
    command.write_text(f'#!/bin/bash\ncase "$2" in\n{cases}esac\nexec {sys.executable} -m rlpost "$@"\n')
    command.chmod(0o755)
    data = jsonl(tmp_path / "conversations.jsonl", CONVERSATIONS), jsonl(tmp_path / "pairs.jsonl", PREFERRED)
    done = subprocess.run(
        [Path(__file__).parents[1] / "scripts/pipeline.sh", *data, f"model.path={qwen}", "threads=1"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"{tmp_path}/runs/chain_grpo/grpo/final\n"
    parents = [
        json.loads((tmp_path / f"runs/chain_{name}/{name}/final/checkpoint.json").read_text("utf-8"))["parent"]
        for name in ("sft", "dpo", "grpo")
    ]
    assert parents == [str(qwen), *(f"{tmp_path}/runs/chain_{name}/{name}/final" for name in ("sft", "dpo"))]
