"""Claims about models of reversed text: one joint from both ends, infilling, reranking, and what a trained one learns.

Axes: L texts, V tokens, B rows, T tokens of a row.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rlpost.oracle.policies import CONFIGS
from rlpost.oracle.problem import Problem, relative_error, table_problem
from rlpost.oracle.report import Row, Section, exact, fact, holds, skipped
from rlpost.oracle.tree import END

Ids = tuple[int, ...]
TRIALS = 25
"""Random tables for the claim about ranking."""
MOST_TEXTS = 400
STEPS = 120
LEARNING_RATE = 5e-3
SAMPLES = 4096
"""Texts a step, drawn anew."""
WIDTH = {"hidden_size": 32, "intermediate_size": 64}


def direction_section(problem: Problem, seed: int) -> Section:
    """What `rlpost verify goals` adds."""
    title = "text read backwards: the joint, infilling, reranking, a trained model"
    leaves = problem.tree.leaves
    if leaves > MOST_TEXTS:
        return Section(title, (skipped("models of reversed text", f"{leaves} texts, more than {MOST_TEXTS}"),))
    tables = [table_problem(problem.tree, seed + k) for k in range(TRIALS)]
    exact_rows = [_joint_row(problem), *_middle_rows(tables), _rerank_row(problem)]
    return Section(title, (*exact_rows, *_learned_rows(problem, seed)))


def texts(problem: Problem) -> dict[Ids, float]:
    """Every text of the tree with its probability: completions without their end token, and those that were cut off."""
    leaves = torch.split(problem.tree.token_N, problem.tree.length_L.tolist())
    ids = [tuple(token for token in leaf.tolist() if token != END) for leaf in leaves]
    return dict(zip(ids, problem.probability_L.tolist(), strict=True))


class Tokens:
    """What is asked of a tokenizer when nothing is written: token 0 ends a text, the one after all others begins it."""

    eos_token_id = END
    chat_template = None

    def __init__(self, vocabulary: int) -> None:
        """Begin texts over tokens below `vocabulary`."""
        self.bos_token_id = vocabulary

    def encode(self, text: str) -> list[int]:
        """No text is asked for but the empty one."""
        assert not text
        return []

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """Tokens have numbers and no text."""
        return " ".join(map(str, ids))


class TableModel(nn.Module):
    """The exact conditionals of a distribution of texts, as a causal language model that `Policy` can hold.

    A context that no text has says nothing: all tokens are equally likely.
    """

    def __init__(self, mass: dict[Ids, float], vocabulary: int) -> None:
        """Sum up the probabilities of whole texts, given without begin and end token."""
        super().__init__()
        self.weight: dict[Ids, Tensor] = defaultdict(lambda: torch.zeros(vocabulary + 1, dtype=torch.float64))
        for text, p in mass.items():
            whole = (vocabulary, *text, END)
            for k in range(1, len(whole)):
                self.weight[whole[:k]][whole[k]] += p
        self.tokens = nn.Embedding(vocabulary + 1, 1)
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)

    def get_output_embeddings(self) -> nn.Embedding:
        """A row a token."""
        return self.tokens

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        """Logits [B, T, V]."""
        rows = [[self._logp(tuple(row[: k + 1])) for k in range(len(row))] for row in input_ids.tolist()]
        return SimpleNamespace(logits=torch.stack([torch.stack(row) for row in rows]))

    def _logp(self, context: Ids) -> Tensor:
        if context not in self.weight:
            return torch.zeros(self.tokens.num_embeddings, dtype=torch.float64)
        return (self.weight[context] / self.weight[context].sum()).log()


def exact_pair(mass: dict[Ids, float], vocabulary: int) -> tuple[Any, Any]:
    """The forward and the reverse policy of a distribution of texts over tokens below `vocabulary`."""
    # Here, because transformers takes seconds to import and other claims do without it.
    from rlpost.policy.policy import Policy

    tokens = Tokens(vocabulary)
    turned = {text[::-1]: p for text, p in mass.items()}
    ahead, back = (Policy(TableModel(m, vocabulary), tokens, flat=False, tiled=False) for m in (mass, turned))
    return ahead, back


def whole(text: Ids, vocabulary: int) -> Any:
    """A text as the group that `sft` learns."""
    from rlpost.types import Completion, Group

    return Group((vocabulary,), (Completion((*text, END), (True,) * (len(text) + 1)),))


def _joint_row(problem: Problem) -> Row:
    """Π p(x_t | x_<t) = Π p(x_t | x_>t): a model of reversed text has the same joint to learn."""
    from rlpost.data.codec import make_codec
    from rlpost.data.direction import backwards
    from rlpost.policy.score import logprobs

    mass, vocabulary = texts(problem), problem.tree.vocabulary
    _, back = exact_pair(mass, vocabulary)
    codec = make_codec(back.tokenizer)
    found = [logprobs(back, [backwards(whole(text, vocabulary), codec)]).sum().exp() for text in mass]
    error = relative_error(torch.stack(found), problem.probability_L)
    return exact("conditionals read backwards multiply to the same joint", error)


def _middle_rows(tables: Sequence[Problem]) -> list[Row]:
    """Between every first and every last token, all middles that there are compete."""
    from rlpost.goals.infill import rank

    right, without, cases = 0, 0, 0
    for table in tables:
        mass, vocabulary = texts(table), table.tree.vocabulary
        ahead, back = exact_pair(mass, vocabulary)
        ending = summed(mass, lambda text: [text[k:] for k in range(len(text) + 1)])
        for x, goal, middles in _cases(mass):
            ranked = rank(ahead, back, (vocabulary, *x), goal, middles)
            joint = {m: mass[(*x, *m, *goal)] for m in middles}
            # p_reverse(m | goal): of whatever begins the text.
            careless = {r.ids: r.forward + math.log(ending[(*r.ids, *goal)]) for r in ranked}
            best = max(joint, key=joint.__getitem__)
            right += ranked[0].ids == best
            without += max(careless, key=careless.__getitem__) == best
            cases += 1
    return [
        holds("infilling: the most probable middle is ranked first", f"{right} of {cases}", "always", right == cases),
        fact("… by log p_forward(m, goal | x) + log p_reverse(m | goal), without x", f"{without} of {cases}"),
    ]


def summed(mass: dict[Ids, float], parts: Any) -> dict[Ids, float]:
    """The probability of every part: of all texts that have it among their `parts`."""
    total: dict[Ids, float] = defaultdict(float)
    for text, p in mass.items():
        for part in parts(text):
            total[part] += p
    return total


def _cases(mass: dict[Ids, float]) -> Iterator[tuple[Ids, Ids, list[Ids]]]:
    between: dict[tuple[int, int], list[Ids]] = defaultdict(list)
    for text in mass:
        if len(text) >= 2:
            between[text[0], text[-1]].append(text[1:-1])
    for (first, last), middles in between.items():
        yield (first,), (last,), middles


def _rerank_row(problem: Problem) -> Row:
    """Bayes: log p(prompt | answer) = log p(answer | prompt) + log p(prompt) − log p(answer)."""
    from rlpost.policy.judge import ReverseJudge
    from rlpost.policy.score import logprobs
    from rlpost.types import Completion, Group

    mass, vocabulary = texts(problem), problem.tree.vocabulary
    ahead, back = exact_pair(mass, vocabulary)
    beginning = summed(mass, lambda text: [text[:k] for k in range(len(text) + 1)])
    ending = summed(mass, lambda text: [text[k:] for k in range(len(text) + 1)])
    cut = [(text[:k], text[k:]) for text in mass for k in range(1, len(text) + 1)]
    groups = [Group((vocabulary, *x), (Completion((*a, END), (True,) * (len(a) + 1)),)) for x, a in cut]
    found = ReverseJudge(back, None, back.tokenizer).scores(groups)
    forward = [float(logprobs(ahead, [g]).sum()) for g in groups]
    bayes = [f + math.log(beginning[x]) - math.log(ending[a]) for f, (x, a) in zip(forward, cut, strict=True)]
    found_S, bayes_S = (torch.tensor(logp, dtype=torch.float64).exp() for logp in (found, bayes))
    return exact(
        "p_reverse(prompt | answer) against Bayes' rule, all prompts and answers", relative_error(found_S, bayes_S)
    )


def _learned_rows(problem: Problem, seed: int) -> list[Row]:
    """By Gibbs' inequality no model's expected loss is below the entropy, whichever way it reads."""
    p_L = problem.probability_L
    entropy = float(-(p_L * p_L.log()).sum())
    rows = [fact("entropy of a text, nats", f"{entropy:.4f}")]
    for reverse, name in ((False, "forwards"), (True, "backwards")):
        nll = trained_nll(problem, reverse, seed)
        gap = nll - entropy
        value = f"{nll:.4f}, {gap:+.4f}"
        # Its own probabilities sum to 1 in float32.
        rows.append(holds(f"expected loss of a tiny Llama trained {name}", value, "not below", gap > -1e-6))
    return rows


def trained_nll(problem: Problem, reverse: bool, seed: int) -> float:
    """Exact expected loss, in nats a text, of a Llama trained on samples of the texts, one way or the other."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlpost.data.codec import make_codec
    from rlpost.data.direction import backwards
    from rlpost.policy.policy import Policy

    vocabulary, p_L = problem.tree.vocabulary, problem.probability_L
    tokens = Tokens(vocabulary)
    sizes = {**CONFIGS["llama"], **WIDTH, "vocab_size": vocabulary + 1, "max_position_embeddings": 32}
    groups = [whole(text, vocabulary) for text in texts(problem)]
    groups = [backwards(g, make_codec(tokens)) for g in groups] if reverse else groups
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
        policy = Policy(model, tokens, flat=False, tiled=False)
        batch = policy.batch(groups)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, STEPS)
        for _ in range(STEPS):
            drawn_L = torch.bincount(torch.multinomial(p_L, SAMPLES, replacement=True), minlength=len(groups))
            loss = -(drawn_L / SAMPLES) @ batch.rows.sum(policy(batch).logp_N)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            policy.backward_done()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return float(-p_L @ batch.rows.sum(policy(batch).logp_N).double())
