"""Every file of a model's and of an adapter's folder cut, flipped and filled with other types, from a seed.

The folder loads with the very weights of its files, or is refused in one line.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_made import LORA, lora, save_adapter
from safetensors.torch import load_file
from tiny_world import save_model, tiny_model

from rlpost.errors import ModelError
from rlpost.policy.adapters import POLICY, adapter_state
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model
from rlpost.policy.policy import Policy

LEAVES: list[Any] = [
    *(None, True, False, 0, -1, 3, 10**12, 1.5, float("nan"), float("inf")),
    *("", "abc", [], ["a"], [1], {}, {"a": 1}, [[[]]], "é" * 50),
]


def leaves(x: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where everything of a JSON value lies; of long mappings and lists, the first few."""
    inside = list(x.items()) if isinstance(x, dict) else list(enumerate(x)) if isinstance(x, list) else []
    for key, value in inside[:40]:
        yield (*path, key)
        yield from leaves(value, (*path, key))


def damage(file: Path, rng: random.Random) -> str:
    """Do something to a file; returns what."""
    data = file.read_bytes()
    how = rng.choice(["cut", "flip", "leaf", "leaf"] if file.suffix == ".json" else ["cut", "flip"])
    if how == "cut":
        size = rng.choice([0, len(data) // 2, len(data) - 1])
        file.write_bytes(data[:size])
        return f"cut to {size}"
    if how == "flip":
        at = rng.randrange(min(len(data), rng.choice([8, 400, len(data)])))
        flipped = data[at] ^ (1 << rng.randrange(8))
        file.write_bytes(data[:at] + bytes([flipped]) + data[at + 1 :])
        return f"byte {at} flipped"
    whole = json.loads(data)
    *above, last = rng.choice(list(leaves(whole)))
    place = whole
    for key in above:
        place = place[key]
    place[last] = rng.choice(LEAVES)
    file.write_text(json.dumps(whole), "utf-8")
    return f"{'.'.join(map(str, [*above, last]))} = {place[last]!r}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    base = save_model(folder / "model", tiny_model(max_position_embeddings=64))
    save_adapter(folder / "adapter", base, lora(target_modules=["q_proj"], modules_to_save=["norm"]))
    return folder


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return adapter_state(policy.model, POLICY) if policy.has_adapter else dict(policy.model.state_dict())


def try_all(source: Path, settings: Model, copies: Path, numbers: range, tally: Callable[..., None]) -> None:
    files = sorted(x for x in source.iterdir() if x.suffix in (".json", ".jinja", ".safetensors"))
    wrong = []
    right = refused = 0
    for number in numbers:
        rng = random.Random(f"{source.name}/{number}")
        folder = shutil.copytree(source, copies / str(number))
        file = folder / rng.choice(files).name
        what = f"{number}: {file.name}: {damage(file, rng)}"
        try:
            found = weights(load_policy(folder, settings))
            of_files = load_file(next(folder.glob("*.safetensors")))
            same = found.keys() == of_files.keys() and all(torch.equal(x, of_files[n]) for n, x in found.items())
            right += same
            wrong += [] if same else [f"{what}: other weights than its file's"]
        except ModelError as error:
            refused += "\n" not in str(error)
            wrong += [f"{what}: {error}"] if "\n" in str(error) else []
        except Exception as error:  # the test is that there is no other
            wrong.append(f"{what}: {type(error).__name__}: {error}")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)
    assert refused > len(numbers) / 4
    assert right
    tally("damaged files", right=right, refused=refused)


@pytest.mark.parametrize(
    ("which", "settings", "numbers"),
    [
        ("model", Model(), range(30)),
        ("adapter", LORA, range(20)),
        pytest.param("model", Model(), range(30, 530), marks=pytest.mark.slow),
        pytest.param("adapter", LORA, range(20, 320), marks=pytest.mark.slow),
    ],
)
def test_damaged_files(
    here: Path, made: Path, tally: Callable[..., None], which: str, settings: Model, numbers: range
) -> None:
    try_all(made / which, settings, here, numbers, tally)
