"""The balance loss of a stage that trains a mixture of experts."""

from __future__ import annotations

from rlpost import console
from rlpost.policy.balance import Balance, balance_of, is_mixture, own_coefficient
from rlpost.policy.policy import Policy
from rlpost.policy.value_head import ValueHeadModel
from rlpost.recipe.specs.common import Training


def balance_for(model: Policy | ValueHeadModel, cfg: Training, stage: str) -> Balance | None:
    """The balance loss, if the model is a mixture of experts; prints why where such a model has none."""
    trunk = model if isinstance(model, Policy) else model.trunk if model.trains_trunk else None
    if trunk is None or not is_mixture(trunk.causal_lm):
        return None
    own = own_coefficient(trunk.causal_lm)
    wish = own if cfg.aux_loss_coef is None else cfg.aux_loss_coef
    if not wish or not cfg.balances:
        if cfg.aux_loss_coef is None:
            console.say(f"{stage}: the mixture of experts trains without a balance loss: {_why_none(cfg, own)}")
        return None
    found = balance_of(trunk.causal_lm, wish)
    if found is None:
        kind = type(trunk.causal_lm).__name__
        console.warn(f"{stage}: {kind} trains without a balance loss: its router logits cannot be read")
    return found


def _why_none(cfg: Training, own: float | None) -> str:
    if not cfg.balances:
        return f"{cfg.kind} has none"
    why = "its configuration names no router_aux_loss_coef" if own is None else "its router_aux_loss_coef is 0"
    return f"{why}; set aux_loss_coef for one"
