"""The model of a recipe."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Optional

from rlpost.data.params import Tokenizer
from rlpost.key import key

# OmegaConf reads these annotations and refuses `X | None` of dataclasses in places: hence Optional.
# ruff: noqa: UP045


class Precision(StrEnum):
    """Number format of the forward pass; `auto` measures once and remembers."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Attention(StrEnum):
    """`flat` shares prompts, never pads; `padded` is the plain way; `auto` takes flat where it is exact."""

    auto = "auto"
    flat = "flat"
    padded = "padded"


@dataclass
class Lora:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), trained in float32."""

    r: int = key(16, ge=1)
    alpha: float = key(32.0, gt=0)
    dropout: float = key(0.0, ge=0, lt=1)
    target_modules: Any = None
    """As in peft; by default `all-linear`, or what a saved adapter has that training goes on with."""


@dataclass
class Model:
    """The model all stages start from: `path`, or `config` and `tokenizer` for one made from scratch."""

    path: Optional[str] = key(None, path=True)
    """A folder, a checkpoint of rlpost, or the name of a model on the hub."""
    revision: Optional[str] = None
    config: dict[str, Any] = field(default_factory=dict)
    """From scratch: `model_type` and the fields of that configuration in transformers."""
    tokenizer: Optional[Tokenizer] = None
    chat_template: Optional[str] = key(None, path=True)
    """A Jinja file, for models that bring no chat template."""
    lora: Optional[Lora] = None
    precision: Precision = Precision.auto
    attention: Attention = Attention.auto
    gradient_checkpointing: bool = False
