"""One training, from its start or its last checkpoint to its end, and what it shows and writes meanwhile."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from soul_exp import compat
from soul_exp.data import Encoded, Part
from soul_exp.distributed import zero3
from soul_exp.errors import UsageError
from soul_exp.files import write_atomically
from soul_exp.losses import Objective, Scored
from soul_exp.models import loading, saving
from soul_exp.models.layers import AnswerReader, recomputing
from soul_exp.training import checkpoints
from soul_exp.training.capabilities import takes_one_step
from soul_exp.training.reference import compute_reference
from soul_exp.training.schedule import Schedule
from soul_exp.training.stream import Stream
from soul_exp.training.trainer import Unlearner

log = logging.getLogger(__name__)


def _fit(train: Scored) -> Tensor:
    """The mean NLL per answer token."""
    return train.mean_nll.mean()


FINE_TUNING = Objective(_fit, retain_term=None)  # of one part, "train"


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    num_steps: int
    seconds: float  # over all starts of the run
    diverged: str | None  # why, if it did
    last: Mapping[str, float]  # the last logged numbers
    notes: Sequence[str] = ()  # for the reader of the results
    passes: Mapping[str, float] = field(default_factory=dict)  # as `curvature.passes_per_step` counts them


def train(
    model: PreTrainedModel,
    reader: AnswerReader,
    parts: Mapping[str, tuple[Part, Sequence[Encoded]]],
    *,
    objective: Objective,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    schedule: Schedule,
    seed: int,
    pad_id: int,
    folder: Path,
    label: str,
    records: Path | None = None,
    device: str = "cpu",
    deepspeed: Mapping[str, Any] | None = None,
    processes: int = 1,
    callbacks: Sequence[TrainerCallback] = (),
    compute: str = "cpu",
    resume: str = "exact",
) -> Outcome:
    """Train `model` in place on `parts`, resuming from the last complete checkpoint in `folder`.

    `parts` maps each part that the objective or the curvature names to its rows and their tokens, one entry for each
    wording; epochs count passes over the first part. Raises UsageError for a checkpoint of another engine than
    `compute` with `processes`, and for a pickled one that another user could have written, unless `resume` is
    "weights": then only its weights are read.
    """
    engine = checkpoints.engine_of(compute, processes, deepspeed)
    found = checkpoints.last_complete(folder)
    reason = checkpoints.obstacle(folder, found, engine) if found else None
    if reason and resume != "weights":
        raise UsageError(reason)
    other = found if reason else None  # only its weights are read
    leading, _ = next(iter(parts.values()))
    if takes_one_step(make_optimizer):
        schedule = schedule.in_one_step(len(leading.rows))
    num_steps = schedule.num_steps(len(leading.rows))
    if found and found.diverged:  # it stopped there
        num_steps = found.step
    stream = Stream(parts, num_steps=num_steps, batch_size=schedule.batch_size, seed=seed)
    wanted = [name for name in objective.names if name.startswith("reference_")]
    loading.move(model, device)
    reference = compute_reference(model, reader, stream, wanted, objective.parts, pad_id, objective.layer)
    before = zero3.weight_sums(model)
    args = _arguments(schedule, num_steps, folder, seed, device, deepspeed, processes, model)
    seconds_before, notes = (found.seconds, list(found.notes)) if found else (0.0, list[str]())
    if found:
        pickled = ", whose optimizer state DeepSpeed unpickles" if deepspeed and not other else ""
        log.info("%s: resuming from %s%s%s", label, "the weights of " if other else "", found.path.name, pickled)
    if other:
        name, wrote = other.path.name, other.engine
        notes.append(f"continued from the weights of {name} of {wrote}: momentum and curvature started anew there")

    def mark(checkpoint: Path) -> None:
        spent = seconds_before + time.perf_counter() - start
        checkpoints.mark_complete(checkpoint, spent, engine, trainer.diverged, notes)

    stream.start = other.step if other else 0
    trainer = Unlearner(
        model=model,
        args=args,
        stream=stream,
        objective=objective,
        make_optimizer=make_optimizer,
        schedule=schedule,
        reader=reader,
        reference=reference,
        pad_id=pad_id,
    )
    trainer.diverged = found.diverged if found else None
    if other:
        trainer.add_callback(ContinueWithoutState(trainer, other.path, num_steps))
        saving.read_weights(model, other.path)
    for callback in (Progress(label, records, mark), *callbacks):
        trainer.add_callback(callback)
    start = time.perf_counter()
    if other and other.step >= num_steps:  # no step is left
        trainer.state = TrainerState.load_from_json(str(other.path / TRAINER_STATE_NAME))
    else:
        _take_steps(trainer, model, found.path if found and not other else None)
    notes += [*trainer.notes, *([_unchanged(args, compute)] if zero3.weight_sums(model) == before else [])]
    done = trainer.passes
    _release(trainer)
    seconds = seconds_before + time.perf_counter() - start
    last = next((entry for entry in reversed(trainer.state.log_history) if "forget_loss" in entry), {})
    return Outcome(trainer.state.global_step, seconds, trainer.diverged, last, notes, done)


def _take_steps(trainer: Unlearner, model: PreTrainedModel, checkpoint: Path | None) -> None:
    """Train from the start, or from all of the state in `checkpoint`, to the end or until the training diverges."""
    memory = recomputing(model) if trainer.schedule.gradient_checkpointing else contextlib.nullcontext()
    try:
        with zero3.run_by_engine(model), memory:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            trainer.check_end()
    except FloatingPointError as error:  # of an optimizer that cannot continue
        trainer.diverged = str(error)


def _arguments(
    schedule: Schedule,
    num_steps: int,
    folder: Path,
    seed: int,
    device: str,
    deepspeed: Mapping[str, Any] | None,
    processes: int,
    model: nn.Module,
) -> TrainingArguments:
    """The arguments of transformers' Trainer: how it takes steps; it neither prints nor evaluates."""
    accumulation = schedule.accumulation(processes)
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=schedule.batch_size // (processes * accumulation),
        gradient_accumulation_steps=accumulation,
        max_steps=num_steps,
        train_sampling_strategy="sequential",
        lr_scheduler_type=schedule.lr_scheduler,
        lr_scheduler_kwargs=dict(schedule.lr_scheduler_kwargs or {}),
        warmup_steps=math.ceil(schedule.warmup_ratio * num_steps),
        max_grad_norm=schedule.max_grad_norm,
        logging_first_step=True,
        logging_steps=schedule.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps" if schedule.save_steps else "no",
        save_steps=schedule.save_steps or 500,
        seed=seed,
        use_cpu=device == "cpu",
        bf16=bool(deepspeed and deepspeed.get("bf16", {}).get("enabled")),  # ZeRO's own; elsewhere no autocast
        ddp_backend="gloo" if device == "cpu" and processes > 1 else None,
        ddp_find_unused_parameters=any("expert" in name for name, _ in model.named_modules()),  # no row need reach one
        dataloader_pin_memory=device != "cpu",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],  # else it might start a wandb run of its own
        deepspeed=dict(deepspeed) if deepspeed else None,
    )
    compat.use_one_device(args)
    return args


def _unchanged(args: TrainingArguments, compute: str) -> str:
    """The note on a training that has changed no weight: the cause, and what to type."""
    section, rate = ("prepare", "prepare.adamw.lr") if compute == "prepare" else ("train", "optimizer.lr")
    if args.max_steps == 1 and args.warmup_steps:
        why = f"its one step is the warm-up's first, whose learning rate is 0: type {section}.warmup_ratio=0"
    else:
        why = f"the learning rate is 0, or its updates are lost in rounding: raise {rate}"
    return f"no weight changed in {args.max_steps} step(s): {why}, or take more steps"


def _release(trainer: Unlearner) -> None:
    """Free the memory of the engine and the optimizer; the model's weights stay as they are."""
    engine = trainer.deepspeed
    if engine is not None:
        engine.destroy()  # its buffers
        for name in ("optimizer", "basic_optimizer", "client_optimizer"):  # the model's hooks keep the rest of it alive
            setattr(engine, name, None)
        compat.forget_zero3_optimizer(trainer.model)
    trainer.accelerator.free_memory()  # it holds on to wrapped models and optimizers


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
