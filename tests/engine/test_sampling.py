import math

import pytest
import torch

from rlpost.engine.params import Sampling
from rlpost.engine.sampling import choose, filtered, greedy

HALVES = torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log()
U = torch.tensor([0.5], dtype=torch.float64)


def kept(sampling: Sampling, logits: torch.Tensor = HALVES) -> list[int]:
    return torch.isfinite(filtered(logits, sampling))[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("u", "token"), [(1e-9, 0), (0.2499, 0), (0.2501, 1), (0.7499, 1), (0.7501, 2), (0.8751, 3), (1 - 2.0**-53, 3)]
)
def test_a_token_is_where_the_cumulative_distribution_passes_the_number(u, token):
    chosen, logp = choose(HALVES, torch.tensor([u], dtype=torch.float64), Sampling())
    assert chosen.item() == token
    assert logp.item() == pytest.approx(HALVES[0, token].item(), abs=1e-6)


def test_top_k_keeps_the_k_most_likely():
    assert kept(Sampling(top_k=1)) == [1]
    assert kept(Sampling(top_k=2)) == [0, 1]
    assert kept(Sampling(top_k=4)) == kept(Sampling(top_k=0)) == kept(Sampling(top_k=99)) == [0, 1, 2, 3]


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = torch.tensor([[0.3, 0.5, 0.15, 0.05]], dtype=torch.float64).log()
    assert kept(Sampling(top_p=0.01), logits) == [1]
    assert kept(Sampling(top_p=0.49), logits) == [1]
    assert kept(Sampling(top_p=0.51), logits) == [0, 1]
    assert kept(Sampling(top_p=0.81), logits) == [0, 1, 2]
    assert kept(Sampling(top_p=0.96), logits) == [0, 1, 2, 3]


def test_top_p_is_reached_by_a_mass_of_just_p():
    assert kept(Sampling(top_p=0.5), torch.zeros(1, 4)) == [0, 1]


def test_every_token_of_a_large_vocabulary_has_its_share_of_the_numbers():
    """More tokens than are searched at once, and a last block that is not full."""
    n = 200
    middle_B = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    chosen, logp = choose(torch.zeros(n, n), middle_B, Sampling())
    assert chosen.tolist() == list(range(n))
    assert logp.tolist() == pytest.approx([-math.log(n)] * n, abs=1e-5)


def test_min_p_keeps_what_is_at_least_p_times_the_largest():
    assert kept(Sampling(min_p=0.24)) == [0, 1, 2, 3]
    assert kept(Sampling(min_p=0.26)) == [0, 1]
    assert kept(Sampling(min_p=0.51)) == [1]
    # Exactly p times as likely is enough.
    assert kept(Sampling(min_p=0.25), torch.tensor([[0.0, math.log(0.25), math.log(0.2)]])) == [0, 1]


def test_filters_apply_in_order_each_to_what_is_left():
    # After top-2 the masses are 1/3 and 2/3, so 0.6 is reached by one token; without it, two are needed.
    assert kept(Sampling(top_p=0.6)) == [0, 1]
    assert kept(Sampling(top_k=2, top_p=0.6)) == [1]
    assert kept(Sampling(top_k=3, min_p=0.3)) == [0, 1]


def test_filters_see_the_distribution_at_the_temperature():
    # At temperature 1/2 probabilities 1/4, 1/2, 1/8, 1/8 become 4, 16, 1, 1 of 22.
    chosen, logp = choose(HALVES, U, Sampling(temperature=0.5))
    assert (chosen.item(), logp.item()) == (1, pytest.approx(math.log(16 / 22), abs=1e-6))
    chosen, logp = choose(HALVES, torch.tensor([0.1], dtype=torch.float64), Sampling(temperature=0.5, min_p=0.24))
    assert (chosen.item(), logp.item()) == (0, pytest.approx(math.log(4 / 20), abs=1e-6))
    assert (
        choose(HALVES, torch.tensor([0.99], dtype=torch.float64), Sampling(temperature=0.5, min_p=0.26))[0].item() == 1
    )


def test_filtered_tokens_are_never_drawn():
    logits = HALVES.expand(2000, 4)
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    chosen, logp = choose(logits, u, Sampling(top_k=2))
    assert chosen.unique().tolist() == [0, 1]
    assert (chosen == 0).float().mean().item() == pytest.approx(1 / 3, abs=1e-3)
    assert logp.exp()[chosen == 1].unique().tolist() == pytest.approx([2 / 3], abs=1e-6)
    ends = torch.tensor([1e-300, 1 - 2.0**-53], dtype=torch.float64)
    assert choose(HALVES.expand(2, 4), ends, Sampling(top_k=1))[0].tolist() == [1, 1]


def test_greedy_takes_the_largest_at_temperature_one():
    for sampling in (greedy(Sampling(temperature=0.3, top_k=1)), greedy(Sampling())):
        chosen, logp = choose(HALVES, U, sampling)
        assert (chosen.item(), logp.item()) == (1, pytest.approx(math.log(0.5), abs=1e-6))


def test_half_precision_logits_are_widened():
    _, logp = choose(torch.zeros(1, 1000, dtype=torch.bfloat16), U, Sampling())
    assert logp.dtype == torch.float32
    assert logp.item() == pytest.approx(-math.log(1000), abs=1e-5)
    assert choose(HALVES.double(), U, Sampling())[1].dtype == torch.float64
