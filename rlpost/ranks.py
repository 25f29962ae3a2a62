"""The processes of one run, its ranks: which of them this is, and what they do together.

All ranks run the same program on the same rows with the same seeds. What costs time is divided: each rank samples,
scores or computes a share, and every rank gets all of it, in order. So what couples completions (baselines of groups,
whitening, a batch's mean) is computed from all of them, by every rank alike, and a stage does not know of ranks.
One process runs the same code and waits for nobody.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial, wraps
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from rlpost.errors import RankError, RecipeError, RlpostError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")
BUCKET = 2**25
"""Bytes of tensors that are summed over the ranks in one message, at least."""

_count = 1
_failed: RlpostError | None = None
"""What a write failed with that the others did not wait for."""
_index = int(os.environ.get("RANK") or 0) if "MASTER_PORT" in os.environ else 0
"""As a launcher says, so that one of several is silent from the beginning."""
_local = int(os.environ.get("LOCAL_RANK") or 0) if "MASTER_PORT" in os.environ else 0
"""Which of this machine's processes this is."""
_store: Any = None
"""What the ranks met at; torch's Store."""
_ENDED = "rlpost/ended"
"""In the store: the error that the first rank ends with."""


class _Thread(threading.local):
    alone = False  # it does what only the first rank does, and meets nobody
    group: Any = None  # where it meets the same thread of the other ranks; None: in the default process group
    second: Any = None  # of all threads: the group of those beside the main ones, once there are any


_thread = _Thread()


def start() -> torch.device:
    """Join the other processes that a launcher started, if it did, and return this one's device.

    Raises:
        RecipeError: there are fewer devices than processes on this machine.
        RankError: they cannot be reached, or the port where they meet is taken.
    """
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device("cpu") if found is None else found
    if device.type == "cuda":
        here, there = int(os.environ.get("LOCAL_WORLD_SIZE") or 1), torch.cuda.device_count()
        if max(here, _local + 1) > there:
            raise RecipeError(f"{max(here, _local + 1)} processes on a machine of {there} GPUs - start at most {there}")
        device = torch.device("cuda", _local)
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        if not torch.distributed.is_initialized():
            _meet(device)
        join()
    return device


def _meet(device: torch.device) -> None:
    """Open the default process group where the launcher says."""
    global _store
    from torch.distributed.rendezvous import rendezvous

    try:
        _store, number, count = next(rendezvous("env://"))
        _open(device, store=_store, rank=number, world_size=count)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RankError(
            f"rank {_index}: cannot meet the others at {where} ({_first_line(error)}); if the port is taken choose "
            "another one (torchrun --master-port N, or --standalone on one machine)"
        ) from error


def mesh(device: torch.device) -> DeviceMesh:
    """All ranks in one row, for sharding; a process by itself is a row too."""
    from torch.distributed.device_mesh import init_device_mesh

    open_group(device)
    return init_device_mesh(device.type, (_count,))


def open_group(device: torch.device) -> None:
    """Open the default process group, if it is not: a process by itself has one of its own."""
    from torch import distributed

    if not distributed.is_initialized():
        _open(device, store=distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def _open(device: torch.device, **where: Any) -> None:
    """Open the default process group."""
    from torch import distributed

    # Objects travel by gloo, tensors by what is fastest between the devices.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **where)
    # Its threads must not outlive the interpreter: that would abort the process.
    atexit.register(distributed.destroy_process_group)


def join() -> None:
    """Take the number and count of the default process group, which is there."""
    global _count, _index
    from torch import distributed

    _count, _index = distributed.get_world_size(), distributed.get_rank()


def leave() -> None:
    """Be alone again."""
    global _count, _index, _failed
    _count, _index, _failed, _Thread.second = 1, 0, None, None


def beside() -> Callable[[], None]:
    """What a thread beside this one calls first, to meet the others' such threads alone; all ranks call this."""
    if count() > 1 and _Thread.second is None:
        from torch import distributed

        _Thread.second = distributed.new_group(backend="gloo")
    return partial(setattr, _thread, "group", _Thread.second)


def count() -> int:
    """Number of ranks that this thread works with."""
    return 1 if _thread.alone else _count


def index() -> int:
    """Which of them this process is, from 0."""
    return _index


def on_this_machine() -> int:
    """Number of ranks that share this machine."""
    return min(count(), int(os.environ.get("LOCAL_WORLD_SIZE") or _count))


def is_first() -> bool:
    """Whether it is the one that writes files and speaks to the user."""
    return _index == 0


def left_to_first(text: str) -> bool:
    """Whether the error that ends this rank is for the first one to say: that ends with the same one.

    Before they have met, the first of each machine speaks.
    """
    if _store is None:
        return _local > 0
    try:
        if is_first():
            _store.set(_ENDED, text)
            return False
        _store.wait([_ENDED], timedelta(seconds=2))
        return bool(_store.get(_ENDED).decode() == text)
    except RuntimeError:  # the first one goes on or was killed, or what they met at is gone
        return False


def together(work: Callable[[], T]) -> list[T]:
    """What `work` returned on each rank, in their order, on all of them; an error of one is raised by all.

    So is what a write failed with since they last met (`first_writes`); the first rank then does not work.
    """
    if count() == 1:
        return [work()]
    from torch import distributed

    global _failed
    own: tuple[T | None, RlpostError | None]
    try:
        if _thread.group is None and _failed is not None:  # the thread that writes is told
            error, _failed = _failed, None
            raise error
        own = work(), None
    except RlpostError as error:
        own = None, error
    every: list[Any] = [None] * _count
    with _reaching_others():
        distributed.all_gather_object(every, own, group=_thread.group)
    for _, raised in every:
        if raised is not None:
            raise raised
    return [found for found, _ in every]


def largest(number: int) -> int:
    """The largest of the ranks' numbers, on all of them; at a fraction of what `together` takes.

    Raises:
        RlpostError: what a write failed with since they last met.
    """
    if count() == 1:
        return number
    import torch

    told = torch.tensor([number, _thread.group is None and _failed is not None])
    with _reaching_others():
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, group=_thread.group)
    found, failed = told.tolist()
    if failed:
        together(_nothing)
    return int(found)


def anyone(does: bool) -> bool:
    """Whether any rank says so; raises what `largest` does."""
    return largest(int(does)) > 0


def from_first(work: Callable[[], T]) -> T:
    """What `work` returned on the first rank, which alone runs it, once all have come here.

    So all of them find files as they were before it, or as it left them. Within it the first rank is alone.
    """
    if count() == 1:
        return work()
    from torch import distributed

    with _reaching_others():
        distributed.barrier(group=_thread.group)
    found: list[T] = together(partial(_alone, work) if is_first() else _nothing)
    return found[0]


def first_alone(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function that only the first rank runs; all of them call it, and get what it returned."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        return from_first(lambda: function(*args, **kwargs))

    return wrapped


def first_writes(function: Callable[P, None]) -> Callable[P, None]:
    """Decorates a write that nobody reads before the ranks meet again: the first one does it, and no one waits.

    What it fails with is raised by all of them where they meet next; nothing is written in this way until then.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        global _failed
        if count() == 1:
            function(*args, **kwargs)
        elif is_first() and _failed is None:
            try:
                _alone(lambda: function(*args, **kwargs))
            except RlpostError as error:
                _failed = error

    return wrapped


def first_enters(opened: Callable[P, AbstractContextManager[T]]) -> Callable[P, AbstractContextManager[T]]:
    """Decorates a context that only the first rank enters and leaves; all of them get what it gives."""

    @wraps(opened)
    @contextmanager
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        context = opened(*args, **kwargs)
        found = from_first(context.__enter__)
        try:
            yield found
            together(_nothing)  # a write that failed last
        except BaseException as error:
            # Alone: the others may have left already, and wait for nothing.
            seen = (type(error), error, error.__traceback__)
            if not (is_first() and _alone(lambda: context.__exit__(*seen))):
                raise
        else:
            if is_first():
                _alone(lambda: context.__exit__(None, None, None))

    return wrapped


def divided(items: Sequence[T], costs: Sequence[float], work: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
    """What `work` makes of `items`, where each rank works on a share of neighbours of about equal cost, or on none."""
    if count() == 1:
        return list(work(items))
    own = items[shares(costs, _count)[_index]]
    return [found for some in together(lambda: list(work(own))) for found in some]


def shares(costs: Sequence[float], among: int) -> list[slice]:
    """Neighbours for each of `among`, cut where the costs so far pass its part; some may be empty."""
    total = sum(costs)
    middles = [(after - cost / 2) * among for after, cost in zip(accumulate(costs), costs, strict=True)]
    owners = [min(among - 1, int(middle / total)) if total else 0 for middle in middles]
    ends = [sum(owner <= n for owner in owners) for n in range(among)]
    return [slice(first, end) for first, end in zip([0, *ends], ends, strict=False)]


def summed(x: Tensor) -> Tensor:
    """The sum of a tensor over all ranks."""
    total = x.clone()
    sum_over_ranks([total])
    return total


def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all ranks."""
    if count() == 1:
        return
    for bucket in _buckets(tensors):
        _sum_together(bucket)


def _buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Neighbours of one type, of `BUCKET` bytes at least where there are so many."""
    bucket: list[Tensor] = []
    size = 0
    for x in tensors:
        if bucket and (size >= BUCKET or x.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(x)
        size += x.numel() * x.element_size()
    if bucket:
        yield bucket


def _sum_together(bucket: Sequence[Tensor]) -> None:
    import torch

    flat = torch.cat([x.detach().reshape(-1) for x in bucket])
    with _reaching_others():
        torch.distributed.all_reduce(flat, group=_thread.group)
    pieces = flat.split_with_sizes([x.numel() for x in bucket])
    for x, piece in zip(bucket, pieces, strict=True):
        x.copy_(piece.view_as(x))


@contextmanager
def _reaching_others() -> Iterator[None]:
    """Turn an error of communication into one line."""
    try:
        yield
    except RuntimeError as error:
        raise _lost(error) from error


@contextmanager
def losses_told() -> Iterator[None]:
    """Turn errors of communication into one line where torch communicates by itself: in passes of shards."""
    try:
        yield
    except RuntimeError as error:
        from torch.distributed import DistError

        if count() > 1 and (isinstance(error, DistError) or "gloo" in str(error)):
            raise _lost(error) from error
        raise


def _lost(error: RuntimeError) -> RankError:
    return RankError(
        f"rank {_index} of {_count}: another rank has ended or cannot be reached ({_first_line(error)}); "
        "run the same command to go on from the last checkpoint"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:120]


def _alone(work: Callable[[], T]) -> T:
    before, _thread.alone = _thread.alone, True
    try:
        return work()
    finally:
        _thread.alone = before


def _nothing() -> Any:
    return None
