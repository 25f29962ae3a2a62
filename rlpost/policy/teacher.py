"""A teacher for distillation: a model whose distributions are read where the student has been.

With LoRA it may be another adapter on the student's base; else it is a second model, or the student itself.

Axes: N action tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rlpost.errors import ModelError
from rlpost.policy import adapters
from rlpost.policy.adapter_files import is_adapter, read_adapter_config
from rlpost.policy.batch import Batch
from rlpost.policy.load import load_policy
from rlpost.policy.logprobs import Distributions
from rlpost.policy.params import Model
from rlpost.policy.policy import Policy
from rlpost.policy.reference import Reference, frozen_reference, reference_policy
from rlpost.types import Group


@dataclass(frozen=True)
class Taught:
    """A teacher at some groups' actions; its prompts may be others than the student's."""

    teacher: Reference
    groups: Sequence[Group]
    temperature: float = 1.0

    def distributions(self, batch: Batch) -> Distributions:  # noqa: ARG002 - the groups are its own
        """Its distributions at the actions of the groups, which are those of the student's batch."""
        whole = self.teacher.distributions(self.groups)
        if self.temperature == 1.0:
            return whole

        def tempered(where: slice) -> Tensor:
            return (whole(where) / self.temperature).log_softmax(-1)

        return tempered


def teacher_model(policy: Policy, checkpoint: Path, start: Path, settings: Model, *, apart: bool) -> Reference:
    """The teacher for a student that was just loaded from `start` and has not been trained yet.

    Args:
        policy: the student; with LoRA its base serves the teacher as well.
        checkpoint: what the teacher is.
        start: the checkpoint the student was loaded from.
        settings: the recipe's `model` section, for loading a model of its own.
        apart: it is a model of its own in any case.

    Raises:
        ModelError: it cannot be loaded, or its vocabulary is another one.
    """
    if not apart and policy.has_adapter and not (_has_own_head(policy) or _adapts_head(checkpoint, policy)):
        teacher = reference_policy(policy, checkpoint, start, settings, adapters.TEACHER)
    else:
        own = load_policy(checkpoint, settings, bfloat16=policy.in_bfloat16, device=policy.device, trainable=False)
        teacher = frozen_reference(own)
    must_share_vocabulary(policy, teacher.policy, str(checkpoint))
    return teacher


def must_share_vocabulary(policy: Policy, teacher: Policy, name: str) -> None:
    """Check that token by token distributions can be compared.

    Raises:
        ModelError: they cannot.
    """
    if teacher is policy:
        return
    if teacher.vocabulary != policy.vocabulary or teacher.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ModelError(
            f"{name} has another vocabulary than the model it is to teach; distributions are compared token by token, "
            "so name a model with the same tokenizer"
        )


def _has_own_head(policy: Policy) -> bool:
    """Whether the student's adapter changes the output head, which runs after the teacher's pass is over."""
    return type(policy.causal_lm.get_output_embeddings()).__module__.partition(".")[0] == "peft"


def _adapts_head(checkpoint: Path, policy: Policy) -> bool:
    """Whether a saved adapter may change the output head."""
    if not is_adapter(checkpoint):
        return False
    head = policy.causal_lm.get_output_embeddings()
    name = next(n for n, m in policy.causal_lm.named_modules() if m is head).rpartition(".")[2]
    config = read_adapter_config(checkpoint)
    targets = config.target_modules
    return isinstance(targets, str) or any(t.rpartition(".")[2] == name for t in targets or ())
