"""How completions are sampled, and by what."""

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from rlpost.section import Section
from rlpost.usercode.params import Lookup

LOCAL = "local"
"""The name of the engine that decodes with the policy's own model."""
VLLM = "vllm"
"""The name of vLLM in the trainer's process."""
SERVER = "vllm_server"
"""The name of vLLM's server."""
USERS = "file.py:function"
"""How an engine of a user's file is named."""
BUILT_IN = (LOCAL, VLLM, SERVER)
CACHE_GIB = 2.0
MEMORY_SHARE = 0.4
GAP_LIMIT = 0.05
DEADLINE = 900.0
"""Seconds after which a call of a user's engine, or a request to a server, counts as hanging."""
KEYS = {
    "args": (USERS, VLLM, SERVER),
    "deadline": (USERS, SERVER),
    "cache_gib": (LOCAL, VLLM, SERVER),
    "fused": (LOCAL,),
    "memory_share": (VLLM, SERVER),
    "prefix_caching": (VLLM, SERVER),
    "sleep": (VLLM,),
    "merge_adapter": (VLLM, SERVER),
    "urls": (SERVER,),
    "program": (SERVER,),
    "devices": (SERVER,),
    "retries": (SERVER,),
    "staleness": (LOCAL, SERVER),
}
"""Keys that are not for every engine, and the engines they are for."""
STARTED = ("args", "cache_gib", "memory_share", "prefix_caching", "program", "devices")
"""Keys of a server that the run starts."""

ENGINE = Lookup("engine", "", ("policy",), by_name=True, key="engine")


class Sampling(Section):
    """How completions are sampled."""

    max_new_tokens: int = Field(256, ge=1)
    """Tokens of a completion, at most."""
    temperature: float = Field(1.0, gt=0)
    """Logits are divided by this."""
    top_k: int = Field(0, ge=0)
    """Keep the k likeliest tokens; 0: all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the smallest set of likeliest tokens with this mass."""
    min_p: float = Field(0.0, ge=0, lt=1)
    """Keep tokens at least this many times as likely as the likeliest."""
    stop: list[str] = Field(default_factory=list)
    """Texts that end a completion and are left out of it."""

    def problems(self, where: str) -> Iterator[str]:
        """A text that every completion contains."""
        if "" in self.stop:
            yield f"{where}.stop: an empty string stops every completion at once - remove it"


class EngineChoice(Section):
    """What samples completions (docs/engines.md)."""

    engine: str = LOCAL
    """`local`: the policy's own model in its own process; `vllm`: vLLM in the same process; `vllm_server`: vLLM's
    server; or `file.py:function`, which returns an engine of yours."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of that function; with `vllm` or a server that is started for the run, further ones of
    vLLM's `EngineArgs`."""
    deadline: float | None = Field(None, gt=0)
    """Seconds that a call of your engine, or a server's answer to one request, may take (900 by default)."""
    cache_gib: float = Field(CACHE_GIB, ge=0)
    """GiB of memory in which the local engine keeps what it has computed, for later turns and for completions that are
    gone on from; 0: none. On a CPU, the memory of vLLM's cache."""
    fused: bool = True
    """The local engine decodes on weights that it packs once an update, where that is exact; false: by the model's own
    forward (docs/how-it-works.md#the-fused-decoding-step)."""
    memory_share: float = Field(MEMORY_SHARE, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes for its weights and its cache."""
    prefix_caching: bool = True
    """vLLM computes a prompt once for its completions, and an episode's earlier turns once."""
    sleep: bool = True
    """`vllm` gives its GPU memory back while the policy trains."""
    merge_adapter: bool = False
    """vLLM is handed whole weights with the adapter merged into them, instead of the adapter."""
    urls: list[str] = Field(default_factory=list)
    """Servers that were started with `vllm serve`, like `http://localhost:8000`; none: one is started for the run."""
    program: str = "vllm"
    """The `vllm` command that starts a server for the run."""
    devices: list[int] = Field(default_factory=list)
    """GPUs of a server that is started for the run; by default those without a process of the run, or all."""
    retries: int = Field(3, ge=0)
    """How often a request to a server is sent again after it failed or was late."""
    staleness: int = Field(0, ge=0)
    """Steps by which sampling is ahead of training: step t learns from samples of version max(0, t - staleness) of the
    weights, drawn while earlier steps train; 0: each waits for the other."""
    gap_limit: float = Field(GAP_LIMIT, gt=0)
    """Mean difference between the sampler's log-probabilities and the trainer's, in nats a token, beyond which the run
    warns."""

    @property
    def is_users(self) -> bool:
        """It is an engine of a user's file."""
        return self.engine not in BUILT_IN

    @property
    def own_numerics(self) -> bool:
        """Its log-probabilities are those that training computes."""
        return self.engine == LOCAL and not self.staleness

    def problems(self, where: str) -> Iterator[str]:
        """Keys of other engines."""
        for key, engines in KEYS.items():
            if not self._is_default(key) and (USERS if self.is_users else self.engine) not in engines:
                yield f"{where}.{key}: is for {' or '.join(engines)}, not for {self.engine} - remove it"
        for key in STARTED:
            if self.engine == SERVER and self.urls and not self._is_default(key):
                yield f"{where}.{key}: is for a server that the run starts, and urls names one - remove one of the two"

    def _is_default(self, key: str) -> bool:
        default = type(self).model_fields[key].get_default(call_default_factory=True)
        return bool(getattr(self, key) == default)
