"""How completions are sampled, and by what."""

from collections.abc import Iterator, Sequence
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

VLLM_OWN = (
    *("model", "tokenizer", "revision", "trust_remote_code", "model_impl", "load_format", "hf_overrides"),
    *("logprobs_mode", "generation_config", "weight_transfer_config", "distributed_executor_backend", "worker_cls"),
    *("enable_lora", "max_lora_rank", "max_loras", "max_cpu_loras", "lora_dtype", "enable_sleep_mode"),
    *("gpu_memory_utilization", "enable_prefix_caching", "skip_tokenizer_init", "logits_processors"),
)
"""Arguments of vLLM's that are not for `args`: the run says them, by keys of its own or by what it trains."""
ALONE = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
"""Such that need processes of vLLM's own."""
COOLEST, HOTTEST = 0.01, 2.0
"""Temperatures above 0 that vLLM takes; it raises cooler ones to the first without an error."""

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

    def unlike_vllm(self, where: str) -> Iterator[str]:
        """In what vLLM would sample otherwise than rlpost."""
        t = self.temperature
        if t and not COOLEST <= t <= HOTTEST:
            yield f"{where}.temperature: vLLM takes {COOLEST:g} to {HOTTEST:g}, not {t:g} - use engine: {LOCAL}"
        if t and self.top_p < 1 and self.min_p > 0:
            yield (
                f"{where}.min_p: vLLM filters by it before top_p, and rlpost after - leave out one of the two, or use "
                f"engine: {LOCAL}"
            )


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
        if self.engine in (VLLM, SERVER):
            for key in self.args.keys() & set(VLLM_OWN):
                yield f"{where}.args.{key}: is said by the run itself - remove it"
        if self.engine == VLLM:
            for key in self.args.keys() & set(ALONE):
                yield f"{where}.args.{key}: needs processes of vLLM's own - use engine: {SERVER}"
        yield from _no_addresses(self.urls, where)
        for key in STARTED:
            if self.engine == SERVER and self.urls and not self._is_default(key):
                yield f"{where}.{key}: is for a server that the run starts, and urls names one - remove one of the two"

    def _is_default(self, key: str) -> bool:
        default = type(self).model_fields[key].get_default(call_default_factory=True)
        return bool(getattr(self, key) == default)


class ScoringChoice(Section):
    """An engine that scores what the policy wrote, with a model of its own (docs/engines.md#engines-that-score)."""

    engine: str = SERVER
    """`vllm_server`: vLLM's server, which keeps its own model; or `file.py:function`, which returns an engine of yours
    that has `score`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of that function."""
    urls: list[str] = Field(default_factory=list)
    """Servers that were started with `vllm serve TEACHER`, like `http://localhost:8000`; all of one model."""
    served: str | None = None
    """The model's name there, if a server has several; by default its first."""
    deadline: float = Field(DEADLINE, gt=0)
    """Seconds that a call of your engine, or a server's answer to one request, may take."""
    retries: int = Field(3, ge=0)
    """How often a request to a server is sent again after it failed or was late."""

    @property
    def is_users(self) -> bool:
        """It is an engine of a user's file."""
        return self.engine not in BUILT_IN

    def problems(self, where: str) -> Iterator[str]:
        """Engines that have no model of their own, and keys of the other one."""
        if self.engine in (LOCAL, VLLM):
            yield f"{where}.engine: {self.engine} would score with a model of the run - name that model as the teacher"
            return
        if self.engine == SERVER and not self.urls:
            yield f"{where}.urls: missing - start a server (vllm serve TEACHER), and give its address"
        if self.engine == SERVER and self.args:
            yield f"{where}.args: is for {USERS}, not for {SERVER} - remove it"
        for key in ("urls", "served", "retries"):
            if self.is_users and getattr(self, key) != type(self).model_fields[key].get_default(
                call_default_factory=True
            ):
                yield f"{where}.{key}: is for {SERVER}, not for {self.engine} - remove it"
        yield from _no_addresses(self.urls, where)

    def unlike_vllm(self, temperature: float, where: str) -> Iterator[str]:
        """What a server does not score: another temperature than 1, at which `where` would ask."""
        if self.engine == SERVER and temperature != 1:
            yield (
                f"{where}: vLLM scores given tokens at temperature 1, not {temperature:g} - set it to 1, or use a "
                "teacher that the run loads"
            )


def _no_addresses(urls: Sequence[str], where: str) -> Iterator[str]:
    for number, url in enumerate(urls):
        if not url.startswith(("http://", "https://")):
            yield f"{where}.urls[{number}]: {url!r} is no address - write it like http://localhost:8000"
