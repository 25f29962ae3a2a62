"""Groups as tensors: indices by hand, flat and padded."""

import torch
from families import EndTokenOnly, tiny

from rlpost.groups import Completion, Group
from rlpost.policy.batch import flat_batch, padded_batch
from rlpost.policy.layout import Segment, flat_layout
from rlpost.policy.policy import Policy

TOOL = Completion((7, 8, 9), (True, False, True))
PAIR = Group((5, 6), (TOOL, Completion((4,), (True,))))
EMPTY = Group((3,), (Completion((), ()),))


def test_a_shared_prompt_by_hand():
    batch = flat_batch([PAIR, EMPTY])
    assert batch.ids_BT.tolist() == [[5, 6, 7, 8, 9, 4, 3]]
    assert batch.position_BT.tolist() == [[0, 1, 2, 3, 4, 2, 0]]
    assert batch.before_N.tolist() == [1, 3, 1]  # both completions begin at the prompt's last token
    assert batch.target_N.tolist() == [7, 9, 4]  # 8 is no action
    assert batch.after_S.tolist() == [4, 5, 6]  # after an empty completion: after its prompt
    assert batch.rows.lengths_S.tolist() == [2, 1, 0]
    assert batch.mask_BT is None


def test_prompts_repeat_without_sharing():
    batch = flat_batch([PAIR], share=False)
    assert batch.ids_BT.tolist() == [[5, 6, 7, 8, 9, 5, 6, 4]]
    assert batch.position_BT.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch.before_N.tolist() == [1, 3, 6]
    assert batch.after_S.tolist() == [4, 7]


def test_padded_rows_by_hand():
    batch = padded_batch([PAIR, EMPTY], pad_id=60)
    assert batch.ids_BT.tolist() == [[5, 6, 7, 8, 9], [5, 6, 4, 60, 60], [3, 60, 60, 60, 60]]
    assert batch.mask_BT.tolist() == [[1] * 5, [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert batch.before_N.tolist() == [1, 3, 6]
    assert batch.after_S.tolist() == [4, 7, 10]
    assert batch.target_N.tolist() == [7, 9, 4]
    assert batch.layout is None


def test_the_state_after_a_completion_is_that_of_its_last_token():
    for build in (flat_batch, padded_batch):
        batch = build([PAIR, EMPTY])
        assert batch.ids_BT.flatten()[batch.after_S].tolist() == [9, 4, 3]


def test_tiles_cover_every_token_once_and_never_leave_their_rows():
    segments = [Segment(0, 40), Segment(40, 3, 0, 40), Segment(43, 90, 0, 40), Segment(133, 1), Segment(134, 2, 133, 1)]
    layout = flat_layout(segments, 136)
    queries = torch.cat([t.query_BQ.flatten() for t in layout.tiles])
    assert queries[layout.result_T].tolist() == list(range(136))
    owner = {t: (s.start, s.prefix_start, s.prefix) for s in segments for t in range(s.start, s.start + s.length)}
    for tile in layout.tiles:
        mask = tile.mask(None)
        for row in range(tile.query_BQ.shape[0]):
            for q, k in ((q, k) for q in range(tile.query_BQ.shape[1]) for k in range(tile.key_BK.shape[1])):
                if mask is None or not mask[row, 0, q, k]:
                    continue
                query, key = int(tile.query_BQ[row, q]), int(tile.key_BK[row, k])
                start, prefix_start, prefix = owner[query]
                if query == 0 and q:
                    continue  # a padding query: its result is never read
                assert start <= key <= query or prefix_start <= key < prefix_start + prefix


def test_nothing_to_score_is_an_empty_answer_with_a_gradient_path():
    for flat in (True, False):
        model = tiny("gpt2")
        if flat:
            model.set_attn_implementation("rlpost_flat")
        policy = Policy(model, EndTokenOnly(), flat=flat)
        scores = policy(policy.batch([EMPTY]), entropy=True)
        assert scores.logp_N.shape == scores.entropy_N.shape == (0,)
        scores.logp_N.sum().backward()
        assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())
