"""TRL's side of the benchmark: its own trainer, held at the gate by a callback."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from datasets import load_dataset
from gate import Gate
from rewards import words_of_all
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


class AtGate(TrainerCallback):
    """Tells each step's loss and stops at the gate."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._loss: float | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        """Of a step."""
        if logs and "loss" in logs:
            self._loss = logs["loss"]
            self._gate.passed(step=state.global_step, loss=self._loss)


def trainer(work: dict[str, Any]) -> Any:
    """TRL's trainer for a workload, at its defaults or with what `work["trl"]` sets."""
    import trl

    prefix = work["kind"].upper()
    options: dict[str, Any] = {
        "output_dir": f"{work['folder']}/out",
        "max_steps": work["steps"],
        "learning_rate": work["learning_rate"],
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": 0,
        "disable_tqdm": True,
    }
    if work["kind"] == "grpo":
        options |= {
            "per_device_train_batch_size": work["batch"] * work["group"],
            "num_generations": work["group"],
            "max_completion_length": work["most"],
            "temperature": 1.0,
            "beta": 0.0,
        }
    else:
        options |= {"per_device_train_batch_size": work["batch"], "max_length": 2048}
    options |= work["trl"]
    dtype = torch.float32
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    given: dict[str, Any] = {}
    if work["kind"] == "grpo":
        given["reward_funcs"] = words_of_all
    if work.get("lora"):
        from peft import LoraConfig

        given["peft_config"] = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return getattr(trl, f"{prefix}Trainer")(
        model=model,
        args=getattr(trl, f"{prefix}Config")(**options),
        train_dataset=load_dataset("json", data_files=work["rows"], split="train"),
        processing_class=tokenizer,
        **given,
    )


def main() -> None:
    work = json.loads(sys.argv[1])
    torch.set_num_threads(2)
    made = trainer(work)
    gate = Gate()
    made.add_callback(AtGate(gate))
    gate.restart()
    made.train()


if __name__ == "__main__":
    main()
