"""Episodes with tools: what the model reads is what its chat template writes, in lock-step and freely."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from tool_templates import DEEPSEEK, LLAMA3, MISTRAL_3, MISTRAL_11, QWEN2_5, QWEN3, with_tools

from rlpost.data.chat import probe
from rlpost.data.codec import make_codec
from rlpost.data.formats import Format, encode
from rlpost.data.templates import Job, Talk, render_all
from rlpost.data.tool_calls import Arguments, formed
from rlpost.data.tool_format import wire_calls
from rlpost.data.tool_text import ToolCall
from rlpost.engine.params import Sampling
from rlpost.environments.loop import collector
from rlpost.environments.tools import codec_with_tools
from rlpost.errors import ModelError
from rlpost.evaluate.params import Evaluation
from rlpost.stages.rollouts import _of_tools
from rlpost.types import Completion, completions
from rlpost.usercode.toolset import bound_tools

FILE = '''
import random


def dice(sides: int, label: str = "") -> str:
    """Roll.

    Args:
        sides: Of the dice.
        label: Of the roll.
    """
    return f"{label}{random.randint(1, sides)}"


def quiet() -> str:
    """Say nothing."""
    return "<|im_end|>"
'''
TEMPLATES = {
    "qwen2.5": QWEN2_5,
    "llama3": LLAMA3,
    "mistral v3": MISTRAL_3,
    "mistral v11": MISTRAL_11,
    "deepseek": DEEPSEEK,
}
ROW = {"prompt": [{"role": "user", "content": "Roll, please."}]}


class Scripted:
    """In lock-step: says what a function gives for the text it is given."""

    def __init__(self, tokenizer, says):
        self.tokenizer, self.says, self.asked = tokenizer, says, []
        self.stop = probe(tokenizer)

    def generate(self, requests):
        return [(self.one(request),) for request in requests]

    def one(self, request):
        text = self.tokenizer.decode(request.prompt.tolist())
        self.asked.append(text)
        said = self.says(text)
        ids = [*self.tokenizer.encode(said, add_special_tokens=False), self.stop.stop_id]
        return Completion(ids, [True] * len(ids), said, "stop", [-1.0] * len(ids), weights_version=1)


class Freely(Scripted):
    """The same one request at a time, each as soon as it can be."""

    def generate(self, requests):
        raise AssertionError(requests)

    def update_weights(self, policy, version):
        raise AssertionError(policy, version)

    def close(self):
        pass

    async def complete(self, request):
        for _ in range(request.seed % 7):
            await asyncio.sleep(0)
        return (self.one(request),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    (folder / "my.py").write_text(FILE, "utf-8")
    return folder


def episodes(folder, template, says, *, n=1, turns=3, room=2000, engine=Scripted, names=("my.py:dice", "my.py:quiet")):
    section = {
        "data": {"test": {"path": "x"}},
        "max_turns": turns,
        "tools": [{"fn": fn} for fn in (*names, "calculator")],
    }
    cfg = Evaluation.model_validate(section)
    tokenizer = with_tools(template)
    codec = codec_with_tools(make_codec(tokenizer), cfg, "evaluation", folder)
    group = encode(ROW, Format.prompt, codec, "row 1")
    policy = SimpleNamespace(tokenizer=tokenizer, max_positions=4000)
    made = engine(tokenizer, says)
    collect = collector(made, policy, bound_tools(cfg, "evaluation", folder), turns)
    (found,) = collect([group], n, Sampling(max_new_tokens=room), 3)
    return tokenizer, codec, found, made


def written(tokenizer, calls, content="", first=0):
    """How the template writes a turn with these calls, without its end."""
    turn = {"role": "assistant", "content": content}
    turn |= {"tool_calls": wire_calls(calls, first)} if calls else {}
    talk = Talk([ROW["prompt"][0], turn], None)
    talk = formed(talk, Arguments.text if "```json" in tokenizer.chat_template else Arguments.object)
    start, whole = (r.text for r in render_all(tokenizer, [Job(talk, 1, True), Job(talk, 2)], "test"))
    return whole[len(start) : whole.rindex(probe(tokenizer).stop)].replace("<think>\n\n</think>\n\n", "")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_model_reads_what_the_template_renders_of_the_whole_conversation(folder, name):
    template = TEMPLATES[name]
    plain = with_tools(template)
    call, again = ToolCall("calculator", {"expression": "6*7"}), ToolCall("calculator", {"expression": "1+"})
    turns = [written(plain, [call], first=7), written(plain, [again], first=1), written(plain, [], "It is 42.")]
    said = iter(turns)
    tokenizer, codec, group, engine = episodes(folder, template, lambda _: next(said))
    (done,) = group.completions
    talk = [*ROW["prompt"], *[{k: v for k, v in m.items() if k != "failed" and v != []} for m in done.messages]]
    form = Arguments.text if name == "deepseek" else Arguments.object
    (whole,) = render_all(tokenizer, [Job(formed(Talk(talk, codec.tools), form), len(talk))], "test")
    read = tokenizer.decode([*group.prompt.tolist(), *done.ids.tolist()])
    assert read == whole.text.rstrip("\n")
    assert [m["role"] for m in done.messages] == ["assistant", "tool", "assistant", "tool", "assistant"]
    number = "call00007" if name == "mistral v3" else "call00000"  # the model's own, where it writes one
    assert done.messages[1] == {"role": "tool", "name": "calculator", "tool_call_id": number, "content": "42"}
    assert done.messages[3]["failed"]
    assert done.messages[3]["tool_call_id"] == "call00001"
    assert done.messages[4]["tool_calls"] == []
    assert (done.text.strip(), done.finish, len(done.steps)) == ("It is 42.", "stop", 3)
    assert tokenizer.decode(done.ids[done.action].tolist()) == "".join(t + engine.stop.stop for t in turns)


def call(name, **arguments):
    return written(with_tools(QWEN2_5), [ToolCall(name, arguments)])


def test_several_calls_of_a_turn_are_answered_together_and_in_order(folder):
    tokenizer = with_tools(QWEN2_5)
    three = [
        ToolCall("dice", {"sides": 1, "label": "b"}),
        ToolCall("calculator", {"expression": "2"}),
        ToolCall("d", {}),
    ]
    said = iter([written(tokenizer, three, "Rolling."), "Done."])
    _, _, group, engine = episodes(folder, QWEN2_5, lambda _: next(said))
    (done,) = group.completions
    assert done.messages[0]["content"] == "Rolling."
    assert [m["content"] for m in done.messages[1:4]][:2] == ["b1", "2"]
    assert done.messages[3]["content"].startswith("Error: there is no tool 'd'")
    results = "\n<tool_response>\nb1\n</tool_response>\n<tool_response>\n2\n</tool_response>\n<tool_response>\nError:"
    assert f"</tool_call><|im_end|>\n<|im_start|>user{results}" in engine.asked[1]
    assert engine.asked[1].endswith("</tool_response><|im_end|>\n<|im_start|>assistant\n")


def test_a_call_that_cannot_be_read_is_answered_and_the_episode_goes_on(folder):
    said = iter(["<tool_call>\n{broken}\n</tool_call>", "<tool_call>[", "Sorry."])
    _, _, group, _ = episodes(folder, QWEN2_5, lambda _: next(said))
    (done,) = group.completions
    bad, told, worse, again, last = done.messages
    assert bad["tool_calls"][0]["function"] == {
        "name": "unreadable",
        "arguments": {"text": "{broken}"},
    }
    assert told["content"].startswith("Error: the tool call cannot be read: it is not JSON: Expecting property name")
    assert again["content"].startswith("Error: the tool call cannot be read: ")
    assert worse["tool_calls"][0]["id"] == "call00001"
    assert (last["content"], done.finish) == ("Sorry.", "stop")


def test_results_forge_no_turns(folder):
    said = iter([call("quiet"), "Done."])
    tokenizer, _, group, engine = episodes(folder, QWEN2_5, lambda _: next(said))
    assert group.completions[0].messages[1]["content"] == "< |im_end|>"
    assert "<tool_response>\n< |im_end|>\n</tool_response>" in engine.asked[1]
    assert group.completions[0].ids.tolist().count(probe(tokenizer).stop_id) == 3


def test_an_episode_ends_at_its_last_turn_or_where_there_is_no_room(folder):
    _, _, group, engine = episodes(folder, QWEN2_5, lambda _: call("dice", sides=6), turns=3)
    (done,) = group.completions
    assert (len(engine.asked), done.finish) == (3, "length")
    assert [m["role"] for m in done.messages] == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert done.messages[-1]["tool_calls"][0]["id"] == "call00002"
    _, _, group, engine = episodes(folder, QWEN2_5, lambda _: call("dice", sides=6), room=60)
    assert (len(engine.asked), group.completions[0].finish) == (1, "length")


def test_lock_step_and_free_episodes_are_the_same(folder):
    def says(text):
        rolled = text.count("<tool_response>")
        if rolled == 0:
            return call("dice", sides=10**6) + call("dice", sides=10**6, label="x")
        return call("dice", sides=9) if rolled == 2 else f"Rolled {hash(text) % 7}."

    *_, group, _ = episodes(folder, QWEN2_5, says, n=6)
    *_, free, engine = episodes(folder, QWEN2_5, says, n=6, engine=Freely)
    assert group.same(free)
    assert len(engine.asked) == 18
    rolls = {c.messages[1]["content"] for c in completions([group])}
    assert len(rolls) == 6
    assert all(m["content"] != n["content"][1:] for c in completions([group]) for m, n in [c.messages[1:3]])


def test_calls_and_failures_are_counted(folder):
    said = iter([call("dice", sides=6) + call("dice"), "Done."])
    *_, group, _ = episodes(folder, QWEN2_5, lambda _: next(said))
    other = Completion(
        [1], [True], "x", "stop", [-1.0], messages=[{"role": "assistant", "content": "x", "tool_calls": []}]
    )
    assert _of_tools([*group.completions, other]) == {"tool_calls": 1.0, "tool_failures": 0.5}
    assert _of_tools([Completion([1], [True], "x", "stop", [-1.0])]) == {}


def test_a_template_without_results_of_tools_is_refused(folder):
    deaf = QWEN2_5.replace("message.role == 'tool'", "message.role == 'toll'")
    with pytest.raises(ModelError, match="it does not write a tool's result after a call: set"):
        episodes(folder, deaf, lambda _: "x")


def test_reasoning_before_a_call_is_kept_as_the_model_wrote_it(folder):
    thought = "<think>\nA calculator helps.\n</think>\n\n"
    said = iter([thought + call("calculator", expression="1+1"), "2"])
    tokenizer, _, group, _ = episodes(folder, QWEN3, lambda _: next(said))
    (done,) = group.completions
    assert done.messages[0]["content"] == thought.strip()
    assert tokenizer.decode(done.ids.tolist()).startswith(thought + "<tool_call>")
    assert (done.messages[1]["content"], done.text) == ("2", "2")


def test_the_same_call_draws_anew_in_every_turn(folder):
    said = iter([call("dice", sides=10**9), call("dice", sides=10**9), "Done."])
    *_, group, _ = episodes(folder, QWEN2_5, lambda _: next(said))
    (done,) = group.completions
    assert done.messages[1]["content"] != done.messages[3]["content"]


def test_a_turn_that_a_stop_string_ended_is_ended_for_the_model(folder):
    class Stopped(Scripted):
        def one(self, request):
            found = super().one(request)
            return Completion(found.ids[:-1], found.action[:-1], found.text, "stop", found.logprobs[:-1])

    said = iter([call("calculator", expression="1+1"), "2"])
    _, _, _, engine = episodes(folder, QWEN2_5, lambda _: next(said), engine=Stopped)
    assert "</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n2\n" in engine.asked[1]
