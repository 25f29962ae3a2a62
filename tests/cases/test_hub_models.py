"""Models by their name on the hub, from a cache as downloads leave it: what is refused of a folder is refused here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters_made import LORA, lora, save_adapter
from huggingface_hub import constants
from safetensors.torch import load_file
from tiny_world import save_model

from rlpost.errors import ModelError
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model

COMMIT = "0" * 40


@pytest.fixture
def publish(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], None]:
    """Put a folder where a download of this name would lie; nothing is looked for elsewhere."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def do(folder: Path, name: str) -> None:
        repository = here / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)

    return do


def test_a_model(here: Path, publish: Callable[[Path, str], None]) -> None:
    publish(save_model(here / "m"), "somebody/m")
    assert load_policy("somebody/m", LORA).base == "somebody/m"


@pytest.mark.parametrize("kind", ["pickle", "index", "quantised", "adapter"])
def test_what_is_refused(
    here: Path,
    publish: Callable[[Path, str], None],
    tally: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("something was unpickled"))
    folder = save_model(here / "m")
    weights, config = folder / "model.safetensors", folder / "config.json"
    given = json.loads(config.read_text())
    if kind == "adapter":
        folder = save_adapter(here / "a", folder, lora(target_modules=["q_proj"]))
    elif kind == "quantised":
        config.write_text(json.dumps(given | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    else:
        state = load_file(weights)
        torch.save(state, folder / "pytorch_model.bin")
        weights.unlink()
        config.write_text(json.dumps(given | {"use_safetensors": False}))
        if kind == "index":
            names = {"metadata": {}, "weight_map": dict.fromkeys(state, "pytorch_model.bin")}
            (folder / "model.safetensors.index.json").write_text(json.dumps(names))
    publish(folder, "somebody/x")
    with pytest.raises(ModelError) as caught:
        load_policy("somebody/x", Model())
    message = str(caught.value)
    assert "\n" not in message
    words = {
        "pickle": "safetensors",
        "index": "not a safetensors file",
        "quantised": "quantised",
        "adapter": "download it",
    }
    assert words[kind] in message
    tally("model folders refused", refused=1)
