"""The model of a recipe."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field

from rlpost.data.params import Tokenizer
from rlpost.section import Choice, Local, Section
from rlpost.suggest import hint


class Precision(Choice):
    """Number format of the forward pass."""

    auto = "auto"
    """bfloat16 on a GPU that supports it, and for models at least 256 wide on a CPU that has instructions for it
    (docs/how-it-works.md#fast-layers-on-a-cpu); decided once a run."""
    float32 = "float32"
    """32 bits."""
    bfloat16 = "bfloat16"
    """16 bits, with the range of float32."""


class Attention(Choice):
    """How a batch is laid out in the forward pass."""

    auto = "auto"
    """`flat` where it is exact, else `padded` (docs/how-it-works.md#the-check-at-load-and-the-fallback)."""
    flat = "flat"
    """Completions share their prompt, and nothing is padded; a model for which that is not exact is refused."""
    padded = "padded"
    """Every row for itself, padded to the longest."""


class Quantization(Choice):
    """Number format of the weights under an adapter."""

    nf4 = "nf4"
    """Four bits, the scales of their blocks in eight: QLoRA (Dettmers et al. 2023, arXiv:2305.14314)."""


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685); their weights are float32."""

    r: int = Field(16, ge=1)
    """Rank."""
    alpha: float = Field(32.0, gt=0)
    """Scale: the adapter's product is multiplied by `alpha / r`."""
    use_rslora: bool = False
    """Multiply by `alpha / √r` instead (Kalajdzievski 2023, arXiv:2312.03732)."""
    use_dora: bool = False
    """Train the length of every row of a weight apart from its direction (DoRA, Liu et al. 2024, arXiv:2402.09353)."""
    init_lora_weights: str | None = Field(None, pattern=r"^pissa(_niter_[1-9][0-9]*)?$")
    """How a new adapter begins: by default as nothing; `pissa`: as the principal part of the weights, which is taken
    from them (Meng et al. 2024, arXiv:2404.02948); `pissa_niter_N`: that part by N iterations, which is faster."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the adapter; above 0 every row is computed with its own copy of the prompt."""
    target_modules: Any = None
    """Which modules get an adapter, as in peft; by default `all-linear`, or those of a saved adapter that training goes
    on with. Another choice than the saved one is refused."""
    modules_to_save: list[str] | None = None
    """Modules, such as `lm_head` and `embed_tokens`, of which the adapter has a copy of its own that is trained whole;
    by default none, or those of a saved adapter."""

    def problems(self, where: str) -> Iterator[str]:
        """What does not go together."""
        if self.init_lora_weights and self.use_dora:
            yield (
                f"{where}.init_lora_weights: a DoRA divides by the length of the whole weight, from which PiSSA takes "
                "a part; leave out one of them"
            )
        if self.modules_to_save is not None and not self.modules_to_save:
            yield f"{where}.modules_to_save: an empty list; leave it out"


class Model(Section):
    """The model that all stages start from: exactly one of `path` and `config`."""

    path: Annotated[str | None, Local()] = None
    """A model folder, a run, stage or checkpoint of rlpost, a GGUF file (also `PACKAGE:FILE.gguf`, in an installed
    package), or the name of a model on the hub."""
    revision: str | None = None
    """Revision of a model on the hub."""
    config: dict[str, Any] = Field(default_factory=dict)
    """A model from scratch: `model_type` and fields of that configuration in transformers."""
    tokenizer: Tokenizer | None = None
    """The tokenizer of a model from scratch, which needs one; `path` brings its own."""
    chat_template: Annotated[str | None, Local()] = None
    """A Jinja file that replaces the tokenizer's chat template."""
    lora: Lora | None = None
    """Train low-rank adapters; by default all weights are trained."""
    quantization: Quantization | None = None
    """Keep the linear layers under an adapter in four bits (docs/recipes.md#kinds-of-lora); needs `lora`."""
    precision: Precision = Precision.auto
    """Number format of the forward pass."""
    attention: Attention = Attention.auto
    """How a batch is laid out in the forward pass."""
    fast: bool = True
    """On a CPU, layers compiled for this machine, in one operation each, and products by oneDNN; on a GPU, attention
    without padding (docs/how-it-works.md#on-a-gpu); where that is exact. false: PyTorch's own
    (docs/how-it-works.md#fast-layers-on-a-cpu)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

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
        if self.quantization and self.lora is None:
            yield (
                f"{where}.quantization: weights in four bits cannot be trained themselves; set {where}.lora, which "
                f"trains an adapter on them, or leave {where}.quantization out"
            )
        if self.quantization and self.lora and self.lora.init_lora_weights:
            yield (
                f"{where}.lora.init_lora_weights: PiSSA begins with singular vectors of weights, and those under "
                f"{where}.quantization are in four bits; leave out one of them"
            )
        if self.config and self.tokenizer is None:
            yield f"{where}.tokenizer: missing - a model from scratch needs one: {{kind: characters, alphabet: ...}}"
