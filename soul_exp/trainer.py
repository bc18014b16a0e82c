"""Unlearning steps: a thin subclass of `transformers.Trainer`; nothing of its loop is written again.

B rows of each part in a micro-batch, T answer positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from soul_exp import models
from soul_exp.data import Collator, Encoded, Part, Stream, seed_of
from soul_exp.errors import UsageError
from soul_exp.losses import IGNORED, Objective, Scored
from soul_exp.models import AnswerReader
from soul_exp.progress import COMPLETE, Progress, last_complete
from soul_exp.reference import Reference, freeze

log = logging.getLogger(__name__)

CURVATURE_PART = "retain"  # influence unlearning's choice: the curvature of what is to be kept


@dataclass(frozen=True)
class Schedule:
    """How long and in what portions to train; every count is of optimizer steps, every size of rows of each part."""

    epochs: float  # passes over the leading part
    batch_size: int  # rows of each part a step, over all processes and accumulation
    micro_batch_size: int | None = None  # rows of each part a forward pass of one process; None: no accumulation
    lr_scheduler: str = "linear"
    lr_scheduler_kwargs: Mapping[str, Any] | None = None
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0
    max_steps: int | None = None  # stop there, whatever `epochs` says
    logging_steps: int = 5
    save_steps: int | None = None  # None: no checkpoints
    diverged_at: float | None = None  # retain loss, as a multiple of max(its start, diverged_floor)
    diverged_floor: float = 0.1  # nats a token: a memorised retain set starts near 0

    def __post_init__(self) -> None:
        if self.save_steps and self.save_steps % self.logging_steps:  # else a resumed run logs another window
            raise UsageError(
                f"train.save_steps={self.save_steps} is not a multiple of train.logging_steps={self.logging_steps}: "
                f"change one of them"
            )

    def num_steps(self, num_rows: int) -> int:
        return self.max_steps or max(1, round(self.epochs * num_rows / self.batch_size))

    def accumulation(self, processes: int) -> int:
        """Micro-batches a process and step; raises UsageError if the sizes do not divide."""
        micro = self.micro_batch_size or self.batch_size // processes
        if not micro or self.batch_size % (micro * processes):
            raise UsageError(
                f"train.batch_size={self.batch_size} is not a multiple of {processes} process(es) x "
                f"train.micro_batch_size={micro}: change one of them"
            )
        return self.batch_size // (micro * processes)


@dataclass(frozen=True)
class Outcome:
    """How a training ended: steps done, seconds, why it diverged (None if it did not), last logged numbers, remarks."""

    num_steps: int
    seconds: float
    diverged: str | None
    last: Mapping[str, float]
    notes: Sequence[str] = ()


class Unlearner(Trainer):
    """Trainer on named parts: one forward pass for all parts of a micro-batch, terms logged apart, curvature passes."""

    objective: Objective

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: TrainingArguments,
        stream: Stream,
        objective: Objective,
        make_optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Schedule,
        reader: AnswerReader,
        reference: Reference,
        pad_id: int,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=stream,
            data_collator=Collator(pad_id),
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # our loss is a mean over sequences: let Trainer divide by accumulation
        self.stream, self.objective, self.make_optimizer = stream, objective, make_optimizer
        self.schedule, self.reader, self.reference = schedule, reader, reference
        self.diverged: str | None = None
        self._terms = torch.zeros(3, dtype=torch.float64)  # sums of forget and retain term, number of micro-batches

    # --- the loss -------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        forget, retain = self.objective.terms(self._available(model, inputs))
        self._terms += torch.stack(
            [forget.detach(), (retain if retain is not None else forget).detach(), torch.ones_like(forget)]
        ).to("cpu", torch.float64)
        return self.objective.total(forget, retain)

    def _available(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Everything that a term may name: each part scored by the model, and what the frozen start said of it."""
        batch = self._rows_of(inputs, self.objective.parts)
        logits = self.reader(model, batch)
        size = self.args.per_device_train_batch_size
        blocks = {part: slice(i * size, (i + 1) * size) for i, part in enumerate(self.objective.parts)}
        rows = {part: batch["rows"][block] for part, block in blocks.items()}
        available: dict[str, Any] = {
            part: Scored(logits[block], batch["labels"][block]) for part, block in blocks.items()
        }
        available["reference_nll"] = self.reference.nll_of(rows)
        available["reference_logits"] = self.reference.logits_of(rows, batch["labels"].shape[1])
        return available

    def _rows_of(self, inputs: dict[str, Tensor], parts: Sequence[str]) -> dict[str, Tensor]:
        """The micro-batch cut down to `parts`, with the padding that only the others needed taken off."""
        size = self.args.per_device_train_batch_size
        order = list(self.stream.order)
        if list(parts) == order:
            return inputs
        index = torch.cat([torch.arange(order.index(p) * size, (order.index(p) + 1) * size) for p in parts])
        chosen = {key: value[index.to(value.device)] for key, value in inputs.items()}
        length, width = int(chosen["attention_mask"].sum(1).max()), int((chosen["labels"] != IGNORED).sum(1).max())
        limits = {"input_ids": length, "attention_mask": length, "positions": width, "labels": width}
        return {key: value[:, : limits[key]] if key in limits else value for key, value in chosen.items()}

    # --- the optimizer and its curvature --------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        # not Trainer(optimizers=...): DeepSpeed's initialisation replaces that by AdamW without a word
        if self.optimizer is None:
            module = model if model is not None else self.model
            assert module is not None
            decayed = set(self.get_decay_parameter_names(module))
            named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
            groups: list[dict[str, Any]] = [
                {"params": [p for name, p in named if name in decayed]},
                {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
            ]
            self.optimizer = self.make_optimizer([group for group in groups if group["params"]])
        assert self.optimizer is not None
        return self.optimizer

    @property
    def base_optimizer(self) -> Any:
        """Our own optimizer, under whatever accelerate and DeepSpeed have wrapped around it."""
        optimizer: Any = self.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        return optimizer

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """All micro-batches of the next step: where a due curvature pass sees them all, no gradient pending."""
        samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        optimizer = self.base_optimizer
        wanted = getattr(optimizer, "estimator", None) == "gnb" and self.state.global_step % optimizer.interval == 0
        if samples and wanted:
            self._refresh_curvature(samples)
        return samples, count

    def _refresh_curvature(self, samples: Sequence[dict[str, Tensor]]) -> None:
        """One Gauss-Newton-Bartlett estimate: the squared gradient of `sum_t sqrt(w_t) CE(z_t, y_t)`, y_t sampled.

        `w_t = 1 / (S n_i)` is label t's weight in the mean over the S sequences of all micro-batches and ranks, whose
        gradients are summed before the square. Dropout off, no clipping. Parameters, momentum and schedule stay.
        """
        model: Any = self.model_wrapped
        engine = getattr(self, "deepspeed", None)
        world = self.args.world_size
        num_sequences = len(samples) * self.args.per_device_train_batch_size * world
        model.eval()
        for i, sample in enumerate(samples):
            last = i == len(samples) - 1
            batch = self._prepare_inputs(self._rows_of(sample, [CURVATURE_PART]))
            with contextlib.nullcontext() if last or engine or world == 1 else model.no_sync():
                logits = self.reader(model, batch).float()
                labels = self._sampled_labels(logits.detach(), batch)
                ce = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
                num_tokens = (batch["labels"] != IGNORED).sum(1, keepdim=True)
                # ranks' gradients are averaged by the engine, and the estimate wants their sum
                loss = world * (ce * (1 / (num_sequences * num_tokens)).sqrt()).sum()
                if engine is not None:
                    engine.set_gradient_accumulation_boundary(last)
                    engine.backward(loss, scale_wrt_gas=False)
                else:
                    loss.backward()
        with self.base_optimizer.refreshing():
            if engine is None:
                self.base_optimizer.step()
                self.base_optimizer.zero_grad()
            else:  # not engine.step(), which advances counters and schedule; and never clipped
                clip, engine.optimizer.clip_grad = engine.optimizer.clip_grad, 0.0
                try:
                    engine.optimizer.step()
                    engine.optimizer.zero_grad()
                finally:
                    engine.optimizer.clip_grad = clip
        model.train()

    def _sampled_labels(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """[B, T] labels drawn from softmax(`logits`) by numbers keyed by seed, step and row; -100 where padded."""
        uniform = torch.zeros(logits.shape[:2])
        for i, row in enumerate(batch["rows"].tolist()):
            generator = torch.Generator().manual_seed(seed_of("gnb", self.args.seed, self.state.global_step, row))
            count = int((batch["labels"][i] != IGNORED).sum())
            uniform[i, :count] = torch.rand(count, generator=generator)
        cumulative = logits.softmax(-1).cumsum(-1)
        wanted = uniform.to(logits.device)[..., None] * cumulative[..., -1:]
        drawn = torch.searchsorted(cumulative, wanted, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
        return torch.where(batch["labels"] != IGNORED, drawn, IGNORED)

    # --- what is logged -------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's numbers, and forget and retain loss apart, means over steps and ranks; `win_rate` where defined."""
        if "loss" in logs:
            terms = self._sum_over_ranks(self._terms)
            self._terms = torch.zeros_like(self._terms)
            logs["forget_loss"] = float(terms[0] / terms[2])
            if self.objective.retain_function is not None:
                logs["retain_loss"] = float(terms[1] / terms[2])
            if hasattr(self.base_optimizer, "counts"):
                won, untouched, total = self._sum_over_ranks(self.base_optimizer.counts()).tolist()
                logs |= {"win_rate": won / total, "untouched": untouched / total}
            self._stop_if_diverged(logs)
        super().log(logs, start_time)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.args.world_size > 1:
            values = values.to(self.args.device)
            dist.all_reduce(values)
        return values

    def _stop_if_diverged(self, logs: Mapping[str, float]) -> None:
        limit, floor = self.schedule.diverged_at, self.schedule.diverged_floor
        finite = all(math.isfinite(logs[key]) for key in ("loss", "forget_loss"))
        history = [entry["retain_loss"] for entry in self.state.log_history if "retain_loss" in entry]
        if not finite:
            self.diverged = f"the loss is {logs['loss']} at step {self.state.global_step}"
        elif limit is not None and history and logs["retain_loss"] > limit * max(history[0], floor):
            self.diverged = (
                f"the retain loss is {logs['retain_loss']:.3g} at step {self.state.global_step}, above "
                f"{limit:g} x max({history[0]:.3g} at the start, {floor:g})"
            )
        if self.diverged:
            self.control.should_training_stop = True


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
) -> Outcome:
    """Train `model` in place on `parts`, resuming from the last complete checkpoint in `folder`.

    `parts` maps each part that the objective or the curvature names to its rows and their tokens, one entry a wording.
    """
    leader = next(iter(parts))
    num_steps = schedule.num_steps(len(parts[leader][0].rows))
    accumulation = schedule.accumulation(processes)
    stream = Stream(parts, num_steps=num_steps, batch_size=schedule.batch_size, seed=seed)
    wanted = [name for name in objective.names if name.startswith("reference_")]
    models.move(model, device)
    reference = freeze(model, reader, stream, wanted, objective.parts, pad_id)
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
        save_total_limit=2,  # two, because the older one goes before the newer one is marked complete
        seed=seed,
        use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and processes > 1 else None,
        dataloader_pin_memory=device != "cpu",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        deepspeed=dict(deepspeed) if deepspeed else None,
    )
    if args.n_gpu > 1:  # one process, one device: the parts of a batch must not be dealt out by DataParallel
        args._n_gpu = 1
    checkpoint = last_complete(folder)
    if checkpoint:
        log.info("%s: resuming from %s", label, checkpoint.name)
    seconds_before = float((checkpoint / COMPLETE).read_text()) if checkpoint else 0.0  # spent before the interruption
    progress = Progress(label, records, seconds_before)
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
        callbacks=[progress, *callbacks],
    )
    start = progress.start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    logged = [entry for entry in trainer.state.log_history if "forget_loss" in entry]
    return Outcome(
        trainer.state.global_step,
        seconds_before + time.perf_counter() - start,
        trainer.diverged,
        logged[-1] if logged else {},
    )
