"""What the commands `eval`, `sample`, `infill`, `pairs` and `show --rows` do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rlpost.best_of import check_row, rewards_of
from rlpost.data.codec import Codec, make_codec
from rlpost.data.dataset import open_dataset
from rlpost.data.direction import before_what, in_reading_order
from rlpost.data.encoders import begin_token, plain_prompt
from rlpost.data.formats import Format, Need, encode
from rlpost.data.part import Limit
from rlpost.engine.collect import best_of as best_of_each
from rlpost.engine.collect import collect
from rlpost.engine.local import BuiltinEngine
from rlpost.engine.params import Sampling
from rlpost.errors import ModelError, RecipeError
from rlpost.evaluate.evaluator import Result
from rlpost.evaluate.table import print_stages
from rlpost.goals import infill as middle
from rlpost.goals.goal_set import GoalSet
from rlpost.goals.guide import Guide
from rlpost.goals.value_network import load_value, read_settings
from rlpost.policy.judge import AnyJudge, load_judge, same_tokens
from rlpost.policy.load import decide_bfloat16, is_backwards, load_policy
from rlpost.policy.params import Model
from rlpost.policy.policy import Policy
from rlpost.recipe.functions import bind
from rlpost.recipe.resolve import Resolved, resolve
from rlpost.recipe.row_stages import Pairs
from rlpost.recipe.schema import reads_backwards
from rlpost.rewards.score import Scorer
from rlpost.run.files import encode_line, write_atomic
from rlpost.run.lookup import find_checkpoint, newest_finished_run
from rlpost.run.names import CONFIG
from rlpost.run.stage import StageDirectory
from rlpost.shown import show_rows as show_rows
from rlpost.stage_evaluation import evaluate_recipe, judges
from rlpost.stages.context import make_scorer
from rlpost.stages.pairs import must_have_pairs, preference_rows
from rlpost.stages.params import MAKES_JUDGES
from rlpost.types import Group


def evaluate(checkpoint: str | None, recipe: str | None, overrides: Sequence[str]) -> tuple[list[str], Result, str]:
    """Evaluate a checkpoint by a recipe's `evaluation`; returns the prompts, the result, and what was evaluated.

    Args:
        checkpoint: a run, a stage, a checkpoint or a model; None for the newest finished run.
        recipe: a recipe by path or name; None for the one the checkpoint came from.
        overrides: `key=value` on it.

    Raises:
        RecipeError: no recipe is known, or it has no evaluation.
    """
    path = checkpoint or str(newest_finished_run(Path("runs")))
    model = str(find_checkpoint(path) or path)
    resolved = resolve(recipe or str(_recipe_of(path)), overrides)
    cfg = resolved.config.evaluation
    if cfg is None:
        raise RecipeError(f"{resolved.file}: it has no `evaluation`; name a recipe that has one with --recipe")
    policy = _frozen(model, resolved.config.model)
    prompts, result = evaluate_recipe(resolved, cfg, policy, _judges_of(resolved, path if recipe is None else None))
    print_stages({_title(model): result.to_json()})
    return prompts, result, model


def sample_rows(prompts: Sequence[str], result: Result) -> Iterator[dict[str, Any]]:
    """One row an answer."""
    for answers in result.answers:
        yield from answers.rows(prompts)


def sample(
    checkpoint: str,
    prompt: str,
    *,
    sampling: Sampling,
    n: int = 1,
    greedy: bool = False,
    seed: int = 0,
    best_of: int | None = None,
    recipe: str | None = None,
    example: Mapping[str, str] | None = None,
    judge: str | None = None,
    lead: Lead | None = None,
) -> list[str]:
    """`n` completions of a prompt; with `best_of`, the one of so many that the recipe's rewards or `judge` like best.

    A model with a chat template is asked in its own format. With `lead`, tokens are weighed by where they lead. A model
    of reversed text is given the end of a text, and says what comes before it. `example` are columns of the prompt's
    row beside the prompt, for rewards that read them.
    """
    row = {**(example or {}), "prompt": prompt}
    resolved = resolve(recipe) if recipe is not None else None
    if resolved is not None:
        check_row(resolved, row)
    folder = str(find_checkpoint(checkpoint) or checkpoint)
    if is_backwards(folder):
        if best_of or lead or sampling.stop:
            raise ModelError(f"{checkpoint}: it reads backwards; leave out --best-of, --guide and --stop")
        return _before(folder, prompt, sampling, n, greedy, seed)
    policy = _frozen(folder, Model())
    codec = make_codec(policy.tokenizer)
    asked: Any = [{"role": "user", "content": prompt}] if codec.template else prompt
    group = encode({**row, "prompt": asked}, Format.prompt, codec, "the prompt")
    sampling = _within(sampling, policy.longest - len(group.prompt))
    engine = BuiltinEngine(policy, guide=_guide(lead, policy, codec) if lead else None)
    groups = collect(engine, [group], best_of or n, sampling, seed=seed, greedy=greedy)
    if best_of is not None and judge is not None:
        groups = best_of_each(groups, _judge(judge, policy).by_group(groups))
    elif best_of is not None:
        assert resolved is not None
        groups = best_of_each(groups, _scorer_of(resolved, policy).score(groups).total)
    return [c.text for c in groups[0].completions]


def _before(folder: str, text: str, sampling: Sampling, n: int, greedy: bool, seed: int) -> list[str]:
    """What a model of reversed text puts before a text, in reading order."""
    policy = _frozen(folder, Model(), backwards=True)
    codec = make_codec(policy.tokenizer)
    group = Group(before_what(codec.ids(text, "the prompt"), policy.tokenizer), ())
    sampling = _within(sampling, policy.longest - len(group.prompt))
    (found,) = collect(BuiltinEngine(policy), [group], n, sampling, seed=seed, greedy=greedy)
    return [policy.tokenizer.decode(list(in_reading_order(c.ids, codec.end))) for c in found.completions]


def _within(sampling: Sampling, room: int) -> Sampling:
    """The default is for models with room; a short one answers as far as it can."""
    return replace(sampling, max_new_tokens=max(min(sampling.max_new_tokens, room), 1))


def infill(
    forward: str,
    reverse: str,
    before: str,
    after: str,
    *,
    n: int,
    sampling: Sampling,
    seed: int = 0,
    begin: bool = True,
) -> tuple[list[tuple[str, middle.Middle]], int]:
    """What may stand between two texts, best first, and the tokens sampled to find it.

    Args:
        forward: a run, a stage, a checkpoint or a model.
        reverse: the same, of reversed text.
        before: how the text begins.
        after: how it ends.
        n: samples of each model.
        sampling: how they are drawn.
        seed: of the samples.
        begin: the forward model's texts begin with the begin token, if there is one.

    Raises:
        ModelError: one reads the wrong way, or their tokenizers differ.
    """
    ahead = _frozen(str(find_checkpoint(forward) or forward), Model())
    back = _frozen(str(find_checkpoint(reverse) or reverse), Model(), backwards=True)
    if not same_tokens(ahead.tokenizer, back.tokenizer):
        raise ModelError(f"{forward} and {reverse} have different tokenizers; train both from one model")
    codec = make_codec(ahead.tokenizer)
    asked, end = plain_prompt(before, codec, "BEFORE"), codec.ids(after, "AFTER")
    first = begin_token(codec)
    if begin and asked[:1] != first:
        asked = (*first, *asked)
    sampling = _within(sampling, min(ahead.longest, back.longest) - len(asked) - len(end) - 2)
    found = middle.infill(ahead, back, asked, end, n=n, sampling=sampling, seed=seed)
    return [(codec.tokenizer.decode(list(m.ids)), m) for m in found.middles], found.sampled


@dataclass(frozen=True)
class Lead:
    """Where `sample` is to be led, and by what."""

    network: str
    """A value network: its run's stage, or a checkpoint."""
    endings: tuple[str, ...]
    avoid: bool
    """Away from the endings, not toward them."""
    candidates: int
    """Likeliest tokens that are weighed; 0: all."""


def _guide(lead: Lead, policy: Policy, codec: Codec) -> Guide:
    """The guide that `sample` asks for.

    Raises:
        ModelError: the network reads its goal, and there are several.
    """
    folder = find_checkpoint(lead.network) or Path(lead.network)
    members = [codec.ids(text, "--avoid" if lead.avoid else "--goal") for text in lead.endings]
    settings = read_settings(folder)
    if settings.condition is not None and len(members) > 1:
        raise ModelError(f"{folder}: it reads one goal, not {len(members)}; give one, or train a network for the set")
    network = load_value(folder, policy, members[0], avoid=lead.avoid)
    return network.guide(GoalSet(members), policy.end_ids, lead.candidates)


def pairs(checkpoint: str, recipe: str, out: str, overrides: Sequence[str]) -> str:
    """Write preference pairs from a checkpoint's samples, as the recipe's first `pairs` stage says; returns `out`.

    Raises:
        RecipeError: the recipe has no enabled `pairs` stage.
    """
    resolved = resolve(recipe, overrides)
    stages = resolved.config.stages
    name = next((n for n, s in stages.items() if isinstance(s, Pairs) and s.enabled), None)
    if name is None:
        raise RecipeError(f"{resolved.file}: it has no enabled stage of kind pairs, which says how to sample them")
    cfg: Pairs = stages[name]
    policy = _frozen(str(find_checkpoint(checkpoint) or checkpoint), resolved.config.model)
    limit = Limit(policy.longest - cfg.sampling.max_new_tokens)
    data = open_dataset(
        cfg.data,
        make_codec(policy.tokenizer),
        need=Need.prompts,
        limit=limit,
        seed=resolved.config.seed,
        where=f"stages.{name}.data",
        stages=_no_stage,
        bind=bind,
        base=resolved.folder,
    )
    prompts = data.next(cfg.prompts or len(data))
    scorer = make_scorer(
        cfg.rewards, f"stages.{name}", resolved.folder, judges(resolved, policy, _judges_of(resolved, None))
    )
    rows = list(preference_rows(policy, prompts, scorer, cfg, resolved.config.seed, name))
    must_have_pairs(rows, prompts, cfg, name)
    write_atomic(Path(out), b"".join(encode_line(row) for row in rows))
    return out


def _recipe_of(path: str) -> Path:
    """The resolved recipe of the run that a path lies in.

    Raises:
        RecipeError: it lies in none.
    """
    folder = Path(path).resolve()
    for parent in (folder, *folder.parents):
        if (parent / CONFIG).is_file():
            return parent / CONFIG
    what = "not part of a run" if folder.exists() else "not here"
    raise RecipeError(f"{path}: {what}, so its recipe is not known; name one with --recipe")


def _title(model: str) -> str:
    parts = Path(model).parts
    return "/".join(parts[-3:-1]) if parts[-1] == "final" else model


def _judges_of(resolved: Resolved, path: str | None) -> dict[str, Path]:
    """The models for rewards that the recipe's run has finished; of the run that `path` lies in, if it is given."""
    run = Path(resolved.config.runs) / resolved.config.run if path is None else _recipe_of(path).parent
    stages = resolved.config.stages.items()
    found = {n: StageDirectory(run / n).done for n, s in stages if s.kind in MAKES_JUDGES or reads_backwards(s)}
    return {name: folder for name, folder in found.items() if folder is not None}


def _scorer_of(resolved: Resolved, policy: Policy) -> Scorer:
    rewards, where = rewards_of(resolved)
    return make_scorer(rewards, where, resolved.folder, judges(resolved, policy, _judges_of(resolved, None)))


def _judge(path: str, policy: Policy) -> AnyJudge:
    return load_judge(find_checkpoint(path) or Path(path), Model(), policy)


def _frozen(path: str, model: Model, backwards: bool = False) -> Policy:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = decide_bfloat16(model.precision, device)
    return load_policy(path, model, bfloat16=half, device=device, trainable=False, backwards=backwards)


def _no_stage(name: str) -> Path:
    raise RecipeError(f"rows of stage {name} exist only in a run; show or sample without that source")
