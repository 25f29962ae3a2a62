import numpy as np

from rlpost.engine.seeds import prompt_seeds, uniforms


def test_a_number_depends_on_stream_index_and_step_alone():
    together = uniforms([7, 7, 9], [0, 1, 0], 5)
    assert (uniforms([9], [0], 5) == together[2:]).all()
    assert (uniforms([7], [1], 3) == together[1:2, :3]).all()


def test_all_numbers_differ():
    seeds = [s for s in range(20) for _ in range(10)]
    u = uniforms(seeds, list(range(10)) * 20, 50)
    assert len(np.unique(u)) == u.size
    # Swapping coordinates gives other numbers: they are not merely added up.
    assert uniforms([3], [4], 1) != uniforms([4], [3], 1)


def test_numbers_are_uniform_and_strictly_inside():
    u = uniforms(list(range(500)), [0] * 500, 200)
    assert u.min() > 0.0
    assert u.max() < 1.0
    counts = np.histogram(u, 20, (0, 1))[0]
    chi2 = ((counts - 5000) ** 2 / 5000).sum()
    assert chi2 < 43.8  # 0.1 % of 19 degrees of freedom
    assert abs(np.corrcoef(u[:, 0], u[:, 1])[0, 1]) < 0.15
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.15


def test_numbers_lie_between_the_marks_of_a_ruler_of_52_bits():
    """So that none is 0, which a hash of 0 would give."""
    marks = uniforms([1, 2, 3], [0, 1, 2], 50) * 2.0**52
    assert (marks % 1 == 0.5).all()


def test_largest_hash_stays_below_one():
    assert ((np.uint64(2**52 - 1)).astype(np.float64) + 0.5) * 2.0**-52 < 1.0


def test_prompt_streams_of_parts_are_those_of_the_whole():
    whole = prompt_seeds(5, 0, 6)
    assert prompt_seeds(5, 0, 2) + prompt_seeds(5, 2, 4) == whole
    assert len({*whole, *prompt_seeds(6, 0, 6)}) == 12
    assert prompt_seeds(-1, 0, 1) == prompt_seeds((1 << 64) - 1, 0, 1)
