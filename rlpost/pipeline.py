"""Runs the stages of a recipe in order, each from the checkpoint of one before; finished ones are skipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from rlpost import console, ranks
from rlpost.agreement import must_agree, on_all
from rlpost.base_model import base_checkpoint, prove_base
from rlpost.data.codec import make_codec
from rlpost.data.formats import DataRole
from rlpost.data.layouts import read_as
from rlpost.data.origins import label
from rlpost.data.sources import open_source
from rlpost.data.templates import clock_at
from rlpost.engine.params import SERVER, EngineChoice
from rlpost.engine.vllm_command import must_have_program
from rlpost.errors import Interrupted, ModelError, RecipeError
from rlpost.evaluate.params import Evaluation
from rlpost.inference import memory_plan
from rlpost.inference.vllm_check import must_have_vllm
from rlpost.policy.gguf_files import gguf_file, must_be_gguf
from rlpost.policy.identity import Inputs, first_difference
from rlpost.policy.load import decide_bfloat16, width_of
from rlpost.policy.memory import free_memory, keep_freed_memory
from rlpost.policy.model_files import load_tokenizer
from rlpost.policy.params import Lora, Model, Precision
from rlpost.policy.quantized import must_have_bitsandbytes
from rlpost.policy.sharded import Shards
from rlpost.recipe.functions import bind_all, files_given
from rlpost.recipe.kinds import function_of
from rlpost.recipe.resolve import Resolved
from rlpost.recipe.rules import Leaves
from rlpost.recipe.schema import Recipe
from rlpost.recipe.specs.common import Stage, Training
from rlpost.rewards.judge import Judge
from rlpost.rewards.judge_answers import kept_in
from rlpost.run.changes import LENGTHS
from rlpost.run.contents import Contents
from rlpost.run.environment import versions
from rlpost.run.interrupt import Interrupts
from rlpost.run.layout import RunDirectory, open_run
from rlpost.run.manifest import measure
from rlpost.run.names import JUDGED, TRACKERS
from rlpost.run.shelf import Shelf
from rlpost.section import walk
from rlpost.stage_evaluation import StageEvaluations
from rlpost.stage_rows import ROW_KEYS, need_of, open_rows, own_sources, positions_of
from rlpost.stages.context import Context
from rlpost.stages.references import readable_references
from rlpost.trackers.api import About
from rlpost.trackers.mirrors import Mirrors, check, open_mirrors
from rlpost.train.optimizers import must_be_installed
from rlpost.train.params import Strategy
from rlpost.unexpected import traceback_kept
from rlpost.usercode.binding import bind


@dataclass
class Progress:
    """Results so far."""

    current: Path
    """The checkpoint the next stage starts from."""
    checkpoints: dict[str, Path]
    """Results by stage, and `base`."""
    rows: dict[str, Path] = field(default_factory=dict)
    """Datasets that stages wrote, by stage."""


def train(resolved: Resolved, allow_change: bool = False) -> Path:
    """Run the recipe's stages, resuming unfinished ones; returns the last checkpoint.

    Functions, their arguments, and the data of all stages are checked first; rows are encoded once for that.

    Raises:
        RlpostError: any of its kinds, see errors.py.
    """
    recipe = resolved.config
    device, shards = _set_up(recipe)
    must_agree({"a recipe of sha256": resolved.sha256, **versions()})
    for line in on_all(lambda: preflight(resolved, rows=False)):
        console.say(line)
    code = functions_of(resolved)
    with (
        open_run(resolved.tree, resolved.file, resolved.overrides, allow_change, code, _leaves(recipe)) as run,
        traceback_kept(run.path),
        Interrupts() as interrupts,
        _kept_by(run),
        _mirrors(resolved, run) as mirrors,
    ):
        base = base_checkpoint(resolved, run)
        bfloat16 = _bfloat16(run, recipe.model, base, device)
        memo = prove_base(run, base, recipe.model.revision)
        done = Progress(base, {"base": base})
        shelf = Shelf(run.path)
        evaluations = StageEvaluations(resolved, run.path, bfloat16, device, code, memo, shelf, mirrors)
        _encode_rows(resolved, run, base, shelf, evaluations)
        evaluations.after("base", base, done.checkpoints)
        for name, stage in _enabled(recipe).items():
            if (signal := interrupts.agreed()) is not None:
                raise Interrupted(f"stopped before {name}; run the same command to go on", signal)
            context = Context(
                name=name,
                model=recipe.model,
                start=done.checkpoints[stage.start] if stage.start else done.current,
                out=run.stage(name),
                checkpoints=dict(done.checkpoints),
                rows_of=done.rows.__getitem__,
                folder=resolved.folder,
                seed=recipe.seed,
                bfloat16=bfloat16,
                device=device,
                interrupts=interrupts,
                lineage={"recipe_sha256": resolved.sha256},
                inputs=Inputs(recipe.model.revision, memo),
                settings=run.record.config["stages"][name],
                rollouts=recipe.rollouts,
                allow_change=allow_change,
                shelf=shelf,
                mirrors=mirrors,
                evaluation=evaluations.during(stage, done.checkpoints),
                shards=shards,
                check=readable_references(stage, f"stages.{name}", stage.rows()),
            )
            _run_stage(context, stage, done, evaluations)
            if not run.record.base:  # a model of the hub, which has been downloaded only now
                prove_base(run, base, recipe.model.revision)
        evaluations.print()
        return done.current


def _set_up(recipe: Recipe) -> tuple[torch.device, Shards | None]:
    """Join the other processes of the run, if there are any; returns this one's device, and how models are sharded.

    Raises:
        RecipeError: the recipe wants another number of them, or there is no device for one.
    """
    device = ranks.start()
    wanted = recipe.parallel.processes
    if wanted not in (1, ranks.count()):
        raise RecipeError(
            f"parallel.processes: {wanted}, but this run was started as {ranks.count()} - start it by `rlpost train`, "
            "which starts them, or leave the number to the launcher"
        )
    if recipe.threads:
        torch.set_num_threads(max(1, recipe.threads // ranks.on_this_machine()))
    keep_freed_memory()
    return device, _shards(recipe, device)


def _shards(recipe: Recipe, device: torch.device) -> Shards | None:
    """How models are sharded, if the recipe says so.

    Raises:
        RecipeError: shards are to be kept where they are anyway.
    """
    if recipe.parallel.strategy is Strategy.ddp:
        return None
    if recipe.parallel.cpu_offload and device.type == "cpu":
        raise RecipeError("parallel.cpu_offload: weights are on the CPU already, since there is no GPU - leave it out")
    return Shards(ranks.mesh(device), device, recipe.parallel.cpu_offload)


def functions_of(resolved: Resolved) -> dict[str, str]:
    """`FILE:NAME` -> sha256 of the file, for the user's functions and other files that the recipe names."""
    found = {f"{b.file}:{b.name}": b.sha256 for b in bind_all(resolved.config, resolved.folder) if b.sha256}
    found |= {stage.kind: stage.file[1] for stage in _enabled(resolved.config).values() if stage.file}
    return found | {str(file): measure(file)["sha256"] for file in files_of(resolved.config, resolved.folder)}


def _mirrors(resolved: Resolved, run: RunDirectory) -> AbstractContextManager[Mirrors]:
    logging = resolved.config.logging
    about = About(run.path, run.record.run, logging.project, run.record.config, run.path / TRACKERS)
    return open_mirrors(logging, about, resolved.folder)


def _enabled(recipe: Recipe) -> dict[str, Stage]:
    return {name: stage for name, stage in recipe.stages.items() if stage.enabled}


def _leaves(recipe: Recipe) -> dict[str, str]:
    """Stage -> its kind of result, for stages whose result is not a policy."""
    return {name: str(s.leaves) for name, s in recipe.stages.items() if s.leaves is not Leaves.policy}


def preflight(resolved: Resolved, rows: bool = True) -> list[str]:
    """Bind every function and read every source before a model is loaded; returns what was found, in lines.

    With `rows` all rows are read. Without, only the first ones of sources that will be encoded before training.

    Raises:
        RecipeError: a function or an argument is wrong, or there is no command for a server to be started.
        DataError: a source is missing, empty, or lacks a column, or a reference answer cannot be read.
        ModelError: the recipe's model or engine needs a package that is not installed, or vLLM has not the model.
    """
    check(resolved.config.logging, resolved.folder)
    if gguf := gguf_file(resolved.config.model.path):
        must_be_gguf(gguf)
    if in_bits := resolved.config.model.quantization:
        must_have_bitsandbytes(in_bits)
    must_have_vllm(resolved)
    _check_engines(resolved.config)
    lines = [f"warning: {w}" for w in resolved.warnings]
    for b in bind_all(resolved.config, resolved.folder):
        if b.file is not None:
            lines.append(f"{b.where}: {b.name} from {b.file} (sha256 {(b.sha256 or '')[:12]})")
        if isinstance(b.call, Judge):
            lines.append(f"{b.where}: {b.call}")
    for name, stage in _enabled(resolved.config).items():
        if stage.file is not None:
            file, sha256 = stage.file
            lines.append(f"stages.{name}.kind: {stage.kind.rpartition(':')[2]} from {file} (sha256 {sha256[:12]})")
        if isinstance(stage, Training):
            must_be_installed(stage.optimizer, f"stages.{name}.optimizer")
        for key in ROW_KEYS:
            _check_data(stage, f"stages.{name}", key, need_of(stage, key), resolved.folder, rows)
    cfg = resolved.config.evaluation
    if cfg is not None:
        _check_data(cfg, "evaluation", "data", DataRole.prompts, resolved.folder, rows or not cfg.every_stage)
    return lines


def dry_run(resolved: Resolved) -> list[str]:
    """What `train` would do, after all checks that need no model."""
    lines = preflight(resolved)
    recipe = resolved.config
    start = recipe.model.path or f"a new {recipe.model.config.get('model_type')} model"
    trained = "all weights" if recipe.model.lora is None else _adapter(recipe.model.lora)
    trained += f" on weights in {recipe.model.quantization}" if recipe.model.quantization else ""
    lines.append(f"{Path(recipe.runs) / recipe.run}: from {start}, training {trained}")
    for name, stage in recipe.stages.items():
        lines.append(f"  {name}: {_plan(stage)}" if stage.enabled else f"  {name}: left out")
    if isinstance(recipe.evaluation, Evaluation):
        lines.append(f"  evaluation: {', '.join(recipe.evaluation.data)}")
    return [*lines, *memory_plan.lines(resolved)]


def _adapter(lora: Lora) -> str:
    """The adapter in words."""
    kinds = [name for name, has in (("rank-stabilised", lora.use_rslora), ("PiSSA", lora.init_lora_weights)) if has]
    name = " ".join([*kinds, "DoRA" if lora.use_dora else "LoRA"])
    return " and ".join([f"{name} r={lora.r}", *(lora.modules_to_save or ())])


def files_of(recipe: Recipe, folder: Path) -> list[Path]:
    """Files that the recipe names besides data, models and functions: templates, lists of goals."""
    named = [recipe.model.chat_template] if recipe.model.chat_template else []
    goals = [getattr(stage, "goals", None) for stage in recipe.stages.values() if stage.enabled]
    named += files_given(recipe)
    return [folder / name for name in [*named, *(g.path for g in goals if g and g.path)] if (folder / name).is_file()]


@contextmanager
def _kept_by(run: RunDirectory) -> Iterator[None]:
    """Inside, templates get the time from the run, and judges keep their answers in it."""
    with clock_at(lambda: _beginning(run)), kept_in(run.path / JUDGED, run.record.run):
        yield


def _beginning(run: RunDirectory) -> str:
    """When the run began, to the minute, for chat templates that ask for the time."""
    return str(run.decide_once("now", lambda: datetime.now().isoformat(timespec="minutes")))


def _bfloat16(run: RunDirectory, model: Model, base: Path, device: torch.device) -> bool:
    """Whether to run in bfloat16; `auto` is measured once and recorded in the run."""

    def decide() -> bool:
        return decide_bfloat16(model.precision, device, width_of(base, model.revision))

    return decide() if model.precision is not Precision.auto else bool(run.decide_once("bfloat16", decide))


def _run_stage(context: Context, stage: Stage, done: Progress, evaluations: StageEvaluations) -> None:
    result = context.out.done
    longer = result is not None and _asks_for_more(context, stage)
    if result is not None and not longer:
        _inputs_must_be_the_same(context, done)
        context.mirrors.catch_up(context.name, context.out.path)
        console.say(f"{context.name}: done already")
    else:
        evaluations.forget(context.name)
        with context.opened, ranks.losses_told():
            result = function_of(stage)(context, stage)
        if not isinstance(result, Path):
            what = f"stages.{context.name}.kind: {stage.kind} returned {result!r}"
            raise RecipeError(f"{what} - return what context.finish(...) or context.finish_dataset(...) gives")
        free_memory(context.device)  # what the stage's models have left: the next one loads its own
    if stage.leaves is Leaves.rows:
        done.rows[context.name] = context.out.rows
        return
    done.checkpoints[context.name] = result.resolve()
    if stage.leaves is Leaves.policy:
        done.current = done.checkpoints[context.name]
        evaluations.after(context.name, done.current, done.checkpoints)


def _asks_for_more(context: Context, stage: Stage) -> bool:
    """Whether the recipe makes a finished stage longer (which needs --allow-change)."""
    before = context.out.proof.get("settings", {})
    return any(before.get(key, getattr(stage, key, None)) != getattr(stage, key, None) for key in LENGTHS)


def _inputs_must_be_the_same(context: Context, done: Progress) -> None:
    """Compare the inputs of a finished stage with those there are now.

    Raises:
        ModelError: a result of an earlier stage, a reference or a dataset has changed.
    """
    made_from: Mapping[str, Contents] = context.out.proof.get("inputs", {})
    inputs = Inputs(context.model.revision)
    earlier = {"start": context.start, **done.checkpoints, **{name: rows.parent for name, rows in done.rows.items()}}
    for name in made_from.keys() & earlier.keys():
        inputs.note(name, earlier[name])
    changed = first_difference(made_from, inputs.identities(made_from))
    if changed is not None:
        name, found = changed
        raise ModelError(
            f"{context.out.path}: {inputs.path(name)} has changed since this stage was trained from it: {found}; "
            f"restore that, remove {context.out.path} to train it again, or choose another run=NAME"
        )


def _encode_rows(
    resolved: Resolved, run: RunDirectory, base: Path, shelf: Shelf, evaluations: StageEvaluations
) -> None:
    """Encode the rows of all unfinished stages and of the evaluation, to find wrong ones before training.

    Raises:
        DataError: a row is malformed or too long. ModelError: the tokenizer or its chat template is wrong.
    """
    names = [name for name in _enabled(resolved.config) if not run.stage(name).says_done]
    if not names:
        return
    model = resolved.config.model
    codec, positions = make_codec(load_tokenizer(str(base), model)), positions_of(base, model.revision)
    for name in names:
        for key in ROW_KEYS:
            if own_sources(resolved.config.stages[name], key):
                open_rows(resolved, name, codec, positions, shelf, key)
    evaluations.open_rows(codec, positions)


def _check_engines(recipe: Recipe) -> None:
    """Check that servers of vLLM that the run is to start can be started."""
    for top, section in recipe.sections():
        for where, inner in walk(section, top):
            if isinstance(inner, EngineChoice) and inner.engine == SERVER:
                must_have_program(inner, where)


def _check_data(stage: Any, where: str, at: str, need: DataRole, folder: Path, rows: bool) -> None:
    """Check the first rows of the sources at a key of the stage, with `rows` all of them, and their answers."""
    check = None if "." in at else readable_references(stage, where, need)
    for name, source in own_sources(stage, at).items():
        key = f"{where}.{at}.{name}"
        reading = open_source(source, stages=_no_stage, where=key, bind=bind, base=folder)
        if not rows and (source.kfold or source.map):
            continue  # reading its first row may take more than the file's first rows
        chunks = reading.chunks()
        first = next(chunks)
        if source.augment is None:
            read_as(first.rows[:1], label(source, key), need, source.columns, source.is_made)
        found = chain([first], chunks if rows else ())
        for _ in found if check is None or source.augment is not None else check(found, reading.location):
            pass


def _plan(stage: Any) -> str:
    length = f"{stage.steps} steps" if getattr(stage, "steps", None) else ""
    if not length and getattr(stage, "epochs", None):
        length = f"{stage.epochs:g} epochs"
    if not hasattr(stage, "steps") and getattr(stage, "prompts", None):
        length = f"{stage.prompts} prompts"
    return " ".join(filter(None, [stage.kind, length, "on", ", ".join(stage.data)]))


def _no_stage(name: str) -> Path:
    raise AssertionError(f"{name} was read before any stage ran")
