"""TRL's side of the benchmark: its own trainer, held at the gate by a callback."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import trl
from datasets import load_dataset
from gate import Gate
from peft import LoraConfig
from rewards import words_of_all
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

CLASSES = {
    "sft": (trl.SFTConfig, trl.SFTTrainer),
    "dpo": (trl.DPOConfig, trl.DPOTrainer),
    "grpo": (trl.GRPOConfig, trl.GRPOTrainer),
}


class AtGate(TrainerCallback):
    """Tells each step's numbers and stops at the gate."""

    def __init__(self, gate: Gate, trainer: Any, once: dict[str, float]) -> None:
        self._gate = gate
        self._once = once
        self._losses: list[float] = []
        self._tokens = 0.0
        compute = trainer.compute_loss

        def noted(*given: Any, **named: Any) -> Any:
            found = compute(*given, **named)
            # What Trainer logs is rounded.
            self._losses.append(float((found[0] if isinstance(found, tuple) else found).detach()))
            return found

        trainer.compute_loss = noted

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        """A step's numbers, and once the whole training's."""
        if not logs or "loss" not in logs:
            return
        tokens = float(logs.get("num_tokens", 0.0))
        told = {"length": logs.get("completions/mean_length"), "tokens": tokens - self._tokens}
        self._tokens = tokens
        loss = sum(self._losses) / len(self._losses)
        self._losses.clear()
        self._gate.passed(loss=loss, grad_norm=float(logs["grad_norm"]), **told, **self._once)


def options_of(work: dict[str, Any]) -> dict[str, Any]:
    """What the workload asks of TRL's config; all else is TRL's default, or what `work["trl"]` sets."""
    options: dict[str, Any] = {
        "output_dir": f"{work['folder']}/out",
        "max_steps": work["steps"],
        "learning_rate": work["learning_rate"],
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        # The driver has put the rows into the order in which rlpost draws them.
        "train_sampling_strategy": "sequential",
    }
    if work["kind"] == "grpo":
        options |= {
            "per_device_train_batch_size": work["batch"] * work["group"],
            "num_generations": work["group"],
            "max_completion_length": work["most"],
            "shuffle_dataset": False,
        }
    else:
        options |= {"per_device_train_batch_size": work["batch"], "max_length": 2048}
    return options | work["trl"]


def make_trainer(work: dict[str, Any]) -> Any:
    """TRL's trainer for a workload."""
    config, trainer = CLASSES[work["kind"]]
    given: dict[str, Any] = {}
    if work["kind"] == "grpo":
        given["reward_funcs"] = words_of_all
    if work.get("lora"):
        given["peft_config"] = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return trainer(
        model=AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32),
        args=config(**options_of(work)),
        train_dataset=load_dataset("json", data_files=work["rows"], split="train"),
        processing_class=AutoTokenizer.from_pretrained(work["model"]),
        **given,
    )


def given_logprob(trainer: Any, given: list[dict[str, list[int]]]) -> float:
    """The mean log-probability of given completions, all of one length, as GRPO's loss computes it."""
    ids = torch.tensor([row["prompt"] + row["completion"] for row in given])
    kept = len(given[0]["completion"])
    with torch.no_grad():
        found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), kept)
    return float(found[0].double().mean())


def timed_reference_pass(work: dict[str, Any], once: dict[str, float]) -> None:
    """Note the seconds of the reference's pass over the whole dataset, where DPO is told to make one."""
    compute = trl.DPOTrainer._precompute_ref_logps

    def timed(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        found = compute(*given, **named)
        once.update(once=time.perf_counter() - began, of=work["steps"])
        return found

    trl.DPOTrainer._precompute_ref_logps = timed


def main() -> None:
    work = json.loads(sys.argv[1])
    once: dict[str, float] = {}
    timed_reference_pass(work, once)
    trainer = make_trainer(work)
    if "given" in work:
        once["given_logprob"] = given_logprob(trainer, work["given"])
    trainer.add_callback(AtGate(Gate(), trainer, once))
    trainer.train()


if __name__ == "__main__":
    main()
