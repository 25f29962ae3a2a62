"""All claims at once, on the default tree and on others."""

import pytest
import torch

from rlpost.objectives import advantages, kl, preference, supervised, surrogates
from rlpost.objectives.correction import off_policy_ratio
from rlpost.oracle import claims_values
from rlpost.oracle.report import Report
from rlpost.oracle.verify import verify


@pytest.fixture(scope="module")
def report() -> Report:
    return verify()


def named(report, name):
    return next(row for section in report.sections for row in section.rows if row.name == name)


def test_the_default_tree_proves_everything(report):
    assert report.failed == []
    verdicts = [row.verdict for section in report.sections for row in section.rows]
    assert verdicts.count("exact") >= 50
    assert not [v for v in verdicts if v.startswith(("skipped", "not computed", "no bias"))]


def test_numbers_of_the_default_tree(report):
    """Known from elsewhere for this tree and seed: the usual KL terms and how little of ∇KL they have."""
    assert named(report, "… and their cosine").value == "0.5101"
    assert named(report, "k3 in the loss").value == "0.2902"
    assert named(report, "k3 in the reward").value == "0.7208"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("vocabulary", "depth"), [(2, 2), (2, 6), (3, 2)])
def test_other_trees_and_seeds(vocabulary, depth, seed):
    assert verify(vocabulary, depth, seed, models=False).failed == []


def test_a_larger_tree_says_what_it_leaves_out():
    report = verify(4, 4, 7)
    assert report.ok
    assert named(report, "leave_one_out, sequence_sum").value.endswith("/ skipped")


def test_a_claim_of_every_kind_is_there(report):
    titles = " ".join(section.title for section in report.sections)
    for kind in ("group estimators", "KL", "credit", "shaping", "surrogates", "preferences", "trust region", "model"):
        assert kind in titles


def test_the_same_seed_gives_the_same_report(report):
    assert verify(3, 3, 1, models=False).sections != verify(3, 3, 0, models=False).sections


def test_an_estimator_that_breaks_is_found(monkeypatch):
    """A baseline that contains a thousandth of the completion's own reward."""
    honest = advantages.leave_one_out
    monkeypatch.setattr(advantages, "leave_one_out", lambda r: honest(r) - 1e-3 * r**2)
    failed = [row.name for row in verify(models=False).failed]
    assert "leave_one_out, sequence_sum" in failed
    # Where it is written out, and where it stands beside the KL or an expert's rows.
    assert {f.split(",")[0].split(" −")[0] for f in failed} == {"leave_one_out"}
    assert len(failed) == 4


def optimistic(logp_N, old_logp_N, advantage_N, rows, *, clip_low=0.2, clip_high=0.2, **_):
    """PPO's surrogate with the better of the two, where it takes the worse."""
    r_N = (logp_N - old_logp_N).exp()
    return torch.minimum(-advantage_N * r_N, -advantage_N * r_N.clamp(1 - clip_low, 1 + clip_high))


def pulled(logit_N, label_N, rows):
    """A Bellman residual whose target has a gradient too."""
    value_N = torch.sigmoid(logit_N)
    next_SL = rows.pad(value_N)[:, 1:]
    next_N = rows.flatten(torch.cat([next_SL, next_SL.new_zeros(rows.completions, 1)], 1))
    next_N[rows.last] = label_N[rows.last]
    return 0.5 * (value_N - next_N).square()


def weighed(logp_N, old_logp_N, advantage_N, rows, *, cap=1.0):
    """A truncated ratio for good completions as well."""
    return -off_policy_ratio(logp_N.detach(), old_logp_N, rows).clamp(max=cap) * advantage_N * logp_N


WRONG = {
    "off-policy: tapered": (surrogates, "tapered", weighed),
    "off-policy: clipped_surrogate": (surrogates, "clipped_surrogate", optimistic),
    "bellman_residual at the true V": (claims_values, "bellman_residual", pulled),
    "gradient of dpo": (preference, "dpo", lambda pairs, *, beta, epsilon=0.0: (1 - beta * pairs.margin_P) ** 2),
    "jensen_shannon": (supervised, "jensen_shannon", lambda s, t, *, mix: supervised.reverse_kl(s, t)),
    "adaptive β below, at and above its target": (kl, "adaptive", lambda beta, *_, **__: beta),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_objective_fails_its_claim(monkeypatch, name):
    monkeypatch.setattr(*WRONG[name])
    failed = [row.name for row in verify(3, 2, models=False).failed]
    assert name in failed
    assert len(failed) <= 6


def test_random_numbers_of_others_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    verify(3, 2, 1)
    assert torch.equal(torch.rand(1), expected)
