"""`rlpost show --rows`: how long rows are, and how they fill passes."""

from types import SimpleNamespace

import numpy as np
import pytest

from rlpost.cli.lengths import histogram, packing, share
from rlpost.data.params import DataRole
from rlpost.types import Completion, Group


def group(prompt, *completions):
    return Group([1] * prompt, [Completion([2] * n, (True,) * n) for n in completions], {})


class Rows:
    """A dataset that is drawn in order."""

    def __init__(self, groups):
        self._groups = groups

    def __len__(self):
        return len(self._groups)

    def next(self, n):
        drawn, self._groups = self._groups[:n], self._groups[n:]
        return drawn


def lines(groups, need=DataRole.completions, padded=False, **stage):
    return list(packing(SimpleNamespace(**stage), Rows(groups), need, padded))


def test_the_histogram_counts_every_row_once_and_is_narrow():
    rng = np.random.default_rng(0)
    for lengths in ([3], [1, 1, 1], list(range(30)), [1, 100_000], rng.lognormal(6, 1, 5000).astype(int).tolist()):
        bars = list(histogram(lengths))
        assert len(bars) <= 11
        assert max(map(len, bars)) <= 70
        counts = [int(bar.split("█")[0].split()[-1]) for bar in bars]
        assert sum(counts) == len(lengths)
        assert counts[0]
        assert counts[-1]
    assert next(iter(histogram([10] * 4 + [55]))) == "10 to 14  4  " + "█" * 40


def test_shares_are_lengths_of_rows():
    assert [share(list(range(1, 101)), part) for part in (0.5, 0.95)] == [50, 95]
    assert share([7], 0.5) == share([7], 0.95) == 7


def test_what_a_pass_holds():
    groups = [group(10, 10), group(10, 30)]
    stage = {"batch_size": 2, "max_tokens_per_microbatch": 100}
    first, second = lines(groups, **stage)
    assert first == "each pass: sequences 2, tokens 60 of at most 100, 67% of them trained"
    assert second == "packed: all of its places are tokens (padded to the longest: 75%)"
    assert lines(groups, padded=True, **stage)[1] == "padded: 75% of its places are tokens"
    stage["max_tokens_per_microbatch"] = 50
    assert lines(groups, **stage)[0].startswith("each pass: sequences 1, tokens 30 of at most 50")


def test_a_shared_prompt_is_counted_once():
    stage = {"batch_size": 1, "max_tokens_per_microbatch": 100}
    pair = [group(10, 10, 20)]
    assert lines(pair, DataRole.pairs, **stage)[0].startswith("each pass: sequences 2, tokens 40")
    assert lines(pair, DataRole.pairs, padded=True, **stage)[0].startswith("each pass: sequences 2, tokens 50")


@pytest.mark.parametrize("need", [DataRole.prompts, DataRole.recorded])
def test_rows_that_are_not_trained_on_fill_no_passes(need):
    assert lines([group(10)], need, batch_size=1, max_tokens_per_microbatch=10) == []
