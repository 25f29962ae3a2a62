"""Evaluates the base model and every stage's result, once each, and prints the table at the end of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rlpost import console
from rlpost.data.codec import Codec, make_codec
from rlpost.data.dataset import Dataset, open_dataset
from rlpost.data.fitting import Limit
from rlpost.data.formats import DataRole
from rlpost.data.messages import question
from rlpost.data.params import TooLong
from rlpost.data.part import Shelf
from rlpost.environments.tools import codec_with_tools
from rlpost.errors import ModelError
from rlpost.evaluate.evaluator import Result, evaluate, numbers
from rlpost.evaluate.params import Evaluation
from rlpost.evaluate.table import print_answers, print_stages, stage_table, telling_prompts
from rlpost.policy.identity import identity
from rlpost.policy.judge import AnyJudge, load_judge
from rlpost.policy.load import load_policy
from rlpost.policy.policy import Policy
from rlpost.ranks import first_alone
from rlpost.recipe.resolve import Resolved
from rlpost.recipe.rules import Leaves
from rlpost.recipe.specs.common import Stage
from rlpost.run.contents import Contents, difference
from rlpost.run.files import disk_errors, encode_line, write_atomic, write_json
from rlpost.run.lookup import find_checkpoint
from rlpost.run.manifest import measure
from rlpost.run.names import EVALUATION
from rlpost.run.record import run_id
from rlpost.run.sealed import seal, unseal
from rlpost.stages.context import make_engine, make_scorer
from rlpost.stages.references import readable_references
from rlpost.trackers.mirrors import Mirrors
from rlpost.train.evaluation import Measure, RecipeMeasure
from rlpost.types import Group
from rlpost.usercode.binding import bind
from rlpost.usercode.params import ENVIRONMENT
from rlpost.usercode.toolset import bound_tools

_PROVEN = ("json", "jsonl")


class StageEvaluations:
    """The evaluations of one run, kept as evaluation/STAGE.json and evaluation/STAGE.jsonl (one line a sample).

    STAGE.proof holds their sha256, settings and model. If one of these differs, or they are damaged, the evaluation is
    repeated, so that a table compares like with like.
    """

    def __init__(
        self,
        resolved: Resolved,
        run: Path,
        bfloat16: bool,
        device: torch.device,
        functions: Mapping[str, str],
        memo: dict[str, Contents],
        shelf: Shelf | None = None,
        mirrors: Mirrors | None = None,
    ) -> None:
        """Nothing is evaluated yet.

        Args:
            resolved: the recipe.
            run: its directory.
            bfloat16: the precision already decided.
            device: where models are put.
            functions: file and name -> sha256, of the user's own functions.
            memo: path -> contents of a model's folder, as far as known; added to.
            shelf: the cache of encoded rows.
            mirrors: trackers that are sent the evaluations.
        """
        self._mirrors = mirrors or Mirrors()
        self._resolved = resolved
        self._cfg: Evaluation | None = resolved.config.evaluation
        self._run = run
        self._folder = run / EVALUATION
        self._bfloat16 = bfloat16
        self._device = device
        self._functions = functions
        self._memo = memo
        self._shelf = shelf
        self._names: list[str] = []

    def open_rows(self, codec: Codec, positions: int) -> None:
        """Encode the prompts for a model of so many positions, to find wrong rows before any stage runs.

        Raises:
            DataError: one is malformed or too long.
        """
        stages = self._resolved.config.enabled().values()
        during = any(getattr(stage, "eval_every", None) for stage in stages)
        if self._cfg is not None and (self._cfg.every_stage or self._cfg.every or during):
            evaluation_rows(self._resolved, self._cfg, codec, positions, self._shelf)

    def after(self, name: str, checkpoint: Path, known: Mapping[str, Path]) -> None:
        """Evaluate `checkpoint` as the result of stage `name`, unless that has been done.

        `known` are the results so far by stage, which the evaluation may name as judges.
        """
        if self._cfg is None or not self._cfg.every_stage:
            return
        self._names.append(name)
        about = self._about(name, checkpoint, known)
        if not self._is_done(name, about):
            self._evaluate(name, checkpoint, known, self._cfg)
        self._mirror(name)

    def _evaluate(self, name: str, checkpoint: Path, known: Mapping[str, Path], cfg: Evaluation) -> None:
        policy = load_policy(
            checkpoint,
            self._resolved.config.model,
            bfloat16=self._bfloat16,
            device=self._device,
            trainable=False,
        )
        console.say(f"evaluating {name}")
        prompts, result = evaluate_recipe(self._resolved, cfg, policy, known, self._shelf)
        self._make_folder()
        lines = (encode_line(row) for answers in result.answers for row in answers.rows(prompts))
        write_atomic(self._file(name, "jsonl"), b"".join(lines))
        write_json(self._file(name), result.to_json())
        with disk_errors(self._folder):
            files = {ending: measure(self._file(name, ending)) for ending in _PROVEN}
        # A model that was just downloaded has contents only now.
        about = self._about(name, checkpoint, known)
        write_atomic(self._file(name, "proof"), seal({**about, "files": files}))

    @first_alone
    def _make_folder(self) -> None:
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)

    def _mirror(self, name: str) -> None:
        results = self._results()
        number = len(results) - 1
        self._mirrors.evaluation(name, number, results[name], self._file(name, "jsonl"))
        self._mirrors.table("evaluation/stages", number, *stage_table(results))

    def _results(self) -> dict[str, Any]:
        return {name: json.loads(self._file(name).read_text("utf-8")) for name in self._names}

    def during(self, stage: Stage, known: Mapping[str, Path]) -> RecipeMeasure:
        """What gives the numbers of the stage's policy while it is trained; `known` as in `after`."""
        cfg, before = self._cfg, dict(known)
        if cfg is None:
            return RecipeMeasure()

        def measure_of(policy: Policy) -> Measure:
            made: list[RecipeEvaluation] = []

            def measure() -> dict[str, float]:
                if not made:
                    made.append(RecipeEvaluation(self._resolved, cfg, policy, before, self._shelf, "evaluation_"))
                return numbers(made[0].result())

            return measure

        return RecipeMeasure(cfg.every, measure_of if stage.leaves is Leaves.policy else None)

    @first_alone
    def forget(self, name: str) -> None:
        """Remove the evaluation of stage `name`, which is about to be trained again."""
        with disk_errors(self._file(name)):
            for ending in ("proof", *_PROVEN):
                self._file(name, ending).unlink(missing_ok=True)

    def _about(self, name: str, checkpoint: Path, known: Mapping[str, Path]) -> dict[str, Any]:
        """Everything that an evaluation depends on: settings, code, model, and judges."""
        assert self._cfg is not None
        chosen = self._cfg.rollouts or self._resolved.config.rollouts
        decides = {**self._cfg.model_dump(), "rollouts": {"engine": chosen.engine, "args": chosen.args}}
        settings = json.loads(json.dumps({**decides, "show": None, "every_stage": None, "every": None}, default=str))
        wanted = {text for text in _texts(settings) if text in known}
        # `rewards.py:digits` in a recipe is a file of that name, wherever the recipe's folder is.
        own = {text.rpartition("/")[2] for text in _texts(settings) if ".py:" in text}
        own |= {text for text in _texts(settings) if text in self._functions}  # a judge's template, by its path
        code = {k: digest for k, digest in self._functions.items() if k in own or k.rpartition("/")[2] in own}
        return {
            "run": run_id(self._run),
            "stage": name,
            "settings": settings,
            "code": code,
            "rows": self._rows,
            "bfloat16": self._bfloat16,
            "model": self._identity(checkpoint),
            "judges": {other: self._identity(known[other]) for other in sorted(wanted)},
        }

    @cached_property
    def _rows(self) -> dict[str, str]:
        """sha256 of the files that the evaluation's rows come from."""
        assert self._cfg is not None
        given = {name: source.path for name, source in self._cfg.data.items() if source.path}
        files = {name: self._resolved.folder / path for name, path in given.items()}
        with disk_errors(self._resolved.folder):
            return {name: str(measure(path)["sha256"]) for name, path in files.items() if path.is_file()}

    def _identity(self, checkpoint: Path) -> Contents:
        found = identity(checkpoint, self._memo.get(str(checkpoint)), self._resolved.config.model.revision)
        self._memo[str(checkpoint)] = found
        return found

    def _is_done(self, name: str, about: Mapping[str, Any]) -> bool:
        """Whether the evaluation on disk is undamaged and of this model and settings; warns if it is not."""
        if not any(self._file(name, ending).exists() for ending in ("proof", *_PROVEN)):
            return False
        wrong = self._wrong(name, about)
        if wrong is not None:
            console.warn(f"{self._folder / name}.*: {wrong}; {name} is evaluated again")
        return wrong is None

    def _wrong(self, name: str, about: Mapping[str, Any]) -> str | None:
        with disk_errors(self._folder):
            path = self._file(name, "proof")
            proof = unseal(path.read_bytes()) if path.is_file() else None
            if proof is None:
                return f"{path.name} is missing or damaged"
            for ending, written in proof["files"].items():
                file = self._file(name, ending)
                if not file.is_file() or measure(file) != written:
                    return f"{file.name} is missing or has changed since it was written"
        if (proof["run"], proof["stage"]) != (about["run"], about["stage"]):
            return "they belong to another stage or run"
        if any(proof[key] != about[key] for key in ("settings", "code", "rows", "bfloat16")):
            return "they were made with other settings, code or rows"
        pairs = {"model": (proof["model"], about["model"])}
        pairs |= {name: (proof["judges"].get(name, {}), judge) for name, judge in about["judges"].items()}
        changed = next((key for key, (old, new) in pairs.items() if difference(old, new)), None)
        return f"they are of another {changed}" if changed else None

    def print(self) -> None:
        """The table of all stages, and a few prompts answered before and after."""
        if self._cfg is None or not self._names:
            return
        print_stages(self._results())
        if self._cfg.show and self._cfg.greedy and len(self._names) > 1:
            self._print_answers(self._cfg.show)

    def _print_answers(self, n: int) -> None:
        rows = {name: self._greedy_rows(name) for name in self._names}
        # Compare with the first trained stage: an untrained model answers nothing right.
        before = self._names[1] if len(self._names) > 2 else self._names[0]
        scores = [[float(row["reward"] or 0) for row in rows[name]] for name in (before, self._names[-1])]
        chosen = telling_prompts(scores[0], scores[1], n)
        first = rows[self._names[0]]
        print_answers(
            [question(first[p]["example"]) or first[p]["prompt"] for p in chosen],
            {name: [rows[name][p]["completion"] for p in chosen] for name in self._names},
            [str(first[p]["example"].get("answer", "")) for p in chosen],
        )

    def _greedy_rows(self, name: str) -> list[dict[str, Any]]:
        with self._file(name, "jsonl").open(encoding="utf-8") as file:
            return [row for row in map(json.loads, file) if row["mode"] == "greedy"]

    def _file(self, name: str, ending: str = "json") -> Path:
        return self._folder / f"{name}.{ending}"


def _texts(value: Any) -> Iterator[str]:
    """Every string in settings."""
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(item)


def evaluate_recipe(
    resolved: Resolved, cfg: Evaluation, policy: Policy, known: Mapping[str, Path], shelf: Shelf | None = None
) -> tuple[list[str], Result]:
    """Evaluate `policy` as the recipe says; returns the prompts as text, and the result.

    A judge that is a stage which has not run yet is left out; `known` are the results so far, by stage.

    Raises:
        ModelError: a reward's model is not there, or no reward model.
    """
    made = RecipeEvaluation(resolved, cfg, policy, known, shelf)
    return prompt_texts(policy, made.groups), made.result()


class RecipeEvaluation:
    """The recipe's evaluation of one policy, made once and repeated as its weights change."""

    def __init__(
        self,
        resolved: Resolved,
        cfg: Evaluation,
        policy: Policy,
        known: Mapping[str, Path],
        shelf: Shelf | None = None,
        prefix: str = "",
    ) -> None:
        """Read the rows and load the models of the rewards; `prefix` begins the names of their adapters."""
        self._resolved = resolved
        self._cfg = cfg
        self._policy = policy
        self.groups = evaluation_rows(resolved, cfg, make_codec(policy.tokenizer), policy.max_positions, shelf).all()
        judge_by = judges(resolved, policy, known, prefix)
        self._scorer = make_scorer(cfg.rewards, "evaluation", resolved.folder, judge_by)
        awaited = cfg.judge is None or (cfg.judge in resolved.config.stages and cfg.judge not in known)
        self._judge = None if awaited else judge_by(str(cfg.judge), "judge")
        given = cfg.environment
        self._environment = bind(given, ENVIRONMENT, "evaluation.environment", resolved.folder) if given else None
        self._tools = bound_tools(cfg, "evaluation", resolved.folder)

    def result(self) -> Result:
        """Evaluate the policy as it is, with an engine that is closed afterwards."""
        cfg, resolved = self._cfg, self._resolved
        made = make_engine(self._policy, cfg.rollouts, resolved.config.rollouts, "evaluation", resolved.folder)
        seed, judge, environment = resolved.config.seed, self._judge, self._environment or self._tools
        with closing(made) as engine:
            return evaluate(engine, self._policy, self.groups, self._scorer, cfg, seed, judge, environment)


def judges(
    resolved: Resolved, policy: Policy, known: Mapping[str, Path], prefix: str = ""
) -> Callable[[str, str], AnyJudge]:
    """(name, adapter) -> the judge of that name for completions of `policy`: a stage in `known`, or a checkpoint."""

    def judge(name: str, adapter: str) -> AnyJudge:
        if name in resolved.config.stages and name not in known:
            raise ModelError(f"{name!r} is a stage that has not run yet; name a checkpoint of a reward model")
        folder = known.get(name) or find_checkpoint(name) or Path(name)
        return load_judge(folder, resolved.config.model, policy, name=prefix + adapter)

    return judge


def evaluation_rows(resolved: Resolved, cfg: Evaluation, codec: Codec, positions: int, shelf: Shelf | None) -> Dataset:
    """The evaluation's prompts, for a model of so many positions."""
    return open_dataset(
        cfg.data,
        codec_with_tools(codec, cfg, "evaluation", resolved.folder),
        need=DataRole.prompts,
        limit=Limit(positions - cfg.sampling.max_new_tokens, TooLong.refuse),
        seed=resolved.config.seed,
        where="evaluation.data",
        stages=_no_stage,
        bind=bind,
        base=resolved.folder,
        shelf=shelf,
        check=readable_references(cfg, "evaluation", DataRole.prompts),
    )


def prompt_texts(policy: Policy, groups: Sequence[Group]) -> list[str]:
    """Prompts as text, special tokens included where the template puts them."""
    return [policy.tokenizer.decode(g.prompt.tolist()) for g in groups]


def _no_stage(name: str) -> Path:
    raise AssertionError(f"an evaluation reads stage {name}")
