"""The state of every random generator that training, or a function of the user's, may draw from."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from rlpost import ranks


@contextmanager
def random_state_kept() -> Iterator[None]:
    """What is drawn inside changes nothing that is drawn afterwards."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


def random_states() -> dict[str, Tensor]:
    """Of all ranks, as a checkpoint holds them; they differ where there is dropout: each rank drops in its share."""
    first, *others = ranks.together(random_state)
    return first | {f"rank{n}/{key}": x for n, state in enumerate(others, 1) for key, x in state.items()}


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Restore this rank's of what `random_states` returned; one that was not there takes the first rank's."""
    prefix = f"rank{ranks.index()}/"
    own = {key.removeprefix(prefix): x for key, x in states.items() if key.startswith(prefix)}
    set_random_state(own or states)


def random_state() -> dict[str, Tensor]:
    """Of this process."""
    version, internal, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    state = {
        "cpu": torch.get_rng_state(),
        "python": torch.tensor([version, *internal]),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
        "numpy_place": torch.tensor([numpy["state"]["pos"], numpy["has_gauss"]]),
        "numpy_gauss": torch.tensor([numpy["gauss"]], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    version, *internal = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(internal), gauss[0] if gauss else None))
    position, has_gauss = state["numpy_place"].tolist()
    key = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, position, has_gauss, state["numpy_gauss"].item()))
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(
            [state[f"cuda{i}"] for i in range(torch.cuda.device_count()) if f"cuda{i}" in state]
        )
