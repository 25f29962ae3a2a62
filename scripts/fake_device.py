"""A device without memory: tensors on it have a shape, a type and a place, and no numbers.

An operation that mixes it with the CPU is refused as a GPU refuses it, forward, backward and in the optimiser's step.
What a program reads from it (`.item()`, `.cpu()`, a comparison in an `if`, a mask used as an index) would make it wait
for a GPU: `Watch` answers with ones and notes where it was asked. Tensors on the CPU are real all the time.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from traceback import walk_stack, walk_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fakegpu"
PACKAGE = str(Path(__file__).parents[1] / "rlpost")
aten = torch.ops.aten
Answer = Callable[..., Any]


class _Module:
    """What PyTorch asks of a device's module."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """It draws nothing."""


def register() -> torch.device:
    """Make the device known to PyTorch, which is forever: for a process of its own."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    return torch.device(NAME, 0)


def without_driver() -> torch.device:
    """`cuda` of a build of PyTorch for it, where there is no driver to ask; for a process of its own."""
    torch.cuda._lazy_init = lambda: None  # type: ignore[assignment]
    Tensor.pin_memory = lambda x, *_: x  # type: ignore[method-assign]
    # Autocast asks for a GPU that has bfloat16.
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    return torch.device("cuda", 0)


class Watch:
    """Inside it, tensors can be on the device; says what a GPU would have been waited for, and where."""

    def __init__(self, device: torch.device) -> None:
        """`device`: what `register` returned, or `cuda` in a build of PyTorch for it, which then runs no backward."""
        self.device = device
        self.waits: Counter[str] = Counter()
        """Times that a place of the package, or what it called, read the device."""
        self.copies: Counter[str] = Counter()
        """Times that it waited for a copy to the device."""
        self.fake = FakeTensorMode()

    def __enter__(self) -> Watch:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) is a copy that can be seen
        torch.autograd.set_multithreading_enabled(False)
        # Its own reads number after number.
        FakeTensor.tolist = lambda x: x.cpu().tolist()  # type: ignore[method-assign]
        self._mode = _Operations(self)
        self._mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._mode.__exit__(*error)
        torch.autograd.set_multithreading_enabled(True)
        torch._C._set_only_lift_cpu_tensors(False)

    def run(self, operation: Any, args: Any, kwargs: Any) -> Any:
        """The shapes, types and places of an operation's results; real tensors among its inputs lose their numbers."""

        def without_numbers(x: Any) -> Any:
            return self.fake.from_tensor(x) if isinstance(x, Tensor) and not isinstance(x, FakeTensor) else x

        if any(isinstance(x, Tensor) and not isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            args, kwargs = tree_map(without_numbers, (tuple(args), dict(kwargs)))
        with self.fake:
            return operation(*args, **kwargs)

    def moved(self, x: Tensor) -> Tensor:
        """A tensor of the CPU on the device."""
        found: Tensor = self.run(aten._to_copy.default, (x,), {"device": self.device})
        return found

    def clear(self) -> None:
        """Forget what was noted."""
        self.waits.clear()
        self.copies.clear()

    def placed(self, model: nn.Module) -> nn.Module:
        """The model with its weights on the device."""
        for module in model.modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    module._parameters[name] = nn.Parameter(p.detach().to(self.device), p.requires_grad)
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)
        # A tied head is the same parameter as before.
        getattr(model, "tie_weights", lambda: None)()
        return model


class _Operations(TorchDispatchMode):
    """Runs operations on the device without numbers, and notes those that read it."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target).type == self._watch.device.type
        on_device = any(isinstance(x, FakeTensor) for x in tensors)
        if not (to_device or on_device):
            return func(*args, **kwargs)
        answer = _ANSWERS.get(func)
        if answer is not None:
            found = answer(self._watch, *args, **kwargs)
            if found is not NotImplemented:
                return found
        return self._watch.run(func, args, kwargs)


def where(error: BaseException | None = None) -> str:
    """The innermost line of the package that is running, or that an error went through."""
    steps = walk_tb(error.__traceback__) if error is not None else walk_stack(sys._getframe(1))
    found = [(f.f_code, line) for f, line in steps if f.f_code.co_filename.startswith(PACKAGE)]
    if not found:
        return "outside the package"
    code, line = found[-1] if error is not None else found[0]
    return f"{Path(code.co_filename).relative_to(Path(PACKAGE).parent)}:{line} {code.co_name}"


def _scalar(watch: Watch, x: Tensor) -> Any:
    watch.waits[where()] += 1
    return torch.ones((), dtype=x.dtype).item()


def _copied(watch: Watch, x: Tensor, **to: Any) -> Any:
    target = to.get("device")
    if target is None or torch.device(target).type == x.device.type:
        return NotImplemented
    if torch.device(target).type == "cpu":
        watch.waits[where()] += 1
        return torch.ones(x.shape, dtype=to.get("dtype") or x.dtype)
    if not to.get("non_blocking"):
        watch.copies[where()] += 1
    return NotImplemented


def _copied_into(watch: Watch, into: Tensor, x: Tensor, non_blocking: bool = False) -> Any:
    if into.device.type == x.device.type:
        return NotImplemented
    if isinstance(into, FakeTensor):
        if not non_blocking:
            watch.copies[where()] += 1
        return into
    watch.waits[where()] += 1
    return into.fill_(1)


def _nonzero(watch: Watch, x: Tensor) -> Tensor:
    watch.waits[where()] += 1
    return watch.moved(torch.ones(x.shape).nonzero())


def _indexed(operation: Any) -> Answer:
    """A mask among the indices is taken to be true everywhere."""

    def answer(watch: Watch, x: Tensor, indices: Sequence[Tensor | None], *more: Any) -> Any:
        found: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                if isinstance(index, Tensor) and index.device.type != x.device.type:
                    watch.copies[where()] += 1  # it is moved, and waited for
                    index = (
                        watch.moved(index) if isinstance(x, FakeTensor) else torch.zeros(index.shape, dtype=index.dtype)
                    )
                found.append(index)
                continue
            watch.waits[where()] += 1
            every = watch.moved(torch.ones(index.shape).nonzero())
            found += list(every.unbind(1))
        return watch.run(operation, (x, found, *more), {})

    return answer


def _repeats(watch: Watch, repeats: Tensor, output_size: int | None = None) -> Any:
    if output_size is not None:
        return NotImplemented
    watch.waits[where()] += 1
    return watch.moved(torch.arange(len(repeats)))


def _equal(watch: Watch, *_: Tensor) -> bool:
    watch.waits[where()] += 1
    return True


_ANSWERS: dict[Any, Answer] = {
    aten._local_scalar_dense.default: _scalar,
    aten._to_copy.default: _copied,
    aten.copy_.default: _copied_into,
    aten.nonzero.default: _nonzero,
    aten.index.Tensor: _indexed(aten.index.Tensor),
    aten.index_put_.default: _indexed(aten.index_put_.default),
    aten.index_put.default: _indexed(aten.index_put.default),
    aten.repeat_interleave.Tensor: _repeats,
    aten.equal.default: _equal,
}
