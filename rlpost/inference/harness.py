"""Scores a checkpoint on task files of lm-eval, with lm-eval's own code: `rlpost eval --harness lm_eval`."""

from __future__ import annotations

import json
import logging
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2.sandbox import SandboxedEnvironment

from rlpost import console
from rlpost.errors import ModelError, OutOfMemoryError, RecipeError, RlpostError
from rlpost.evaluate.evaluator import percent
from rlpost.evaluate.statistics import Estimate, clustered_share
from rlpost.evaluate.task_files import TRUST, TaskFile
from rlpost.inference.checkpoint import frozen_policy, located, recipe_of
from rlpost.policy.attention import plain_attention
from rlpost.policy.params import Model, Precision
from rlpost.policy.policy import Decoding, Policy
from rlpost.recipe.resolve import resolve
from rlpost.run.lookup import newest_finished_run
from rlpost.streams import is_terminal

Z = 1.959964
"""Standard errors of half a 95 % interval of a normal variable."""
_PREBUILT = ("`pretrained` model kwarg", "Passed an already-initialized model")
"""Beginnings of warnings of lm-eval about a model that was loaded before, as every one is here."""
_DEFAULTS = ("is defined, but aggregation is not", "is defined, but higher_is_better is not")
"""Parts of warnings that a metric has its usual meaning."""


@dataclass(frozen=True)
class HarnessOptions:
    """How tasks are scored."""

    chat: bool = False
    """Ask through the chat template."""
    limit: int | None = None
    """Only the first rows of each task."""
    batch_size: int = 16
    seed: int = 0
    """Of few-shot examples and of samples, where a task draws any."""
    trusted: bool = False
    """Task files may run code."""


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    filter: str
    """The task's filter that the answers went through; `none` if it names none."""
    rows: int
    estimate: Estimate
    """lm-eval's value, with a 95 % interval: of shares as everywhere, else from lm-eval's standard error."""
    share: bool
    """Whether the value is a mean of scores between 0 and 1, one a row."""
    stderr: float | None
    """lm-eval's own standard error, where it gives one."""

    @property
    def name(self) -> str:
        """The metric, with its filter if the task names one."""
        return self.metric if self.filter == "none" else f"{self.metric} ({self.filter})"

    def to_json(self) -> dict[str, Any]:
        """The same as plain data; what is not known is null."""
        estimate = {key: None if math.isnan(v) else v for key, v in asdict(self.estimate).items()}
        return {**estimate, "stderr": self.stderr, "rows": self.rows}


@dataclass(frozen=True)
class HarnessResult:
    """Scores of one model, and what they come from."""

    scores: tuple[Score, ...]
    rows: tuple[dict[str, Any], ...]
    """One a task's row and filter, in lm-eval's words: requests, answers, scores."""

    def to_json(self) -> dict[str, Any]:
        """The scores by task and metric."""
        found: dict[str, Any] = {}
        for score in self.scores:
            found.setdefault(score.task, {})[score.name] = score.to_json()
        return found


def evaluate_harness(
    checkpoint: str | None,
    recipe: str | None,
    overrides: Sequence[str],
    tasks: Sequence[TaskFile],
    options: HarnessOptions,
) -> tuple[HarnessResult, str]:
    """Score a checkpoint on tasks; returns the result, and the model evaluated.

    Args:
        checkpoint: a run, a stage, a checkpoint or a model; None for the newest finished run.
        recipe: a recipe whose `model` says how to load it; None for that of its run, or the defaults outside of runs.
        overrides: `key=value` on the recipe.
        tasks: from `read_task_files`.
        options: how.

    Raises:
        RecipeError: lm-eval refuses a task.
        ModelError: the model cannot be loaded, has no chat template, or cannot answer as a task asks.
    """
    path = checkpoint or str(newest_finished_run(Path("runs")))
    model = located(path)
    policy = frozen_policy(model, exact_enough(_model_settings(path, recipe, overrides), tasks))
    result = score_tasks(policy, tasks, options)
    columns = ["task", "metric", "score [95 % interval]", "rows"]
    console.table(f"{model}, by lm-eval", columns, [[s.task, s.name, _shown(s), str(s.rows)] for s in result.scores])
    return result, model


def exact_enough(model: Model, tasks: Sequence[TaskFile]) -> Model:
    """The settings, with float32 for `auto` where log-probabilities are compared: in bfloat16 choices tie.

    lm-eval takes the first of equals, which in many files is the right one.
    """
    if model.precision is not Precision.auto or all(task.generates for task in tasks):
        return model
    console.say("log-probabilities are compared in float32; model.precision=bfloat16 is faster, and choices may tie")
    return model.model_copy(update={"precision": Precision.float32})


def score_tasks(policy: Policy, tasks: Sequence[TaskFile], options: HarnessOptions) -> HarnessResult:
    """Score a loaded model on tasks; as `evaluate_harness`."""
    if options.chat and not policy.tokenizer.chat_template:
        raise ModelError("--chat: the model has no chat template; leave --chat out")
    if not options.chat and policy.tokenizer.chat_template:
        console.say("the model has a chat template, which is not used; --chat asks through it")
    attention = plain_attention(policy.causal_lm) if policy.flat else nullcontext()
    with _warnings_shown(), _sandboxed(options.trusted), attention:
        from lm_eval.evaluator import evaluate

        loaded = _load(tasks, options)
        for task in tasks:
            _must_be_able(policy, loaded["tasks"][task.name], task.path)
        _seed_all(options.seed)
        with _one_line(f"lm-eval cannot score {', '.join(t.name for t in tasks)}"):
            found = evaluate(
                lm=_lm(policy, options),
                task_dict=loaded,
                limit=options.limit,
                apply_chat_template=options.chat,
                fewshot_as_multiturn=options.chat,
            )
    return _result(found)


def _model_settings(path: str, recipe: str | None, overrides: Sequence[str]) -> Model:
    if recipe is None and not overrides:
        try:
            recipe = str(recipe_of(path))
        except RecipeError:  # a model that no run made
            return Model()
    return resolve(recipe or str(recipe_of(path)), overrides).config.model


def _load(tasks: Sequence[TaskFile], options: HarnessOptions) -> Any:
    """The tasks as lm-eval's objects, prepared as its own `simple_evaluate` does."""
    from lm_eval.tasks import TaskManager

    if not options.trusted:
        for task in tasks:
            _must_know_metrics(task)
    manager = TaskManager(include_defaults=False)
    loaded: Any = {"tasks": {}, "groups": {}, "group_map": {}}
    with _quiet_datasets():
        for task in tasks:
            with _one_line(f"{task.path}: lm-eval refuses it", RecipeError):
                loaded["tasks"] |= manager.load([str(task.path)])["tasks"]
    for made in loaded["tasks"].values():
        if made.get_config("num_fewshot") is None:
            made.set_config(key="num_fewshot", value=0)
        made.set_fewshot_seed(seed=options.seed)
    return loaded


def _must_know_metrics(task: TaskFile) -> None:
    """Refuse a metric that lm-eval does not have: it would load one of that name, with its code, from elsewhere."""
    import lm_eval.api.metrics  # noqa: F401 - registers them
    from lm_eval.api.registry import metric_registry

    if task.settings.get("process_results") is not None:
        return
    for entry in task.settings.get("metric_list") or []:
        name = entry.get("metric") if isinstance(entry, dict) else entry
        if name not in metric_registry:
            raise RecipeError(f"{task.path}: metric_list: {name}: lm-eval has no metric of this name; {TRUST}")


def _must_be_able(policy: Policy, task: Any, path: Path) -> None:
    """Check that the model can answer: lm-eval asserts this, or computes something else.

    Raises:
        ModelError: it cannot.
    """
    if task.OUTPUT_TYPE != "generate_until":
        return
    from lm_eval.models.utils import normalize_gen_kwargs

    if policy.decoding is Decoding.recomputed:
        raise ModelError(f"{path}: lm-eval samples with a cache, with which this model's logits are others")
    most = int(normalize_gen_kwargs(task.config.generation_kwargs or {})["max_gen_toks"])
    if most >= policy.max_positions:
        raise ModelError(
            f"{path}: generation_kwargs.max_gen_toks: {most} tokens of an answer leave no room for a prompt in the "
            f"model's {policy.max_positions} positions; write fewer"
        )


def _lm(policy: Policy, options: HarnessOptions) -> Any:
    """lm-eval's own model class around the loaded model."""
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(
        pretrained=policy.model,
        backend="causal",
        tokenizer=policy.tokenizer,
        max_length=policy.max_positions,
        mixed_precision_dtype=torch.bfloat16 if policy.in_bfloat16 else None,
        softmax_dtype=torch.float32,
        batch_size=1 if policy.single else options.batch_size,
        # A chat template writes the begin token itself, or the model was trained without.
        add_bos_token=False if options.chat else None,
    )
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(lm, kind, partial(getattr(lm, kind), disable_tqdm=not is_terminal(sys.stderr)))
    return lm


def _result(found: Mapping[str, Any]) -> HarnessResult:
    scores, rows = [], []
    for task, samples in found["samples"].items():
        for name, value in found["results"][task].items():
            metric, comma, kept = name.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            values = [s[metric] for s in samples if s["filter"] == kept and metric in s]
            error = found["results"][task].get(f"{metric}_stderr,{kept}")
            stderr = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
            estimate, share = _estimate(float(value), values, stderr)
            scores.append(Score(task, metric, kept, len(values), estimate, share, stderr))
        rows += [_row(task, sample) for sample in samples]
    return HarnessResult(tuple(scores), tuple(rows))


def _estimate(value: float, values: Sequence[Any], stderr: float | None) -> tuple[Estimate, bool]:
    plain = [float(v) for v in values if isinstance(v, int | float | np.number)]
    if plain and len(plain) == len(values) and all(0 <= v <= 1 for v in plain):
        share = clustered_share([[v] for v in plain])
        if abs(share.value - value) < 1e-9:
            return share, True
    half = math.nan if stderr is None else Z * stderr
    return Estimate(value, value - half, value + half), False


def _row(task: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    row = {
        "task": task,
        "row": sample["doc_id"],
        "filter": sample["filter"],
        "requests": sample["arguments"],
        "answers": sample["resps"],
        "filtered": sample["filtered_resps"],
        "target": sample["target"],
        "scores": {metric: sample[metric] for metric in sample["metrics"]},
        "example": sample["doc"],
    }
    made: dict[str, Any] = json.loads(json.dumps(row, default=_plain))
    return made


def _plain(value: Any) -> Any:
    """What JSON has no word for: numbers of numpy; else its text."""
    return value.item() if isinstance(value, np.generic) else str(value)


def _shown(score: Score) -> str:
    if score.share:
        return f"{percent(score.estimate)} %"
    value = console.compact(score.estimate.value)
    if math.isnan(score.estimate.low):
        return value
    return f"{value} [{console.compact(score.estimate.low)}, {console.compact(score.estimate.high)}]"


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def _one_line(what: str, kind: type[RlpostError] = ModelError) -> Iterator[None]:
    """Turn any error of lm-eval, datasets or a task's own functions inside into one line."""
    try:
        yield
    except (RlpostError, torch.OutOfMemoryError, OutOfMemoryError):
        raise
    except Exception as error:  # lm-eval asserts, and a task file may make it raise anything
        said = next(iter(str(error).strip().splitlines()), "")
        raise kind(f"{what}: {type(error).__name__}: {said or 'no message'}; correct the task file") from error


@contextmanager
def _sandboxed(trusted: bool) -> Iterator[None]:
    """Render the templates of task files in jinja's sandbox: lm-eval's own environment lets them call anything."""
    import lm_eval.utils as utils

    before = utils.env
    if not trusted:
        utils.env = SandboxedEnvironment(
            loader=before.loader, undefined=before.undefined, keep_trailing_newline=before.keep_trailing_newline
        )
        utils.env.filters.update(before.filters)
    try:
        yield
    finally:
        utils.env = before


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Read files without a progress bar each."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


class _Shown(logging.Handler):
    """Shows each warning once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Show it, unless it would stand in every run."""
        text = " ".join(record.getMessage().split())
        usual = text.startswith(_PREBUILT) or any(part in text for part in _DEFAULTS)
        if not usual and text not in self._seen:
            self._seen.add(text)
            console.warn(f"lm-eval: {text}")


@contextmanager
def _warnings_shown() -> Iterator[None]:
    logger, handler = logging.getLogger("lm_eval"), _Shown()
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
