"""Which actions are learned from."""

import pytest
import torch

from rlpost.objectives.focus import clip_covariance, second_moment, top_covariance, top_entropy

ADVANTAGE = torch.tensor([2.0, 2.0, -2.0, -2.0, 0.0], dtype=torch.float64)
LOGP = torch.tensor([3.0, -1.0, -2.0, 1.0, -1.0], dtype=torch.float64)
"""Of mean 0, both: the covariances are 6, −2, 4, −2 and 0."""


def test_top_entropy_by_hand():
    entropy = torch.tensor([0.5, 2.0, 0.1, 1.0, 0.7])
    assert top_entropy(entropy, share=0.4).tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert top_entropy(entropy, share=0.41).tolist() == [0.0, 1.0, 0.0, 1.0, 1.0]
    assert top_entropy(entropy).tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert top_entropy(entropy, share=1.0).tolist() == [1.0] * 5


def test_a_share_is_a_number_of_actions_without_the_last_digits():
    apart_N = torch.arange(100.0, dtype=torch.float64)
    assert top_entropy(apart_N, share=0.07).sum() == 7
    drawn = clip_covariance(apart_N, apart_N, apart_N / 100, share=0.29, low=-1e9, high=1e9)
    assert (drawn == 0).sum() == 29


def test_equal_entropies_count_alike():
    assert top_entropy(torch.tensor([1.0, 0.5, 1.0, 1.0]), share=0.25).tolist() == [1.0, 0.0, 1.0, 1.0]


def test_nothing_to_choose_from():
    assert top_entropy(torch.zeros(0)).shape == (0,)


def test_number_formats():
    assert top_entropy(torch.ones(2, dtype=torch.float64)).dtype == torch.float64
    assert top_entropy(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="share="):
        top_entropy(torch.ones(2), share=share)


def test_the_draw_is_of_the_smallest_numbers_among_the_candidates():
    uniform = torch.tensor([0.9, 0.0, 0.5, 0.1, 0.2], dtype=torch.float64)
    given = LOGP, ADVANTAGE, uniform
    assert clip_covariance(*given, low=1.0, high=7.0).tolist() == [1, 1, 0, 1, 1]
    assert clip_covariance(*given, low=5.0, high=7.0).tolist() == [0, 1, 1, 1, 1]
    assert clip_covariance(*given, low=1.0, high=5.0).tolist() == [1, 1, 0, 1, 1]
    assert clip_covariance(*given, share=0.4, low=1.0, high=7.0).tolist() == [0, 1, 0, 1, 1]
    assert clip_covariance(*given, share=1.0, low=4.0, high=6.0).tolist() == [0, 1, 0, 1, 1]
    assert clip_covariance(*given, share=0.59, low=-9.0, high=9.0).tolist() == [1, 0, 1, 0, 1]
    assert clip_covariance(*given, share=1.0, low=7.0, high=8.0).tolist() == [1] * 5
    other = LOGP, ADVANTAGE, torch.tensor([0.1, 0.0, 0.5, 0.9, 0.2], dtype=torch.float64)
    assert clip_covariance(*other, low=1.0, high=7.0).tolist() == [0, 1, 1, 1, 1]
    assert clip_covariance(*other, low=1.0, high=5.0).tolist() == [1, 1, 0, 1, 1]


def test_the_draw_does_not_move_with_the_means():
    uniform = torch.rand(5, dtype=torch.float64)
    there = clip_covariance(LOGP - 7, ADVANTAGE + 3, uniform, share=0.4, low=1.0, high=7.0)
    assert there.tolist() == [0, 1, 0, 1, 1]


def test_the_largest_covariances_by_hand():
    assert top_covariance(LOGP, ADVANTAGE, share=0.2).tolist() == [1, 0, 0, 0, 0]
    assert top_covariance(LOGP, ADVANTAGE, share=0.21).tolist() == [1, 0, 1, 0, 0]
    assert top_covariance(LOGP, ADVANTAGE, share=1.0).tolist() == [1, 0, 1, 0, 0]  # no others cost entropy
    assert top_covariance(LOGP, torch.ones(5), share=0.4).tolist() == [0] * 5
    assert top_covariance(LOGP.repeat(2), ADVANTAGE.repeat(2), share=0.1).tolist() == [1, 0, 0, 0, 0] * 2


def test_the_largest_moments_go_until_the_mean_is_small_enough():
    old = torch.zeros(6, dtype=torch.float64)
    moved = torch.tensor([0.1, 0.3, 0.9, -0.2, -2.0, 2.0], dtype=torch.float64)
    advantage = torch.tensor([1.0, 2.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    # Of the clip's concern are 0.1, 0.3, 0.9 and -0.2: squares .01, .09, .81, .04, of mean .2375; without .81 .04667.
    assert second_moment(moved, old, advantage, limit=0.24).tolist() == [1] * 6
    assert second_moment(moved, old, advantage, limit=0.23).tolist() == [1, 1, 0, 1, 1, 1]
    assert second_moment(moved, old, advantage).tolist() == [1, 0, 0, 1, 1, 1]
    assert second_moment(moved, old, advantage, limit=0.024).tolist() == [1, 0, 0, 0, 1, 1]
    assert second_moment(moved, old, advantage, limit=0.0).tolist() == [0, 0, 0, 0, 1, 1]
    assert second_moment(moved + 5, old + 5, 9 * advantage).tolist() == [1, 0, 0, 1, 1, 1]


def test_nothing_has_moved():
    assert second_moment(LOGP, LOGP, ADVANTAGE, limit=0.0).tolist() == [1] * 5


def test_no_actions_and_number_formats():
    none = torch.zeros(0)
    assert clip_covariance(none, none, none).shape == top_covariance(none, none).shape == (0,)
    assert second_moment(none, none, none).shape == (0,)
    half = torch.ones(2, dtype=torch.bfloat16)
    assert top_covariance(half, half).dtype == second_moment(half, half, half).dtype == torch.float32
    assert clip_covariance(half, half, half).dtype == torch.float32
    assert top_covariance(half, half.double()).dtype == torch.float64


def test_choices_that_are_none_are_refused():
    one = torch.ones(2)
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match="share="):
            clip_covariance(one, one, one, share=share)
        with pytest.raises(ValueError, match="share="):
            top_covariance(one, one, share=share)
    with pytest.raises(ValueError, match="low=2"):
        clip_covariance(one, one, one, low=2.0, high=2.0)
    with pytest.raises(ValueError, match="limit=-1"):
        second_moment(one, one, one, limit=-1.0)
