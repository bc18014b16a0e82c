"""Output of a training while it runs: a progress bar, a line of JSON per logging step, markers of checkpoints."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from soul_exp import compat
from soul_exp.files import write_atomically


class Progress(TrainerCallback):
    """Shows a bar, writes a line of JSON per logging step to `records`, calls `mark(folder)` for every checkpoint."""

    def __init__(self, label: str, records: Path | None, mark: Callable[[Path], None]) -> None:
        self.label, self.records, self.mark = label, records, mark
        self.bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.label, unit="step", leave=False)
            if self.records is not None and self.records.exists():
                # a resumed run repeats the steps after its checkpoint, and a kill may have cut the last line
                complete = [line for line in self.records.open() if line.endswith("\n")]
                kept = [line for line in complete if json.loads(line)["step"] <= state.global_step]
                write_atomically(self.records, "".join(kept))

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or "forget_loss" not in logs:
            return
        if self.bar is not None:
            shown = ("forget_loss", "retain_loss", "retain_nll")
            self.bar.set_postfix({key: f"{logs[key]:.3g}" for key in shown if key in logs})
        if self.records is not None:
            finite = {key: value if math.isfinite(value) else None for key, value in logs.items()}
            with self.records.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **finite}) + "\n")

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.mark(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


class ContinueWithoutState(TrainerCallback):
    """Starts a training at the step of a checkpoint, with its logged history and learning rate.

    For one without readable optimizer state: the caller reads the weights. Comes before callbacks that read the step.
    """

    def __init__(self, trainer: Trainer, checkpoint: Path, num_steps: int) -> None:
        self.trainer, self.checkpoint, self.num_steps = trainer, checkpoint, num_steps

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **given: Any) -> None:
        before = TrainerState.load_from_json(str(self.checkpoint / TRAINER_STATE_NAME))
        state.global_step, state.epoch, state.log_history = before.global_step, before.epoch, before.log_history
        compat.set_last_logged_step(self.trainer, before.global_step)
        scheduler = given["lr_scheduler"]
        scheduler.load_state_dict(torch.load(self.checkpoint / "scheduler.pt", weights_only=True))
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        state.epoch = state.global_step / self.num_steps  # Trainer counts from where its data begins
