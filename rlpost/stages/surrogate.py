"""The policy's loss in the stages that weigh sampled actions by their advantage.

Axes: N action tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from rlpost.objectives import kl, metrics
from rlpost.objectives.surrogates import clipped_surrogate, ratio
from rlpost.objectives.weights import token_mean, weigh
from rlpost.policy.policy import Scores
from rlpost.recipe.specs.grpo import Grpo
from rlpost.recipe.specs.ppo import Ppo
from rlpost.stages.params import KlPlacement
from rlpost.stages.rollouts import Beta, kl_estimate
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner, LossFunction

CLIP = 0.2
"""The clip of `clipped_surrogate` where `args` give no other."""


def surrogate_loss(surrogate: Callable[..., Tensor], cfg: Grpo | Ppo, beta: Beta) -> LossFunction:
    """Σ surrogate·weight, with the KL term if it belongs in the loss, less the entropy bonus.

    Its metrics are over the actions that were computed: those of completions with an advantage, as a rule.
    """
    low, high = (float(cfg.loss.args.get(side, CLIP)) for side in ("low", "high"))

    def loss(scores: Scores, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        old_N, advantage_N = part["old_logp"], part["advantage"]
        rows = part.rows.to(scores.logp_N.device)
        logp_N = scores.logp_N.detach()
        loss_N = surrogate(scores.logp_N, old_N, advantage_N, rows)
        line = {"ratio": ratio(logp_N, old_N), "sampler_gap": (logp_N - part["sampled_logp"]).abs()}
        if "correction" in part.per_action:
            loss_N = loss_N * part["correction"]
            line |= metrics.effective_sample_parts(part["correction"])
        if cfg.loss.fn == clipped_surrogate.__name__:
            line["clipped_low"] = metrics.clipped_low(logp_N, old_N, advantage_N, low=low)
            line["clipped_high"] = metrics.clipped_high(logp_N, old_N, advantage_N, high=high)
        if "reference" in part.per_action:
            line["kl"] = kl.k3(logp_N, part["reference"])
        if cfg.kl.beta and cfg.kl.placement is KlPlacement.loss:
            loss_N = loss_N + beta.value * kl_estimate(cfg.kl)(scores.logp_N, part["reference"])
        total = (loss_N * part["weight"]).sum()
        if scores.entropy_N is not None:
            line["exact_entropy"] = scores.entropy_N.detach()
            total = total - cfg.entropy * (scores.entropy_N * part["token_weight"]).sum()
        return total, line

    return loss


def weighted(update: Experience, cfg: Grpo | Ppo, learner: Learner) -> Experience:
    """The update with its weights, counted over all of it."""
    rows, totals = update.rows, learner.totals(update)
    weight_N = weigh(cfg.weight, rows, totals.actions, totals.completions, cfg.sampling.max_new_tokens)
    update = update.with_actions(weight=weight_N)
    return update.with_actions(token_weight=token_mean(rows, totals.actions)) if cfg.entropy else update
