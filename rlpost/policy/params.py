"""The model of a recipe."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field

from rlpost.data.params import Tokenizer
from rlpost.section import Choice, Local, Section
from rlpost.suggest import hint


class Precision(Choice):
    """Number format of the forward pass; `auto` measures once and remembers."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Attention(Choice):
    """`flat` shares prompts, never pads; `padded` is the plain way; `auto` takes flat where it is exact."""

    auto = "auto"
    flat = "flat"
    padded = "padded"


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), trained in float32."""

    r: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Any = None
    """As in peft; by default `all-linear`, or what a saved adapter has that training goes on with."""


class Model(Section):
    """The model all stages start from: `path`, or `config` and `tokenizer` for one made from scratch."""

    path: Annotated[str | None, Local()] = None
    """A folder, a checkpoint of rlpost, or the name of a model on the hub."""
    revision: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    """From scratch: `model_type` and the fields of that configuration in transformers."""
    tokenizer: Tokenizer | None = None
    chat_template: Annotated[str | None, Local()] = None
    """A Jinja file, for models that bring no chat template."""
    lora: Lora | None = None
    precision: Precision = Precision.auto
    attention: Attention = Attention.auto
    gradient_checkpointing: bool = False

    def problems(self, where: str) -> Iterator[str]:
        """Where it comes from."""
        if bool(self.path) == bool(self.config):
            which = "not both" if self.path else "neither is given"
            yield f"{where}: give exactly one of {where}.path and {where}.config ({which})"
        if self.path and self.tokenizer:
            yield f"{where}.tokenizer: is for models made from scratch - {where}.path brings its own; remove it"
        if self.config and "model_type" not in self.config:
            near = hint("model_type", map(str, self.config))
            yield f"{where}.config.model_type: missing - the name of an architecture, such as llama{near}"
        if self.config and self.tokenizer is None:
            yield f"{where}.tokenizer: missing - a model from scratch needs one: {{kind: characters, alphabet: ...}}"
