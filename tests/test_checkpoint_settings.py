"""A checkpoint is loaded to be used as its run loads it."""

from tiny_recipes import MODEL, SFT, run

from rlpost.inference import checkpoint
from rlpost.inference.checkpoint import frozen_policy
from rlpost.policy.params import Precision


def test_precision_and_layout_are_those_of_the_run(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoint, "decide_bfloat16", lambda wish, *_: asked.append(wish) or False)
    final = run(tmp_path, {"sft": {**SFT, "steps": 1}}, model={**MODEL, "attention": "padded"})
    policy = frozen_policy(str(final))
    assert not policy.flat
    # The same folder outside of its run has the defaults.
    alone = tmp_path / "alone"
    final.rename(alone)
    assert frozen_policy(str(alone)).flat
    assert asked == [Precision.float32, Precision.auto]
