import math

import numpy as np
import pytest
import torch
from engines import asked, local
from families import FAMILIES, tiny
from stubs import policy_of, tiny_policy
from transformers import AutoConfig, AutoModelForCausalLM

from rlpost.engine.local import LocalEngine
from rlpost.engine.params import Sampling
from rlpost.errors import EngineError
from rlpost.policy import cache, decoders
from rlpost.policy.adapters import add_policy_adapter
from rlpost.policy.logprobs import LogitStats
from rlpost.policy.params import Lora
from rlpost.policy.policy import Policy
from rlpost.types import Completion, Group

PROMPTS = [[5, 9, 3, 8, 30, 31, 2, 7, 7, 12, 1], [4], [11, 12, 13, 60], [3, 1, 2, 7, 5, 6, 44, 9]]
STREAMS = [101, 102, 103, 104]
LONG = Sampling(max_new_tokens=20)


def alibi(seed: int = 0):
    torch.manual_seed(seed)
    config = AutoConfig.for_model("bloom", vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                p.mul_(6.0)
    return policy_of(model.eval(), flat=False)


def groups_of(sampled) -> list[Group]:
    return [Group(tuple(p), c) for p, c in zip(PROMPTS, sampled, strict=True)]


def gap(policy: Policy, sampled, temperature: float = 1.0) -> float:
    """Largest difference between the engine's log-probabilities and the trainer's."""
    groups = groups_of(sampled)
    with torch.no_grad():
        logp = policy(policy.batch(groups), LogitStats(temperature)).logp_N
    engine = torch.tensor([x for g in groups for c in g.completions for x in c.logprobs])
    assert engine.shape == logp.shape
    return float((engine - logp).abs().max())


def same(a: tuple[Completion, ...], b: tuple[Completion, ...]) -> bool:
    close = all(np.allclose(x.logprobs, y.logprobs, atol=1e-5) for x, y in zip(a, b, strict=True))
    return close and [tuple(x.ids) for x in a] == [tuple(x.ids) for x in b]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_log_probabilities_are_those_of_training(family):
    policy = tiny_policy(family, eos=3)
    sampled = local(policy).generate(asked(PROMPTS, 3, LONG, STREAMS))
    assert gap(policy, sampled) < 1e-5
    assert {c.finish for g in sampled for c in g} == {"stop", "length"}, "rows should leave at different times"


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2"])
def test_padded_rows_give_the_same_completions(family):
    model = tiny(family)
    flat = local(policy_of(model, eos=3)).generate(asked(PROMPTS, 2, LONG, STREAMS))
    policy = policy_of(model, eos=3, flat=False)
    padded = local(policy).generate(asked(PROMPTS, 2, LONG, STREAMS))
    assert gap(policy, padded) < 1e-5
    assert all(same(a, b) for a, b in zip(flat, padded, strict=True))


def test_alibi_on_padded_rows():
    policy = alibi()
    sampled = local(policy).generate(asked(PROMPTS, 3, LONG, STREAMS))
    assert gap(policy, sampled) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_acts_while_sampling(family):
    model = tiny(family)
    bare = local(policy_of(model)).generate(asked(PROMPTS, 2, LONG, STREAMS))
    policy = Policy(add_policy_adapter(model, Lora(r=4)), policy_of(model).tokenizer, flat=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.5)
    engine = local(policy)
    adapted = engine.generate(asked(PROMPTS, 2, LONG, STREAMS))
    assert gap(policy, adapted) < 1e-5
    assert [tuple(c.ids) for c in adapted[0]] != [tuple(c.ids) for c in bare[0]]
    with policy.acting_as(None):
        assert all(same(a, b) for a, b in zip(engine.generate(asked(PROMPTS, 2, LONG, STREAMS)), bare, strict=True))


def test_the_temperature_is_in_the_log_probabilities():
    policy = tiny_policy()
    sampled = local(policy).generate(asked(PROMPTS, 2, LONG.model_copy(update={"temperature": 0.7}), STREAMS))
    assert gap(policy, sampled, 0.7) < 1e-5
    assert gap(policy, sampled, 1.0) > 0.1


@pytest.mark.parametrize(
    "make",
    [lambda: tiny_policy("llama", eos=3), lambda: tiny_policy("qwen2", eos=3), alibi],
    ids=["llama", "qwen2", "alibi"],
)
def test_a_completion_does_not_depend_on_what_runs_beside_it(make):
    policy = make()
    whole = local(policy).generate(asked(PROMPTS, 5, LONG, STREAMS))
    alone = [local(policy).generate(asked([p], 1, LONG, [s]))[0] for p, s in zip(PROMPTS, STREAMS, strict=True)]
    backwards = local(policy).generate(asked(PROMPTS[::-1], 2, LONG, STREAMS[::-1]))[::-1]
    few_rows = local(policy, rows_at_once=3).generate(asked(PROMPTS, 5, LONG, STREAMS))
    assert all(same(a, w[:1]) for a, w in zip(alone, whole, strict=True))
    assert all(same(a, w[:2]) for a, w in zip(backwards, whole, strict=True))
    assert all(same(a, w) for a, w in zip(few_rows, whole, strict=True))


def test_completions_of_a_prompt_differ_and_follow_its_stream():
    engine = local(tiny_policy())
    first = engine.generate(asked(PROMPTS, 4, LONG, STREAMS))
    assert len({tuple(c.ids) for c in first[0]}) == 4
    other = engine.generate(asked(PROMPTS, 4, LONG, [7, *STREAMS[1:]]))
    digests, others = ([[c.digest() for c in some] for some in every] for every in (first, other))
    assert digests[0] != others[0]
    assert digests[1:] == others[1:]
    shorter = engine.generate(asked(PROMPTS, 4, Sampling(max_new_tokens=5), STREAMS))
    assert [tuple(c.ids) for c in shorter[2]] == [tuple(c.ids[:5]) for c in first[2]]


def test_growing_the_cache_and_cutting_the_prefill_change_nothing(monkeypatch):
    policy = tiny_policy("gemma3_text", eos=3)
    whole = local(policy).generate(asked(PROMPTS, 3, LONG, STREAMS))
    monkeypatch.setattr(cache, "FIRST_ROOM", 2)
    monkeypatch.setattr(decoders, "PREFILL_TOKENS", 9)
    cut = local(policy).generate(asked(PROMPTS, 3, LONG, STREAMS))
    assert all(same(a, b) for a, b in zip(cut, whole, strict=True))


def test_first_tokens_are_drawn_from_the_model_s_distribution():
    policy = tiny_policy(scale=3.0)
    draws = 4000
    (sampled,) = local(policy).generate(asked([PROMPTS[0]], draws, Sampling(max_new_tokens=1), [5]))
    counts = np.bincount([c.ids[0] for c in sampled], minlength=64)
    everything = Group(tuple(PROMPTS[0]), tuple(Completion((i,), (True,)) for i in range(64)))
    with torch.no_grad():
        expected = policy(policy.batch([everything])).logp_N.exp().numpy() * draws
    assert expected.sum() == pytest.approx(draws, rel=1e-4)
    common = expected >= 5
    rest = expected[~common].sum()
    chi2 = ((counts - expected) ** 2 / expected)[common].sum()
    chi2 += (counts[~common].sum() - rest) ** 2 / max(rest, 1.0)
    freedom = int(common.sum())
    assert freedom > 10
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_greedy_takes_the_most_likely_tokens_with_their_log_probabilities():
    policy = tiny_policy()
    sampled = local(policy).generate(
        asked(PROMPTS, 2, LONG.model_copy(update={"temperature": 0.5}), STREAMS, greedy=True)
    )
    assert gap(policy, sampled, 1.0) < 1e-5
    ids = PROMPTS[0] + list(sampled[0][0].ids)
    policy.model.set_attn_implementation("eager")
    with torch.no_grad():
        plain = policy.model(torch.tensor([ids])).logits[0].argmax(-1)
    assert plain[len(PROMPTS[0]) - 1 : -1].tolist() == list(sampled[0][0].ids)
    assert sampled[0][0].same(sampled[0][1])


def test_every_end_token_ends_a_completion():
    policy = tiny_policy(eos=3)
    policy.end_ids = (3, 9)
    ends = set()
    for completions in local(policy).generate(asked(PROMPTS, 30, LONG, STREAMS)):
        for c in completions:
            inner = c.ids[:-1] if c.finish == "stop" else c.ids
            assert not {3, 9} & set(inner)
            assert tuple(c.action) == (True,) * len(c.ids)
            assert len(c.logprobs) == len(c.ids)
            ends.add(c.ids[-1] if c.finish == "stop" else len(c.ids))
    assert ends == {3, 9, 20}


def test_stop_strings_end_each_row_where_they_appear():
    policy = tiny_policy()
    free = local(policy).generate(asked(PROMPTS, 8, LONG, STREAMS))
    text = free[0][0].text
    stop = text[3:5]
    stopped = local(policy).generate(asked(PROMPTS, 8, LONG.model_copy(update={"stop": [stop, "~"]}), STREAMS))
    finishes = set()
    for before, after in zip((c for g in free for c in g), (c for g in stopped for c in g), strict=True):
        assert tuple(after.ids) == tuple(before.ids[: len(after.ids)])
        assert after.text == before.text.split(stop)[0]
        assert after.finish == ("stop" if stop in before.text else "length")
        finishes.add(after.finish)
    assert finishes == {"stop", "length"}
    whole = policy.tokenizer.decode(list(stopped[0][0].ids))
    assert stop in whole
    assert stop not in policy.tokenizer.decode(list(stopped[0][0].ids[:-1]))


def test_the_model_is_left_as_it_was():
    policy = tiny_policy().train()
    local(policy).generate(asked(PROMPTS, 1, Sampling(max_new_tokens=2), STREAMS))
    assert policy.training
    assert policy.model.training
    loss = -policy(policy.batch([Group((1, 2), (Completion((3,), (True,)),))])).logp_N.sum()
    loss.backward()
    assert all(p.grad is not None for p in policy.parameters())


def test_sampling_under_autocast_agrees_with_training_under_autocast():
    policy = Policy(tiny("llama", scale=3.0), tiny_policy().tokenizer, flat=True, bfloat16=True)
    policy.model.set_attn_implementation("rlpost_flat")
    sampled = local(policy).generate(asked(PROMPTS, 3, LONG, STREAMS))
    groups = groups_of(sampled)
    with torch.no_grad():
        logp = policy(policy.batch(groups)).logp_N.float()
    engine = torch.tensor([x for g in groups for c in g.completions for x in c.logprobs])
    assert float((engine - logp).abs().mean()) < 0.03


def test_a_prompt_beyond_the_model_is_refused_with_the_remedy():
    engine = local(tiny_policy())
    with pytest.raises(EngineError, match=r"max_new_tokens=120: .* 11 tokens .* 128 positions; set it to at most 117"):
        engine.generate(asked(PROMPTS, 1, Sampling(max_new_tokens=120), STREAMS))
    assert len(engine.generate(asked([PROMPTS[0]], 1, Sampling(max_new_tokens=117), [1]))[0][0].ids) == 117
    with pytest.raises(EngineError, match="set it to at most 117"):
        engine.generate(asked(PROMPTS, 1, Sampling(max_new_tokens=118), STREAMS))


def test_logits_that_are_not_numbers_are_an_error():
    policy = tiny_policy()
    with torch.no_grad():
        policy.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(EngineError, match="nan"):
        local(policy).generate(asked(PROMPTS, 1, LONG, STREAMS))


def test_no_prompts_no_completions():
    assert local(tiny_policy()).generate(asked([], 3, LONG, [])) == []


def test_nothing_is_sampled_without_weights():
    with pytest.raises(EngineError, match="update_weights"):
        LocalEngine(tiny_policy()).generate(asked(PROMPTS, 1, LONG, STREAMS))


def test_updated_weights_are_those_of_another_policy():
    engine = local(tiny_policy())
    before = engine.generate(asked(PROMPTS, 1, LONG, STREAMS))
    other = tiny_policy(seed=1)
    engine.update_weights(other, 1)
    after = engine.generate(asked(PROMPTS, 1, LONG, STREAMS))
    assert not any(same(a, b) for a, b in zip(before, after, strict=True))
    assert gap(other, after) < 1e-5
    assert {c.weights_version for cs in before for c in cs} == {0}
    assert {c.weights_version for cs in after for c in cs} == {1}


class Leaning:
    """A guide that adds 1 to the log-probability of token 3 and leaves out those above 9; it notes what it is told."""

    weight_V = torch.cat([torch.zeros(10), torch.full((54,), -torch.inf)]).index_fill(0, torch.tensor(3), 1.0)

    def begin(self, prompts, prompt_of_row, limits):
        self.limits = list(limits)
        self.rows = [list(prompts[p]) for p in prompt_of_row]
        self.asked = []
        return self

    def weigh(self, logits_BV, going_B):
        assert len(logits_BV) == len(going_B) == len(self.rows)
        self.asked.append([tuple(row) for row, going in zip(self.rows, going_B.tolist(), strict=True) if going])
        return torch.where(going_B[:, None], self.weight_V, 0.0)

    def append(self, ids_B):
        self.rows = [[*row, new] for row, new in zip(self.rows, ids_B.tolist(), strict=True)]

    def keep(self, rows):
        self.rows = [self.rows[b] for b in rows.tolist()]


@pytest.mark.parametrize("greedy", [False, True])
def test_a_guides_weights_are_of_the_distribution_at_the_temperature(greedy):
    """They are added to logits that the temperature then divides; a greedy choice has temperature 1."""
    policy = tiny_policy()
    engine = local(policy, guide=Leaning())
    (found,) = engine.generate(asked(PROMPTS[:1], 4, Sampling(temperature=0.5, max_new_tokens=1), STREAMS[:1], greedy))
    with torch.no_grad():
        logits = policy.next_logits(policy.batch([Group(tuple(PROMPTS[0]), (Completion((), ()),))]))[0]
    expected = (logits / (1.0 if greedy else 0.5) + Leaning.weight_V).log_softmax(0)
    for c in found:
        assert c.logprobs[0] == pytest.approx(float(expected[c.ids[0]]), abs=1e-5)


def test_a_guide_follows_the_rows_that_go_on():
    policy, guide = tiny_policy(eos=4), Leaning()
    found = local(policy, guide=guide).generate(asked(PROMPTS[:2], 6, LONG, STREAMS[:2]))
    assert guide.limits == [20] * 12
    texts = [(*prompt, *c.ids) for prompt, some in zip(PROMPTS[:2], found, strict=True) for c in some]
    assert len({len(c.ids) for some in found for c in some}) > 1, "rows should leave at different times"
    for t, told in enumerate(guide.asked):
        states = [text[: len(p) + t] for p in PROMPTS[:2] for text in texts if text[: len(p)] == tuple(p)]
        going = [s for s in states if 4 not in s[len(s) - t :]]
        assert sorted(told) == sorted(going)
