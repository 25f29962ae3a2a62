"""Several processes of one run: what they share, that they give what one gives, and what happens when one dies."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import set_forkserver_preload
from pathlib import Path

import golden
import pytest
import torch
from processes import start, wait_until
from tiny_recipes import PAIRS, SFT, write
from torch.multiprocessing import start_processes

import rlpost
from rlpost import ranks
from rlpost.agreement import must_agree, on_all
from rlpost.errors import DiskError, Interrupted, RecipeError

PRELOADED = ["rlpost.pipeline", "rlpost.cli.app"]
THREADS = {**os.environ, "OMP_NUM_THREADS": "1"}
RUNS = {run.key: run for run in golden.listed()}


@pytest.mark.parametrize(
    ("costs", "among", "expected"),
    [
        ([1, 1, 1, 1], 2, [slice(0, 2), slice(2, 4)]),
        ([5, 1, 1, 1], 2, [slice(0, 1), slice(1, 4)]),
        ([1, 1, 1, 5], 2, [slice(0, 3), slice(3, 4)]),
        ([1], 3, [slice(0, 0), slice(0, 1), slice(1, 1)]),
        ([], 2, [slice(0, 0), slice(0, 0)]),
        ([0, 0], 2, [slice(0, 2), slice(2, 2)]),
    ],
)
def test_shares_are_neighbours_of_about_equal_cost(costs, among, expected):
    assert ranks.shares(costs, among) == expected


def test_shares_cover_everything_once():
    costs = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
    for among in range(1, 12):
        found = [i for share in ranks.shares(costs, among) for i in range(len(costs))[share]]
        assert found == list(range(len(costs)))


def test_one_process_waits_for_nobody():
    assert ranks.divided([1, 2], [1, 1], lambda some: [10 * x for x in some]) == [10, 20]
    assert ranks.together(lambda: 5) == [5]
    assert ranks.from_first(lambda: 6) == 6
    assert (ranks.count(), ranks.index(), ranks.is_first()) == (1, 0, True)


def _rank(rank: int, environments: list[dict[str, str]], folder: str) -> None:
    """One of two ranks: in a file, what it was told."""
    os.environ |= environments[rank]
    ranks.start()
    told = {"writes": _writes(rank, folder), "errors": _errors(rank), "beside": _beside(rank), "ends": _ends(rank)}
    Path(folder, f"told{rank}").write_text(json.dumps(told))


def _writes(rank: int, folder: str) -> list[object]:
    """How each way to meet ended after a write that failed."""
    log, passed = Path(folder, "log"), Path(folder, "passed")

    @ranks.first_writes
    def write(line: str) -> None:
        if line == "refused":
            raise DiskError("the disk is full")
        with log.open("a") as file:
            file.write(line)
        deadline = time.monotonic() + 60
        while not passed.exists():
            assert time.monotonic() < deadline, "the other waits"
            time.sleep(0.001)

    @ranks.first_enters
    @contextmanager
    def entered() -> Iterator[None]:
        yield

    ended: list[object] = []
    write("written")
    if rank:
        passed.touch()
    ended.append(ranks.largest(rank))
    meetings = [lambda: ranks.together(lambda: 5), lambda: ranks.largest(5), lambda: ranks.from_first(log.unlink), None]
    for meet in meetings:
        try:
            with entered():
                write("refused")
                write("not written")
                if meet is not None:
                    meet()
        except DiskError as error:
            ended.append(str(error))
    return ended


def _errors(rank: int) -> list[str]:
    """What was raised where the second one, and where both had an error."""

    def failing(who: tuple[int, ...]) -> int:
        if rank in who:
            raise RecipeError(f"wrong for {len(who)}")
        return rank

    raised = []
    for who in ((1,), (0, 1)):
        with pytest.raises(RecipeError) as caught:
            on_all(partial(failing, who))
        raised.append(str(caught.value))
    return [*raised, f"no error: {on_all(partial(failing, ()))}"]


def _beside(rank: int) -> list[object]:
    """What a second thread and this one were told meanwhile, while the first rank is alone at times in this one."""
    enter, found = ranks.beside(), []

    def work() -> None:
        enter()
        for n in range(40):
            found.append(ranks.together(lambda n=n: [rank, n]))
            found.append(ranks.divided([n, n + 1], [1, 1], lambda some: [10 * x for x in some]))

    thread = threading.Thread(target=work)
    thread.start()
    main = []
    for n in range(40):
        main.append(ranks.together(lambda n=n: [-rank, n]))
        main.append(ranks.from_first(lambda: (time.sleep(0.003), ranks.count())[1]))
    thread.join()
    return [found, main]


def _ends(rank: int) -> list[bool]:
    """Whether an error is left to the first: one that the second alone ends with, another one than the first's."""
    left = [ranks.left_to_first("memory")] if rank else []
    ranks.largest(0)
    left += [ranks.left_to_first("the same"), *([ranks.left_to_first("another")] if rank else [])]
    ranks.largest(0)  # the first one holds what they met at
    return left


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> tuple[Path, list[dict[str, object]]]:
    folder = tmp_path_factory.mktemp("ranks")
    set_forkserver_preload(PRELOADED)
    start_processes(_rank, (golden.ranks_of(2), str(folder)), nprocs=2, start_method="forkserver")
    return folder, [json.loads((folder / f"told{rank}").read_text()) for rank in range(2)]


def test_nobody_waits_for_a_write_and_its_error_is_raised_by_all_where_they_meet(told):
    folder, by_rank = told
    assert [one["writes"] for one in by_rank] == [[1, *["the disk is full"] * 4]] * 2
    assert (folder / "log").read_text() == "written"


def test_an_error_of_one_rank_names_it_and_one_of_all_does_not(told):
    _, by_rank = told
    both = ["rank 1: wrong for 1", "wrong for 2"]
    assert [one["errors"] for one in by_rank] == [[*both, "no error: 0"], [*both, "no error: 1"]]


def test_a_second_thread_meets_its_own(told):
    _, by_rank = told
    second = [x for n in range(40) for x in ([[0, n], [1, n]], [10 * n, 10 * n + 10])]
    first = [x for n in range(40) for x in ([[0, n], [-1, n]], 1)]
    assert [one["beside"] for one in by_rank] == [[second, first]] * 2


def test_an_error_is_left_to_the_first_rank_only_where_that_ends_with_it(told):
    _, by_rank = told
    assert [one["ends"] for one in by_rank] == [[False], [False, True, False]]


def on_two(folder: Path, words: list[list[str]]) -> tuple[list[int | None], list[str]]:
    """The exit codes of two ranks that run these words, and all lines that they say of errors."""
    # As a launcher does, which outlives the ranks, so that they can say to each other what ended them.
    meeting = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launcher = {"MASTER_PORT": str(meeting.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    launcher["TORCHELASTIC_RESTART_COUNT"] = "0"
    environments = [environment | launcher for environment in golden.ranks_of(2)]
    started = [start(words[n], folder / f"rank{n}", environment=environments[n]) for n in range(2)]
    for process in started:
        process.join(100)
    said = [own_lines((folder / f"rank{n}.err").read_text()) for n in range(2)]
    return [process.exitcode for process in started], said[0] + said[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ([[], ["stages.sft.steps=9"]], "rank 1 has a recipe of sha256 "),
        ([[], ["stages.sft.stepz=9"]], "rank 1: stages.sft.stepz: "),
        ([["stages.sft.stepz=9"], ["stages.sft.stepz=9"]], "stages.sft.stepz: "),
        ([["stages.sft.data.sums.task.fn=addition.no"]] * 2, "stages.sft.data.sums.task.fn: "),
    ],
    ids=["other recipes", "one is wrong", "both are wrong", "both lack a function"],
)
def test_wrong_ranks_are_refused_in_one_line_before_anything_is_written(recipe: Path, tmp_path: Path, change, said):
    codes, lines = on_two(tmp_path, [["train", str(recipe), *words] for words in change])
    assert codes == [2, 2]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"rlpost: {said}")
    assert not (tmp_path / "runs").exists()


def test_a_harness_is_one_process(tmp_path: Path):
    codes, lines = on_two(tmp_path, [["eval", "m", "--harness", "lm_eval", "--tasks", "t.yaml"]] * 2)
    assert codes == [2, 2]
    (line,) = lines
    assert line.startswith("rlpost: started as 2 processes by torchrun")


def test_a_port_that_is_taken_is_said_in_one_line(recipe: Path, tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment = golden.ranks_of(2)[0] | {"MASTER_PORT": str(taken.getsockname()[1])}
        process = start(["train", str(recipe)], tmp_path / "rank", environment=environment)
        process.join(100)
    assert process.exitcode == 8
    (line,) = own_lines((tmp_path / "rank.err").read_text())
    assert line.startswith(f"rlpost: rank 0: cannot meet the others at 127.0.0.1:{environment['MASTER_PORT']} ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("here", "local"), [("3", 0), ("1", 2)])
def test_more_processes_than_gpus_are_refused(monkeypatch, here, local):
    """By all processes of the machine, so that its first one says it; or by the one that has none."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ranks, "_local", local)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    with pytest.raises(RecipeError, match="3 processes on a machine of 2 GPUs - start at most 2"):
        ranks.start()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("some", [["--only", "grpo-lora"], pytest.param([], marks=pytest.mark.slow)])
def test_every_kind_of_stage_gives_on_two_processes_what_it_gives_on_one(some: list[str]):
    """Sampling, rewards and updates by the command line: the same tokens, and the same numbers up to rounding."""
    command = [sys.executable, str(golden.ROOT / "scripts/golden.py"), "--ranks", "2", *some]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def launched(folder: Path, words: list[str]) -> subprocess.Popen[str]:
    """`rlpost WORDS` on two processes."""
    return subprocess.Popen(
        [sys.executable, "-m", "rlpost", *words, "parallel.processes=2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=THREADS,
    )


def own_lines(text: str) -> list[str]:
    """What rlpost itself said of an error."""
    return [line for line in text.splitlines() if line.startswith("rlpost: ")]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    run = RUNS["sft"]
    golden.write_recipe(run, tmp_path)
    return tmp_path / "tiny.yaml"


@pytest.mark.slow
def test_an_error_is_said_once(recipe: Path, tmp_path: Path):
    process = launched(tmp_path, ["train", str(recipe), "stages.sft.learning_rate=1e30"])
    _, err = process.communicate(timeout=100)
    assert process.returncode == 9, err
    assert len(own_lines(err)) == 1, err


@pytest.mark.slow
def test_a_change_is_taken_back_where_nothing_was_trained_with_it(recipe: Path, tmp_path: Path):
    """The first rank does so alone: the others have left."""
    assert launched(tmp_path, ["train", str(recipe)]).wait(100) == 0
    config = tmp_path / "runs/run/config.resolved.yaml"
    before = config.read_text("utf-8")
    changed = ["stages.sft.steps=9", "stages.sft.learning_rate=1e30", "--allow-change"]
    process = launched(tmp_path, ["train", str(recipe), *changed])
    _, err = process.communicate(timeout=100)
    assert process.returncode not in (0, 8), err
    assert len(own_lines(err)) == 1, err
    assert config.read_text("utf-8") == before


TORCHRUN = ["torch.distributed.run", "--nproc-per-node=2", "--standalone"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]
"""Which starts as many processes on a machine without a GPU too."""


@pytest.mark.slow  # half a minute
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_by_a_launcher(launcher: list[str], recipe: Path, tmp_path: Path):
    command = [sys.executable, "-m", *launcher, "-m", "rlpost", "train", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=THREADS, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("sft/final\n")
    assert done.stdout.count("\n") == 1


@pytest.mark.slow  # a minute
def test_eval_and_pairs_give_on_two_processes_what_they_give_on_one(tmp_path: Path):
    rewards = [{"fn": "rewards.py:digits"}]
    data = {"held_out": {"task": {"fn": "addition.held_out"}, "limit": 30}}
    evaluation = {"data": data, "rewards": rewards, "sampling": {"max_new_tokens": 4}, "samples": 3, "batch": 8}
    file = str(write(tmp_path, {"sft": SFT, "pairs": PAIRS}, evaluation=evaluation))
    rlpost.train(file)
    run = str(tmp_path / "runs/run")
    assert_same(tmp_path, ["eval", run, "--json"])
    out = tmp_path / "made.jsonl"
    assert_same(tmp_path, ["pairs", run, "--recipe", file, "--out", str(out)], out)


def assert_same(folder: Path, words: list[str], file: Path | None = None) -> None:
    """One process, two by the command itself, and two by torchrun print, and write, the same."""
    left = []
    for command in (
        ["rlpost", *words],
        ["rlpost", *words, "parallel.processes=2"],
        [*TORCHRUN, "-m", "rlpost", *words],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, cwd=folder, env=THREADS, check=False
        )
        assert done.returncode == 0, done.stderr
        left.append((done.stdout, file.read_bytes() if file else b"no file"))
        if file:
            file.unlink()
    assert all(left[0])
    assert left == [left[0]] * 3


def test_another_number_than_the_launchers_is_refused(recipe: Path):
    with pytest.raises(RecipeError, match=r"parallel.processes: 2, but this run was started as 1"):
        rlpost.train(str(recipe), ["parallel.processes=2"])


@pytest.mark.slow
def test_a_run_whose_rank_is_killed_ends_and_goes_on(recipe: Path, tmp_path: Path):
    words = ["train", str(recipe), "stages.sft.steps=400", "stages.sft.checkpoint_every=5"]
    process = launched(tmp_path, words)
    checkpoints = tmp_path / "runs/run/sft/checkpoints"
    deadline = time.monotonic() + 100
    while not list(checkpoints.glob("step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 8, err
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert len(own_lines(err)) == 1, err
    reached = max(int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-??????"))
    # And on one process.
    done = subprocess.run(
        [sys.executable, "-m", "rlpost", *words], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert f"resumes after step {reached} " in done.stderr
    assert done.stdout.strip().endswith("sft/final")


@pytest.mark.slow  # ten seconds each
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_signal_to_their_launcher_stops_all_ranks_after_the_step(number, code, recipe: Path, tmp_path: Path):
    process = launched(
        tmp_path, ["train", str(recipe), "stages.sft.steps=100000", "stages.sft.checkpoint_every=100000"]
    )
    log = tmp_path / "runs/run/sft/metrics.jsonl"
    wait_until(lambda: process.poll() is not None or (log.exists() and log.read_bytes().count(b"\n") > 3))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(number)
    _, err = process.communicate(timeout=100)  # ranks have it open too
    assert process.returncode == code, err
    # Without the launcher each rank says it.
    assert {line.partition(" after ")[0] for line in own_lines(err)} == {"rlpost: sft stopped"}
    assert len(own_lines(err)) == 1 or number == signal.SIGKILL
    assert len(list((tmp_path / "runs/run/sft/checkpoints").glob("step-??????"))) == 1
    wait_until(lambda: all(ended(int(child)) for child in children))


def ended(pid: int) -> bool:
    """Whether a process is no more, but perhaps for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow  # three minutes
@pytest.mark.timeout(1200)
def test_killed_at_random_instants_a_run_ends_as_an_undisturbed_one():
    command = [sys.executable, str(golden.ROOT / "scripts/kills.py"), "--kills", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ranks_that_are_about_to_do_different_things_are_refused(monkeypatch):
    monkeypatch.setattr(ranks, "together", lambda work: [work(), {"torch": "2.12"}])
    with pytest.raises(RecipeError, match=r"rank 1 has torch 2.12, and rank 0 has 2.13 - start all"):
        must_agree({"torch": "2.13"})


def test_an_interruption_can_be_raised_elsewhere():
    error = pickle.loads(pickle.dumps(Interrupted("stopped", signal.SIGTERM)))
    assert (str(error), error.exit_code) == ("stopped", 143)
