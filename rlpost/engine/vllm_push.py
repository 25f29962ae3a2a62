"""How a server of vLLM is given weights: it reads a folder, and says from then on that it has this version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlpost.engine.vllm_client import Client, Failed, Refused
from rlpost.errors import EngineError

SHARED = "the server must see this folder; where it runs elsewhere, set TMPDIR to a folder that both see"


async def push_weights(client: Client, url: str, deadline: float, folder: Path, name: str) -> None:
    """Let a server read whole weights from `folder` in place of its own, and call them `name`.

    Requests that it works on end first; what it kept of earlier weights is forgotten.

    Raises:
        EngineError: it cannot read them.
        Unanswered: it does not answer.
    """

    async def post(route: str, body: dict[str, Any] | None = None, **params: str) -> Any:
        return await client.ask("POST", url + route, deadline, body, **params)

    reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    try:
        await post("/pause", mode="wait")
        await post("/collective_rpc", reload)
        await post("/update_weight_version", {"new_version": name})
        forgotten = (await post("/reset_prefix_cache")).json()["success"]
        await post("/resume")
    except (Failed, Refused) as error:
        raise EngineError(f"{url}: cannot take the weights in {folder}: {error}; {SHARED}") from error
    if not forgotten:
        raise EngineError(f"{url}: keeps its cache of the earlier weights; give it no requests but this run's")


async def push_adapter(client: Client, url: str, deadline: float, folder: Path, name: str) -> None:
    """Let a server load the adapter in `folder` as the model `name`; one that it has by this name is loaded again.

    Raises:
        EngineError: it cannot read it, or has no room for it.
        Unanswered: it does not answer.
    """
    body = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
    try:
        await client.ask("POST", f"{url}/v1/load_lora_adapter", deadline, body)
    except (Failed, Refused) as error:
        raise EngineError(f"{url}: cannot take the adapter in {folder}: {error}; {SHARED}") from error


async def drop_adapter(client: Client, url: str, deadline: float, name: str) -> None:
    """Let a server forget an adapter.

    Raises:
        Unanswered: it does not answer. Refused: it does not know the adapter.
    """
    await client.ask("POST", f"{url}/v1/unload_lora_adapter", deadline, {"lora_name": name})
