"""Which actions are learned from."""

import pytest
import torch

from rlpost.objectives.focus import top_entropy


def test_top_entropy_by_hand():
    entropy = torch.tensor([0.5, 2.0, 0.1, 1.0, 0.7])
    assert top_entropy(entropy, share=0.4).tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert top_entropy(entropy, share=0.41).tolist() == [0.0, 1.0, 0.0, 1.0, 1.0]
    assert top_entropy(entropy).tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert top_entropy(entropy, share=1.0).tolist() == [1.0] * 5


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
