"""The model card of an exported checkpoint, written from its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from rlpost.evaluate.table import measured, stage_table
from rlpost.inference.provenance import UNKNOWN, Provenance, is_hub_name, provenance, sources_of
from rlpost.strict_yaml import dump

_FEW = ("steps", "epochs", "learning_rate", "batch_size", "prompts_per_step", "group_size")
"""Keys of a stage that the card's table shows."""
REFERENCE = "REPO_OR_FOLDER"
"""Where a card does not know what its readers will load."""


class Written(Enum):
    """What a folder holds."""

    merged = "transformers"
    adapter = "peft"


@dataclass(frozen=True)
class About:
    """What the card says of the exported weights."""

    written: Written
    family: str
    """transformers' model_type."""
    ends: Sequence[str]
    """The tokens that end a completion."""
    dtype: str
    chat: bool
    """Whether it has a chat template."""


def card(checkpoint: Path, about: About, name: str = REFERENCE) -> str:
    """The text of README.md.

    Args:
        checkpoint: what is exported; its run is read.
        about: the exported weights.
        name: how readers will load it: a hub name or a folder.
    """
    known = provenance(checkpoint)
    parts = [
        f"---\n{dump(_front(known, about)).strip()}\n---",
        f"# {name.rpartition('/')[2] if name != REFERENCE else checkpoint_title(checkpoint)}",
        _summary(known, about),
        _training(known),
        _evaluation(known),
        _loading(about, name),
        f"## Licence\n\n{_licence(known)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def checkpoint_title(checkpoint: Path) -> str:
    """`demo, grpo` of runs/demo/grpo/final; else the folder's name."""
    parts = checkpoint.resolve().parts
    if parts[-1] == "final" and len(parts) >= 3:
        return f"{parts[-3]}, {parts[-2]}"
    return parts[-1]


def _front(known: Provenance, about: About) -> dict[str, Any]:
    """The metadata that the hub reads."""
    front: dict[str, Any] = {"library_name": about.written.value, "pipeline_tag": "text-generation"}
    if known.on_hub:
        front["base_model"] = known.base
        front["base_model_relation"] = "adapter" if about.written is Written.adapter else "finetune"
    if not known.from_scratch:
        front["license"] = known.licence if not known.licence.startswith("see ") else "other"
    kinds = [str(s.get("kind")) for s in known.stages.values() if ".py:" not in str(s.get("kind"))]
    front["tags"] = list(dict.fromkeys(["rlpost", *kinds]))
    if known.datasets:
        front["datasets"] = known.datasets
    return front


def _summary(known: Provenance, about: About) -> str:
    base = f"[{known.base}](https://huggingface.co/{known.base})" if known.on_hub else known.base
    what = (
        f"A LoRA adapter of {base} ({about.family})"
        if about.written is Written.adapter
        else f"A {about.family} model that began as {base}"
    )
    lora = known.model.get("lora")
    ranks = f" with LoRA (r={lora['r']}, alpha={lora['alpha']:g})" if lora else ""
    path = " → ".join(known.stages) or "an unknown recipe: its run is not at hand"
    ends = ", ".join(f"`{end}`" for end in about.ends)
    return f"{what}, trained by {path}{ranks}. Weights in {about.dtype}; a completion ends with {ends}."


def _licence(known: Provenance) -> str:
    if known.from_scratch:
        return "Trained from random weights: no base model's licence binds it, and this card names none."
    if known.licence == UNKNOWN:
        return "Of the base model: unknown. Look it up before you pass these weights on."
    return f"Of the base model: {known.licence}."


def _training(known: Provenance) -> str:
    if not known.stages:
        return ""
    keys = [key for key in _FEW if any(s.get(key) is not None for s in known.stages.values())]
    rows = [
        [name, str(stage.get("kind", "")), *(_cell(stage.get(key)) for key in keys), ", ".join(_data(stage)) or "–"]
        for name, stage in known.stages.items()
    ]
    table = _table(["stage", "kind", *(key.replace("_", " ") for key in keys), "data"], rows)
    recipe = dump({"model": _anonymous(known.model), "stages": _anonymous(known.stages)}).strip()
    return (
        f"## Training\n\n{table}\n\n<details><summary>The recipe, with every setting</summary>\n\n"
        f"```yaml\n{recipe}\n```\n\n</details>"
    )


def _data(stage: Mapping[str, Any]) -> list[str]:
    """A few words a source of rows: the hub's name, the file's, the task's, or the stage's."""
    said = []
    for source in sources_of(stage):
        if path := source.get("path"):
            hub = is_hub_name(str(path))
            words = [str(path) if hub else Path(path).name, source.get("config"), source.get("split") if hub else None]
            said.append(" ".join(str(word) for word in words if word))
        elif task := source.get("task"):
            said.append(f"task {Path(str(task['fn'])).name}")
        elif source.get("stage"):
            said.append(f"rows of stage {source['stage']}")
    return said


def _evaluation(known: Provenance) -> str:
    if not known.results:
        return ""
    columns, rows = stage_table(known.results)
    prompts = next(iter(next(iter(known.results.values())).values()))["prompts"]
    rewards = known.evaluation.get("rewards") or [{}]
    measure = Path(str(rewards[0].get("name") or rewards[0].get("fn") or "reward")).name
    data = ", ".join(_data(known.evaluation))
    sampling = known.evaluation.get("sampling") or {}
    shown = {"temperature": "temperature {}", "max_new_tokens": "at most {} tokens"}
    drawn = ", ".join(text.format(sampling[key]) for key, text in shown.items() if key in sampling)
    is_sampled = any("sampled" in result for result in known.results.values())
    how = f"; sampled answers at {drawn or 'their defaults'}" if is_sampled else ""
    what = measured(known.results.values())
    return (
        f"## Evaluation\n\n{what[0].upper()}{what[1:]}, by `{measure}`, with 95 % interval: "
        f"{prompts} prompts ({data}){how}.\n\n{_table(columns, rows)}"
    )


def _loading(about: About, name: str) -> str:
    load = (
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")'
    )
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if about.written is Written.adapter:
        imports = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer, GenerationConfig"
        load = load.replace("AutoModelForCausalLM", "AutoPeftModelForCausalLM")
        load += f'\nmodel.generation_config = GenerationConfig.from_pretrained("{name}")  # the ends that were trained'
    prompt = (
        'inputs = tokenizer.apply_chat_template([{"role": "user", "content": "…"}], add_generation_prompt=True,\n'
        '                                       return_tensors="pt", return_dict=True)'
        if about.chat
        else 'inputs = tokenizer("…", return_tensors="pt", return_token_type_ids=False)'
    )
    generate = (
        "output = model.generate(**inputs, max_new_tokens=256)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))'
    )
    served = f"\n\nOr `vllm serve {name}`, or `rlpost chat {name}`." if about.written is Written.merged else ""
    return f"## How to load\n\n```python\n{imports}\n\n{load}\n{prompt}\n{generate}\n```{served}"


def _anonymous(value: Any) -> Any:
    """The settings that are set, with paths on this machine cut to their last part."""
    if isinstance(value, Mapping):
        kept = {k: _anonymous(v) for k, v in value.items() if v not in (None, {}, [])}
        return {k: v for k, v in kept.items() if v not in (None, {}, [])}
    if isinstance(value, list):
        return [_anonymous(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~", "..")) and "/" in value[1:]:
        return value.rpartition("/")[2]
    return value


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
