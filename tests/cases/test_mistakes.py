"""The ordinary mistakes of a person at the command line: each is one line that says what is wrong, and where."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_world import rlpost, save_model, save_recipe, save_rows

SFT = {"kind": "sft", "data": {"c": {"path": "d.jsonl"}}, "steps": 1, "batch_size": 2, "learning_rate": 1e-3}
GRPO = {
    "kind": "grpo",
    "data": {"c": {"path": "d.jsonl"}},
    "steps": 1,
    "learning_rate": 1e-3,
    "rewards": [{"fn": "length", "args": {"target": 4}}],
    "sampling": {"max_new_tokens": 4},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with a model, rows, recipes, a finished run, and things that are none of these."""
    folder = tmp_path_factory.mktemp("mistakes")
    before = Path.cwd()
    os.chdir(folder)
    save_model(folder / "m")
    save_rows(folder / "d.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    model = {"path": "m", "precision": "float32"}
    save_recipe(folder / "r.yaml", {"model": model, "stages": {"sft": SFT, "grpo": {**GRPO, "enabled": False}}})
    save_recipe(folder / "g.yaml", {"model": model, "stages": {"grpo": GRPO}})
    save_recipe(folder / "with spaces é.yaml", {"run": "named", "model": model, "stages": {"sft": SFT}})
    (folder / "empty.yaml").touch()
    (folder / "empty.jsonl").touch()
    (folder / "list.yaml").write_text("- a\n- b\n")
    (folder / "text.yaml").write_text("just text\n")
    (folder / "tabs.yaml").write_text("model:\n\tpath: m\n")
    (folder / "broken.yaml").write_text("model: {path: m\n")
    (folder / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    (folder / "numbers.jsonl").write_text('{"prompt": 1, "completion": 2}\n')
    (folder / "other.jsonl").write_text('{"question": "a", "reply": "b"}\n')
    (folder / "d.json").write_text('[{"prompt": "a", "completion": "b"}, 3]')
    (folder / "d.csv").write_text("prompt,completion\na,b,c\n")
    (folder / "d.xlsx").write_text("prompt,completion\na,b\n")
    (folder / "my.py").write_text("def good(completion): return 1.0\ndef bad(x): return 1.0\nvalue = 3\n")
    (folder / "wrong.py").write_text("def f(:\n")
    (folder / "raises.py").write_text("raise ValueError('no')\n")
    (folder / "nothing").mkdir()
    (folder / "brokenmodel").mkdir()
    (folder / "brokenmodel" / "config.json").write_text("{")
    (folder / "file").write_text("x")
    assert rlpost("train", "r.yaml").code == 0
    yield folder
    os.chdir(before)


R = "train r.yaml"
MISTAKES = f"""
2 | train                                          | Missing argument 'RECIPE'
2 | trian r.yaml                                   | 'train'
2 | help                                           | No such command
2 | train nosuch.yaml                              | nosuch.yaml: no such file
2 | train r                                        | did you mean 'r.yaml'?
2 | train r.yml                                    | did you mean 'r.yaml'?
2 | train r.yaml r.yaml                            | r.yaml: expected key=value
2 | train stages.sft.steps=2 r.yaml                | stages.sft.steps=2
2 | train d.jsonl                                  | d.jsonl
2 | train m                                        | m:
2 | train .                                        | .
2 | train ''                                       | RECIPE: empty
2 | train nothing                                  | nothing
2 | train empty.yaml                               | nothing to do
2 | train list.yaml                                | expected keys and values, like
2 | train text.yaml                                | gpt2}}`, got text
2 | train tabs.yaml                                | tabs.yaml:2
2 | train broken.yaml                              | broken.yaml:
2 | train demmo                                    | did you mean 'demo'?
2 | train rloo                                     | did you mean 'methods/rloo'?
2 | train methods/rlo                              | did you mean 'methods/rloo'?
2 | train Demo                                     | did you mean 'demo'?
2 | {R} --dryrun                                   | --dry-run
2 | {R} --step 3                                   | No such option: --step
2 | {R} --stages.sft.steps=3                       | No such option
2 | {R} steps=3                                    | stages.sft.steps
2 | {R} sft.steps=3                                | stages.sft
2 | {R} stages.sft.step=3                          | did you mean 'stages.sft.steps'?
2 | {R} stages.stf.steps=3                         | did you mean 'sft'?
2 | {R} stages.sft.steps                           | expected key=value
2 | {R} stages.sft.steps =3                        | expected key=value
2 | {R} stages.sft.steps=                          | stages.sft.steps
2 | {R} stages.sft.steps=many                      | expected a whole number, got 'many'
2 | {R} stages.sft.steps=-1                        | expected at least 1, got -1
2 | {R} stages.sft.steps=0                         | expected at least 1, got 0
2 | {R} stages.sft.steps=1.5                       | expected a whole number, got 1.5
2 | {R} stages.sft.steps=1e9999                    | stages.sft.steps
2 | {R} stages.sft.steps=true                      | stages.sft.steps
2 | {R} stages.sft.learning_rate=0                 | expected more than 0
2 | {R} stages.sft.learning_rate=-1e-3             | expected more than 0
2 | {R} stages.sft.learning_rate=1e-3x             | expected a number
2 | {R} stages.sft.learning_rate=nan               | stages.sft.learning_rate
2 | {R} stages.sft.learning_rate=1,2               | expected one value
2 | {R} stages.sft.batch_size=[1]                  | stages.sft.batch_size
2 | {R} stages.sft.kind=stf                        | did you mean 'sft'?
2 | {R} stages.sft.enabled=maybe                   | expected true or false
2 | {R} stages.sft.enabled=false                   | nothing to do
2 | {R} stages.sft=null                            | stages.sft
2 | {R} stages.sft.loss.fn=nil                     | did you mean 'nll'?
2 | {R} stages.sft.loss.fn=zzzzz                   | it has: nll
2 | {R} stages.sft.loss.args.x=1                   | no argument 'x'
2 | {R} stages.sft.data.c.paht=x                   | did you mean 'stages.sft.data.c.path'?
2 | {R} stages.sft.data.d.path=x                   | stages.sft.data
3 | {R} stages.sft.data.c.path=dd.jsonl            | did you mean 'd.jsonl'?
3 | {R} stages.sft.data.c.path=empty.jsonl         | empty.jsonl) has no rows
3 | {R} stages.sft.data.c.path=broken.jsonl        | broken.jsonl:2: not JSON
3 | {R} run=x0 stages.sft.data.c.path=numbers.jsonl | prompt
3 | {R} stages.sft.data.c.path=other.jsonl         | other.jsonl
3 | {R} stages.sft.data.c.path=d.json              | d.json: row 2: a row must be an object
3 | {R} stages.sft.data.c.path=d.csv               | d.csv:2: 3 cells, but the header has 2
3 | {R} stages.sft.data.c.path=d.xlsx              | d.xlsx is none of .jsonl, .ndjson, .json, .csv
3 | {R} stages.sft.data.c.path=nothing             | nothing
3 | {R} stages.sft.data.c.path=m                   | cannot load
3 | {R} stages.sft.data.c.path=/no/such/d.jsonl    | /no/such/d.jsonl does not exist
2 | {R} stages.sft.data.c.limit=0                  | expected at least 1
2 | {R} stages.sft.data.c.task.fn=addition.train   | give exactly one of path, stage, task
2 | {R} stages.sft.data.c.stage=pairs              | give exactly one of path, stage, task
2 | {R} stages.sft.epochs=1                        | give exactly one of stages.sft.steps and stages.sft.epochs
2 | {R} run=a/b                                    | no name for a directory
2 | {R} run=..                                     | no name for a directory
2 | {R} run=                                       | run
2 | {R} 'run=my run'                               | no name for a directory
5 | {R} runs=file                                  | file
5 | {R} runs=/proc/nowhere                         | /proc/nowhere
2 | {R} seed=-1                                    | expected from 0
2 | {R} seed={5000 * "9"}                          | seed: expected a whole number
2 | {R} seed={400 * "9"}                           | seed: expected from 0 to 4294967295
2 | {R} seed=abc                                   | expected a whole number
2 | {R} threads=0                                  | expected at least 1
2 | {R} +seed=1                                    | write key=value
2 | {R} ~stages.sft                                | expected key=value
2 | {R} model.path=                                | model
2 | {R} model.pth=m                                | did you mean 'model.path'?
4 | {R} run=x1 model.path=mm                       | mm
4 | {R} run=x2 model.path=nothing                  | nothing
4 | {R} run=x3 model.path=brokenmodel              | brokenmodel
4 | {R} run=x4 model.path=file                     | file
4 | {R} run=x5 model.path=d.jsonl                  | d.jsonl
4 | {R} run=x6 model.path=/no/such/model           | /no/such/model
4 | {R} run=x7 model.path=runs/rr                  | did you mean runs/r
2 | {R} model.config.model_type=llama              | give exactly one of model.path and model.config
2 | {R} model.precision=fp16                       | expected one of auto, float32, bfloat16
2 | {R} model.precision=16                         | expected one of
2 | {R} model.lora.r=0                             | expected at least 1
2 | {R} model.lora=8                               | model.lora
2 | {R} stages.sft.steps=2                         | stages.sft.steps: 1 -> 2
2 | train g.yaml stages.grpo.rewards[0].fn=lenght  | did you mean 'length'?
2 | train g.yaml stages.grpo.rewards[1].fn=length  | has 1 entries
2 | train g.yaml stages.grpo.rewards=[]            | missing - give at least one
2 | train g.yaml stages.grpo.rewards=[length]      | stages.grpo.rewards[0]
2 | train g.yaml 'stages.grpo.rewards=[{{fn: my.py}}]'          | stages.grpo.rewards[0].fn
2 | train g.yaml 'stages.grpo.rewards=[{{fn: my.py:god}}]'      | did you mean 'good'?
2 | train g.yaml 'stages.grpo.rewards=[{{fn: my.py:value}}]'    | no function 'value'
2 | train g.yaml 'stages.grpo.rewards=[{{fn: my.py:bad}}]'      | 'bad' takes
2 | train g.yaml 'stages.grpo.rewards=[{{fn: mine.py:good}}]'   | no file 'mine.py'
2 | train g.yaml 'stages.grpo.rewards=[{{fn: wrong.py:f}}]'     | wrong.py:1
2 | train g.yaml 'stages.grpo.rewards=[{{fn: raises.py:f}}]'    | raises.py:1
2 | train g.yaml 'stages.grpo.rewards=[{{fn: addition.corect}}]'  | did you mean 'correct'?
2 | train g.yaml 'stages.grpo.rewards=[{{fn: adition.correct}}]'  | did you mean 'addition'?
2 | train g.yaml stages.grpo.advantage.fn=leave_one_uot   | did you mean 'leave_one_out'?
2 | train g.yaml stages.grpo.group_size=0          | expected at least 1
2 | train g.yaml stages.grpo.sampling.temperature=0  | expected more than 0
2 | train g.yaml stages.grpo.sampling.top_p=0.9    | stages.grpo.sampling.top_p
2 | train g.yaml stages.grpo.reference=stf         | no stage 'stf'
2 | train g.yaml stages.grpo.start=grpo            | is this stage itself
2 | show                                           | Missing argument 'RECIPE'
2 | show runs/r                                    | runs/r
2 | show r.yaml --rows -1                          | --rows
2 | show r.yaml --rows many                        | --rows
2 | list demo                                      | unexpected extra argument
2 | list --runs nosuch                             | nosuch
2 | list --runs file                               | file
2 | eval nosuch/run                                | nosuch/run: not here
4 | eval runs/x                                    | runs/x
2 | eval m                                         | name one with --recipe
2 | eval runs/r                                    | it has no `evaluation`
4 | eval r.yaml                                    | r.yaml: no checkpoint here
2 | eval runs/r --recipe nosuch                    | nosuch
2 | sample                                         | Missing argument 'CHECKPOINT'
4 | sample mm x                                    | mm
4 | sample nothing x                               | nothing
4 | sample file x                                  | file
4 | sample r.yaml x                                | r.yaml
4 | sample runs x                                  | did you mean runs/r?
4 | sample runs/r/grpo x                           | runs/r/grpo
4 | sample runs/r/stf x                            | did you mean runs/r/sft?
4 | sample brokenmodel x                           | brokenmodel
2 | sample m x y                                   | unexpected extra argument
2 | sample m x -n 0                                | -n
2 | sample m x -n 1.5                              | -n
2 | sample m x --temperature -1                    | --temperature
2 | sample m x --temperature nan                   | --temperature
2 | sample m x --top-p 0                           | --top-p
2 | sample m x --top-k -1                          | --top-k
2 | sample m x --max-new-tokens 0                  | --max-new-tokens
2 | sample m x --seed -1                           | --seed
2 | sample m x --stop ''                           | --stop
2 | sample m x --best-of 1 --recipe g.yaml         | --best-of
2 | sample m x --best-of 4                         | --recipe
2 | sample m x --best-of 4 --recipe nosuch         | nosuch
2 | sample m x --best-of 4 --recipe r.yaml         | no rewards
4 | sample m x --best-of 4 --judge m               | m
2 | sample m x --guide m --goal b                  | options of `rlpost goals sample
2 | sample m x --candidates 4                      | options of `rlpost goals sample
2 | goals sample m x --goal b                      | Missing option '--network'
2 | goals sample m x --network m                   | --goal: give either --goal or --avoid
2 | goals sample m x --network m --goal a --avoid b | --goal: give either --goal or --avoid
4 | goals sample m x --network m --goal b          | no value network
2 | infill m m a b                                 | `rlpost infill` is now `rlpost goals infill`
2 | calibrate m x                                  | is now `rlpost goals calibrate`
2 | plot maze runs/r                               | is now `rlpost goals plot`
2 | goals infil m m a b                            | Did you mean 'infill'?
2 | goals infill m m a                             | Missing argument 'AFTER'
4 | goals infill m m a b                           | m
4 | goals infill mm m a b                          | mm
2 | pairs m --recipe g.yaml                        | Missing option '--out'
2 | pairs m --recipe g.yaml --out p.jsonl          | no enabled stage of kind pairs
5 | pairs m --recipe g.yaml --out no/p.jsonl       | there is no folder no
5 | pairs m --recipe g.yaml --out nothing          | is a folder
2 | pairs m --recipe nosuch --out p.jsonl          | nosuch
2 | goals plot                                     | Missing argument
2 | goals plot maze                                | Missing argument 'RUN'
2 | goals plot mase runs/r                         | 'mase' is not one of 'maze'
4 | goals plot maze nosuch                         | nosuch: no run
3 | goals plot maze runs/r                         | give a run of mazes
2 | goals plot maze runs/r --out x.txt             | --out
2 | goals plot maze runs/r --mazes 0               | --mazes
2 | verify gaols                                   | 'gaols' is not one of
2 | verify --vocab 1                               | --vocab
2 | verify --depth x                               | --depth
2 | verify --vocab 50 --depth 50                   | take a smaller one
4 | goals calibrate m x --goal b --max-new-tokens 4 | no value network
2 | goals calibrate m x --max-new-tokens 4         | Missing option '--goal'
"""
CASES = [[part.strip() for part in line.split("|")] for line in MISTAKES.strip().splitlines()]


@pytest.mark.parametrize(("code", "words", "said"), CASES, ids=[words for _, words, _ in CASES])
def test_an_ordinary_mistake_is_one_line(code: str, words: str, said: str, world: Path, tally) -> None:
    before = sorted(world.rglob("*"))
    ran = rlpost(*shlex.split(words))
    assert ran.refused(int(code), said), f"{ran.code}: {ran.out}{ran.err}"
    assert "unexpected " not in ran.line.replace("unexpected extra argument", "")
    if not words.startswith("train"):
        assert sorted(world.rglob("*")) == before
    tally("ordinary mistakes", refused=1)


def test_names_with_spaces_and_letters_are_no_mistake(world: Path, tally) -> None:
    assert rlpost("train", "with spaces é.yaml", "--dry-run").code == 0
    assert rlpost("sample", "m", "ünïcode  und Leerzeichen", "--max-new-tokens", 2).code == 0
    tally("ordinary mistakes", right=2)
