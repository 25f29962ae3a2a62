"""Asks an OpenAI-compatible endpoint many questions at once, as often as it takes and no faster than is allowed."""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import json
import os
import random
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpost.errors import DiskError, RewardError, RlpostError
from rlpost.rewards.judge_answers import Answers, opened
from rlpost.rewards.judge_prompts import Unreadable
from rlpost.usercode.stop import Stop, Stopped

if TYPE_CHECKING:
    import httpx2

FIRST_WAIT = 1.0
"""Seconds before the first repetition; doubled for each further one."""
LONGEST_WAIT = 60.0
LONGEST_HOLD = 3600.0
"""Seconds that a server may ask to wait; one that asks for more has failed."""
_WINDOW = 60.0
_LATER = frozenset((408, 409, 425, 429, *range(500, 600)))
"""Status codes that may pass."""
_OF_ONE = frozenset((400, 413, 422))
"""Status codes that may be one question's own fault: it is too long, or refused."""
sleep = asyncio.sleep
clock = time.monotonic
_jitter = random.SystemRandom()  # draws from no state that a checkpoint holds


class Unanswered(Exception):
    """One question has no answer; the text says why."""


class _Later(Exception):
    """A request failed in a way that may pass; the text says how."""


@dataclass(frozen=True)
class Question:
    """One request to the endpoint."""

    body: Mapping[str, Any]
    """What is posted."""
    vote: int
    """Which of several requests with this body it is."""
    read: Callable[[str], float]
    """The verdict of an answer; raises Unreadable."""
    form: str
    """What is said about the form of an answer when one could not be read."""


@cache
def pace_of(url: str, per_minute: int | None) -> Pace:  # noqa: ARG001 - one for each address
    """The pace of all who ask at that address with that limit."""
    return Pace(per_minute)


class Pace:
    """When requests may start: at most `per_minute` within any minute, and none while the server asks to wait."""

    def __init__(self, per_minute: int | None) -> None:
        self._starts: deque[float] = deque(maxlen=per_minute or 1)
        self._limited = per_minute is not None
        self._held_until = 0.0
        self._lock = threading.Lock()

    def start(self, now: float) -> float:
        """0 if a request may start, which is then counted; else the seconds until one may."""
        with self._lock:
            first = self._starts[0] + _WINDOW if self._limited and len(self._starts) == self._starts.maxlen else 0.0
            wait = max(first, self._held_until) - now
            if wait > 0:
                return wait
            self._starts.append(now)
            return 0.0

    def hold(self, until: float) -> None:
        """No request may start before that time."""
        with self._lock:
            self._held_until = max(self._held_until, until)


@dataclass(frozen=True)
class Endpoint:
    """Where questions are asked, and how hard."""

    url: str
    """Without `/chat/completions`."""
    api_key_env: str | None
    """The environment variable that holds its key."""
    timeout: float
    """Seconds that one request may take."""
    retries: int
    """Further requests for one question, after failed ones and for answers that cannot be read."""
    concurrency: int
    """Most requests at once."""
    pace: Pace = field(compare=False)

    def ask(
        self, questions: Sequence[Question], file: Path | None, run: str | None, stop: bool
    ) -> list[float | Unanswered]:
        """The verdict of each question, or why there is none; equal questions are asked once.

        Waits in the calling thread, which a signal can end; answers that came before are kept.

        Args:
            questions: to ask.
            file: where answers are kept; None: nowhere.
            run: the run that failures are kept for, so that it repeats itself when it is resumed; None: for none.
            stop: the first failure stops all.

        Raises:
            RewardError: a question has no answer, and failures stop all; or the endpoint is not what it should be.
            DiskError: answers cannot be kept.
        """
        keys = [self._key(question) for question in questions]
        work = _Work(self, run, stop)
        found = _in_thread(work.all_of(dict(zip(keys, questions, strict=True)), file))
        return [found[key] for key in keys]

    def _key(self, question: Question) -> str:
        """A hash of all that an answer depends on."""
        all_of_it = json.dumps([self.url, question.body, question.vote], sort_keys=True)
        return hashlib.sha256(all_of_it.encode()).hexdigest()

    @property
    def headers(self) -> dict[str, str]:
        """Of a request."""
        return {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {self._secret}"} if self._secret else {}
        )

    def clipped(self, text: str) -> str:
        """What a server or a library says, in one line without the key, should it repeat it."""
        text = " ".join(text.split())
        return (text.replace(self._secret, "***") if self._secret else text)[:160]

    @property
    def _secret(self) -> str:
        """Read from the environment each time, and kept nowhere."""
        return os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""


class _Work:
    """One call's questions on their way."""

    def __init__(self, endpoint: Endpoint, run: str | None, stop: bool) -> None:
        self._endpoint = endpoint
        self._of_failure = None if run is None or stop else f"/{run}"
        """What keys of failures end with, where they are kept."""
        self._stop = stop
        self._room = asyncio.Semaphore(endpoint.concurrency)

    async def all_of(self, questions: Mapping[str, Question], file: Path | None) -> dict[str, float | Unanswered]:
        import httpx2

        found: dict[str, float | Unanswered] = {}
        with opened(file) as answers:
            left = {}
            for key, question in questions.items():
                kept = self._kept(answers, key, question)
                if kept is None:
                    left[key] = question
                else:
                    found[key] = kept
            if not left:
                return found
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=self._endpoint.concurrency)
            async with httpx2.AsyncClient(timeout=None, limits=limits, verify=_tls()) as client:
                try:
                    async with asyncio.TaskGroup() as group:
                        tasks = {
                            key: group.create_task(self._one(client, answers, key, question))
                            for key, question in left.items()
                        }
                except BaseExceptionGroup as errors:
                    raise _first(errors) from None
        return found | {key: task.result() for key, task in tasks.items()}

    def _kept(self, answers: Answers, key: str, question: Question) -> float | Unanswered | None:
        """What came of the question before.

        Raises:
            DiskError: it is no answer to it.
        """
        if self._of_failure is not None and (reason := answers.get(key + self._of_failure)) is not None:
            return Unanswered(reason)
        answer = answers.get(key)
        try:
            return None if answer is None else question.read(answer)
        except Unreadable as error:
            raise DiskError(
                f"judge: a kept answer cannot be read ({error}); remove judge.sqlite to ask again"
            ) from error

    async def _one(
        self, client: httpx2.AsyncClient, answers: Answers, key: str, question: Question
    ) -> float | Unanswered:
        async with self._room:
            try:
                answer = await self._readable(client, question)
            except Unanswered as error:
                if self._stop:
                    raise RewardError(
                        f"judge: {self._endpoint.url}: {error}; mend that and run the same command again, or set "
                        "args.on_failure: unscored"
                    ) from error
                if self._of_failure is not None:
                    answers.put(key + self._of_failure, str(error))
                return error
        return question.read(answers.put(key, answer))

    async def _readable(self, client: httpx2.AsyncClient, question: Question) -> str:
        """An answer that can be read.

        Raises:
            Unanswered: none came.
        """
        messages = list(question.body["messages"])
        why = ""
        for attempt in range(self._endpoint.retries + 1):
            try:
                answer, cut_off = await self._post(client, {**question.body, "messages": messages})
                if cut_off:
                    raise Unreadable("it was cut off at max_tokens")
                question.read(answer)
            except _Later as error:
                why = str(error)
                if attempt < self._endpoint.retries:
                    await sleep(min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * _jitter.uniform(0.5, 1.0))
            except Unreadable as error:
                why = f"the judge's answer cannot be read: {error} ({answer.strip()[-60:]!r})"
                again = f"Your answer cannot be read: {error}. {question.form}"
                messages = [
                    *question.body["messages"],
                    {"role": "assistant", "content": answer},
                    {"role": "user", "content": again},
                ]
            else:
                return answer
        raise Unanswered(f"{why} (asked {self._endpoint.retries + 1} times)")

    async def _post(self, client: httpx2.AsyncClient, body: Mapping[str, Any]) -> tuple[str, bool]:
        """The text of one answer, and whether it was cut off.

        Raises:
            _Later: it may come another time.
            Unanswered: this question will have none.
            RewardError: nor will any other.
        """
        import httpx2

        while (wait := self._endpoint.pace.start(clock())) > 0:
            await sleep(wait)
        endpoint = self._endpoint
        try:
            async with asyncio.timeout(endpoint.timeout):
                reply = await client.post(
                    f"{endpoint.url}/chat/completions", content=json.dumps(body), headers=endpoint.headers
                )
        except TimeoutError:
            raise _Later(f"no answer within {endpoint.timeout:g} s") from None
        except httpx2.HTTPError as error:
            raise _Later(endpoint.clipped(f"{type(error).__name__} {error}")) from None
        if reply.status_code == 200:
            return _content(reply.text)
        told = f"status {reply.status_code}: {endpoint.clipped(reply.text)}"
        if reply.status_code in _LATER:
            seconds = retry_after(reply.headers.get("Retry-After"), time.time())
            if seconds > LONGEST_HOLD:
                raise Unanswered(f"{told} (it asks to wait {seconds:.0f} s)")
            endpoint.pace.hold(clock() + seconds)
            raise _Later(told)
        if reply.status_code in _OF_ONE:
            raise Unanswered(told)
        raise RewardError(f"judge: {endpoint.url}: {told}; check args.url, model_name and api_key_env")


@cache
def _tls() -> ssl.SSLContext:
    """How certificates are checked; takes a while to make."""
    import httpx2

    return httpx2.create_ssl_context()


def retry_after(header: str | None, now: float) -> float:
    """Seconds that the header asks to wait: it holds a number, or a date; `now` in seconds since 1970."""
    if not header:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - now
        except (ValueError, OverflowError):
            return 0.0
    return seconds if seconds > 0 else 0.0  # NaN is not


def _content(text: str) -> tuple[str, bool]:
    """The answer in a reply, and whether it was cut off.

    Raises:
        _Later: the reply is not what OpenAI's interface gives.
    """
    try:
        choice = json.loads(text)["choices"][0]
        content, reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _Later(f"a reply that is no chat completion: {text[:80]!r}") from None
    return content if isinstance(content, str) else "", reason == "length"


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that the user is shown, of those that ended the questions."""
    flat: list[BaseException] = []
    for error in errors.exceptions:
        flat.append(_first(error) if isinstance(error, BaseExceptionGroup) else error)
    return next((error for error in flat if isinstance(error, RlpostError)), flat[0])


def _in_thread(work: Coroutine[Any, Any, dict[str, float | Unanswered]]) -> dict[str, float | Unanswered]:
    """Run `work` in a thread, since this one may have an event loop of its own; ended by a signal to stop."""
    results: list[dict[str, float | Unanswered]] = []
    errors: list[BaseException] = []
    runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
    loop = runner.get_loop()
    task = loop.create_task(work)

    def run() -> None:
        try:
            with runner:
                results.append(loop.run_until_complete(task))
        except BaseException as error:  # raised again below, in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, name="judge", daemon=True)
    thread.start()
    began = clock()
    try:
        while thread.is_alive():
            thread.join(0.1)
            if Stop.over(clock(), began):
                raise Stopped
    except BaseException:
        with suppress(RuntimeError):  # it has just ended
            loop.call_soon_threadsafe(task.cancel)
        thread.join()
        raise
    if errors:
        raise errors[0]
    return results[0]
