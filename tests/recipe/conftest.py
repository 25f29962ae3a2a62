from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

RECIPE = """\
# A tiny model learns to add
description: Addition through four stages
vars: {width: 64, data: '???'}
model:
  config: {model_type: llama, hidden_size: "${vars.width}", num_hidden_layers: 2}
  tokenizer: {kind: characters, alphabet: "0123456789+="}
stages:
  sft:
    kind: sft
    data: {train: {path: "${vars.data}", kfold: {by: prompt}}}
    steps: 100
    learning_rate: 1e-3
  pairs:
    kind: pairs
    data: {prompts: {path: "${vars.data}"}}
    rewards: [{fn: math_answer}]
  dpo:
    kind: dpo
    data: {made: {stage: pairs}}
    epochs: 1
    learning_rate: 5e-4
    reference: sft
  grpo:
    kind: grpo
    data: {train: {path: "${vars.data}"}}
    steps: 10
    learning_rate: 3e-4
    sampling: {max_new_tokens: 8}
    rewards: [{fn: math_answer}, {fn: length, weight: 0.1, args: {target: 8}}]
evaluation:
  data: {test: {path: "${vars.data}", kfold: {by: prompt, part: held_out}}}
  rewards: [{fn: math_answer}]
  sampling: ${stages.grpo.sampling}
"""

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a file into a folder that is the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.fixture
def adding(write: Write) -> str:
    """A recipe with a stage of every kind; its data is still to be given."""
    return str(write("adding.yaml", RECIPE))
