"""The key/value cache of decoding: attention against one row at a time, and how many tokens it has room for."""

import torch
import torch.nn.functional as F

from rlpost.policy import cache
from rlpost.policy.attention import AttentionOptions
from rlpost.policy.cache import PromptedLayer, PromptedLayout

WIDTHS, PROMPT_OF_ROW, LIMIT = [3, 2], [0, 0, 1], 3
HEADS, KEY_HEADS, D = 4, 2, 8


def test_rows_attend_to_their_prompt_and_their_own_tokens_and_room_grows_up_to_the_limit(monkeypatch):
    monkeypatch.setattr(cache, "FIRST_ROOM", 2)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    layout = PromptedLayout(WIDTHS, PROMPT_OF_ROW, LIMIT, torch.device("cpu"))
    layer = PromptedLayer(layout)
    prompts = [random(2, 1, KEY_HEADS, width, D) for width in WIDTHS]
    layer.update(*torch.cat(prompts, 3))
    layer.arrange(*layer.read(), torch.tensor([[0, 1, 2], [0, 3, 4]]))
    layout.prefilling = False
    rows = [prompts[p] for p in PROMPT_OF_ROW]
    rooms = []
    for layout.length in range(1, LIMIT + 1):
        query, new = random(len(rows), HEADS, 1, D), random(2, len(rows), KEY_HEADS, 1, D)
        rows = [torch.cat([row, new[:, b : b + 1]], 3) for b, row in enumerate(rows)]
        # No scaling is given: it is 1/√D.
        found = layout.attend(query, *layer.update(*new), AttentionOptions())
        for b, row in enumerate(rows):
            alone = F.scaled_dot_product_attention(query[b : b + 1], *row.repeat_interleave(HEADS // KEY_HEADS, 2))
            assert torch.allclose(found[b], alone[0].transpose(0, 1), rtol=0, atol=1e-12)
        rooms.append(layer.own[0].shape[2])
    assert rooms == [2, 2, 3]
