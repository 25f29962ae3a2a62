"""Groups as tensors: indices by hand, flat and padded."""

from functools import partial

import pytest
import torch
from exactness import alone_logp, sample_groups
from families import VOCABULARY, EndTokenOnly, tiny

from rlpost.policy.attention import AttentionOptions
from rlpost.policy.batch import flat_passes, laid_out, padded_passes, single_passes, switched_batch
from rlpost.policy.layout import FlatLayout
from rlpost.policy.logprobs import LogitStats
from rlpost.policy.policy import Policy
from rlpost.policy.tiles import Segment
from rlpost.types import Completion, Group

TOOL = Completion((7, 8, 9), (True, False, True))
PAIR = Group((5, 6), (TOOL, Completion((4,), (True,))))
EMPTY = Group((3,), (Completion((), ()),))


def test_a_shared_prompt_by_hand():
    batch = laid_out([PAIR, EMPTY], flat_passes)
    assert batch.passes[0].ids_BT.tolist() == [[5, 6, 7, 8, 9, 4, 3]]
    assert batch.passes[0].position_BT.tolist() == [[0, 1, 2, 3, 4, 2, 0]]
    assert batch.before_N.tolist() == [1, 3, 1]  # both completions begin at the prompt's last token
    assert batch.target_N.tolist() == [7, 9, 4]  # 8 is no action
    assert batch.after_S.tolist() == [4, 5, 6]  # after an empty completion: after its prompt
    assert batch.rows.lengths_S.tolist() == [2, 1, 0]
    assert batch.passes[0].mask_BT is None


def test_prompts_repeat_without_sharing():
    batch = laid_out([PAIR], partial(flat_passes, share=False))
    assert batch.passes[0].ids_BT.tolist() == [[5, 6, 7, 8, 9, 5, 6, 4]]
    assert batch.passes[0].position_BT.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch.before_N.tolist() == [1, 3, 6]
    assert batch.after_S.tolist() == [4, 7]


def test_padded_rows_by_hand():
    batch = laid_out([PAIR, EMPTY], partial(padded_passes, pad_id=60))
    assert batch.passes[0].ids_BT.tolist() == [[5, 6, 7, 8, 9], [5, 6, 4, 60, 60], [3, 60, 60, 60, 60]]
    assert batch.passes[0].mask_BT.tolist() == [[1] * 5, [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert batch.before_N.tolist() == [1, 3, 6]
    assert batch.after_S.tolist() == [4, 7, 10]
    assert batch.target_N.tolist() == [7, 9, 4]
    assert batch.passes[0].layout is None


def test_the_state_after_a_completion_is_that_of_its_last_token():
    for build in (flat_passes, padded_passes):
        batch = laid_out([PAIR, EMPTY], build)
        assert batch.passes[0].ids_BT.flatten()[batch.after_S].tolist() == [9, 4, 3]


def test_a_pass_for_each_row():
    batch = laid_out([PAIR, EMPTY], single_passes)
    assert [p.ids_BT.tolist() for p in batch.passes] == [[[5, 6, 7, 8, 9]], [[5, 6, 4]], [[3]]]
    assert batch.before_N.tolist() == [1, 3, 6]
    assert batch.after_S.tolist() == [4, 7, 8]


def test_actions_are_taken_where_the_row_was_as_long_as_their_prefix():
    group = Group((5, 6), (Completion((7, 8, 9, 4), (True,) * 4), Completion((3,), (True,))))
    batch = switched_batch([group, Group((1, 1, 1, 1), (Completion((2,), (True,)),))], flat_passes, 3)
    short, long = batch.passes
    assert short.ids_BT.tolist() == [[5, 6, 7, 3]]  # the third token's state is the last that the near pass gives
    assert long.ids_BT.tolist() == [[5, 6, 7, 8, 9, 4, 1, 1, 1, 1, 2]]
    assert batch.before_N.tolist() == [1, 2, 4 + 3, 4 + 4, 1, 4 + 9]
    assert batch.after_N.tolist() == [2, 4 + 3, 4 + 4, 4 + 5, 3, 4 + 10]
    assert batch.after_S.tolist() == [4 + 5, 3, 4 + 10]
    assert batch.target_N.tolist() == [7, 8, 9, 4, 3, 2]


def test_tokens_know_how_many_completions_they_belong_to():
    (flat,), (padded,) = (laid_out([PAIR], build).passes for build in (flat_passes, padded_passes))
    assert flat.copies_BT.tolist() == [[2, 2, 1, 1, 1, 1]]
    assert padded.copies_BT.tolist() == [[1] * 5, [1, 1, 1, 0, 0]]


def test_states_of_completions_beside_others_of_their_prompt():
    """An empty one between two others ends at its prompt; the state after an action is where the action stands."""
    between = Group((5, 6), (Completion((7, 8), (True, True)), Completion((), ()), Completion((9,), (True,))))
    batch = laid_out([between], flat_passes)
    assert batch.before_N.tolist() == [1, 2, 1]
    assert batch.after_N.tolist() == [2, 3, 4]
    assert batch.after_S.tolist() == [3, 1, 4]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_shared_prompts_say_what_single_rows_say(family):
    model = tiny(family, torch.float64)
    model.set_attn_implementation("rlpost_flat")
    groups = sample_groups(VOCABULARY)
    policy = Policy(model, EndTokenOnly(), flat=True).eval()
    with torch.no_grad():
        found = policy(policy.batch(groups)).logp_N
        model.set_attn_implementation("eager")
        # Llama rotates and normalises in float32.
        assert (found - alone_logp(model, groups)).abs().max() < (1e-10 if family == "gpt2" else 1e-5)


def _slow_attention(query, key, value, segments, window):
    """One full mask over all tokens: own segment up to the query, and the segment's prompt, within the window."""
    tokens = query.shape[2]
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for s in segments:
        for i in range(s.length):
            position = s.prefix + i
            for back in range(position + 1):
                if window is None or back < window:
                    at = position - back
                    token = s.start + at - s.prefix if at >= s.prefix else s.prefix_start + at
                    mask[s.start + i, token] = True
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


# Segments have 40 tokens before 3 or 90 of their own: windows about each length, and about both together.
@pytest.mark.parametrize("window", [None, 1, 2, 5, 39, 40, 41, 89, 90, 91, 129, 130, 131])
def test_tiles_attend_and_differentiate_as_one_full_mask_does(window):
    segments = [Segment(0, 40), Segment(40, 3, 0, 40), Segment(43, 90, 0, 40), Segment(133, 1), Segment(134, 2, 133, 1)]
    # Two prompts of unlike lengths, whose completions share a tile.
    segments += [Segment(136, 20), Segment(156, 3, 136, 20), Segment(159, 24), Segment(183, 4, 159, 24)]
    tokens = 187
    layout = FlatLayout(segments, tokens)
    assert layout.token_M[layout.place_T].tolist() == list(range(tokens))
    assert any(t.prompt_PK is not None and len(t.prompt_PK) > 1 for t in layout.tiles)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, 2, tokens, 4, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(3)
    ]
    cotangent = torch.randn(1, tokens, 2, 4, dtype=torch.float64, generator=generator)
    fast = layout.attend(*inputs, AttentionOptions(window=window))
    slow = _slow_attention(*inputs, segments, window)
    assert (fast - slow).abs().max() < 1e-12
    for mine, theirs in zip(
        torch.autograd.grad((fast * cotangent).sum(), inputs),
        torch.autograd.grad((slow * cotangent).sum(), inputs),
        strict=True,
    ):
        assert (mine - theirs).abs().max() < 1e-12


def test_nothing_to_score_is_an_empty_answer_with_a_gradient_path():
    for flat in (True, False):
        model = tiny("gpt2")
        if flat:
            model.set_attn_implementation("rlpost_flat")
        policy = Policy(model, EndTokenOnly(), flat=flat)
        scores = policy(policy.batch([EMPTY]), LogitStats(entropy=True))
        assert scores.logp_N.shape == scores.entropy_N.shape == (0,)
        scores.logp_N.sum().backward()
        assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())
