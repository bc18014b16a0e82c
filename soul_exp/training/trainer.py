"""Unlearning steps: a thin subclass of `transformers.Trainer`; nothing of its loop is written again.

B rows of each part in a micro-batch, T answer positions, H hidden size, V vocabulary.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from soul_exp import compat
from soul_exp.data import seed_of, some_rows
from soul_exp.distributed import ranks
from soul_exp.losses import Objective, Scored, grad_ascent
from soul_exp.models import lora, saving
from soul_exp.models.layers import AnswerReader, parameter_groups
from soul_exp.optim.kernels import STATISTICS
from soul_exp.training import curvature, passes
from soul_exp.training.capabilities import Capabilities, StepSums, capabilities
from soul_exp.training.passes import Step
from soul_exp.training.reference import Reference
from soul_exp.training.schedule import Schedule
from soul_exp.training.statistics import ComparedSums, logged_statistics, sign_descent_note
from soul_exp.training.stream import Stream, collated

log = logging.getLogger(__name__)

NEWTON = "one Newton step of this loss: influence unlearning proper has loss=grad_ascent"


class Unlearner(compat.OwnCheckpointReading, Trainer):
    """Trainer on named parts: one forward pass for all parts of a micro-batch, terms logged apart, curvature passes."""

    model: PreTrainedModel
    objective: Objective
    deepspeed: Any  # DeepSpeed's engine; None without it

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
    ) -> None:
        collate = functools.partial(collated, pad_id=pad_id)
        super().__init__(model=model, args=args, train_dataset=stream, data_collator=collate)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # our loss is a mean over sequences: let Trainer divide by accumulation
        self.stream, self.objective, self.make_optimizer = stream, objective, make_optimizer
        self.schedule, self.reader, self.reference = schedule, reader, reference
        self.pad_id = pad_id
        self.diverged: str | None = None
        self.capabilities = Capabilities()  # of the optimizer, once there is one
        self.sums: StepSums | None = None  # of the optimizer's steps
        self._before: dict[str, float] = {}  # numbers of the step about to be logged, of the weights before it
        self._probed_loss: Tensor | None = None  # the mean loss that a zeroth-order step has measured
        self._terms = torch.zeros(3, dtype=torch.float64)  # sums of forget and retain term, number of micro-batches

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        self._set_mode(model)
        forget, retain = self.objective.terms(self._term_inputs(model, inputs))
        seen = torch.stack([forget, retain if retain is not None else forget, torch.ones_like(forget)]).detach()
        self._terms = self._terms.to(seen.device) + seen.double()  # not to the CPU, which would wait for the device
        return self.objective.total(forget, retain)

    def _set_mode(self, model: nn.Module) -> None:
        """Dropout as the schedule and the adapter say where a gradient is taken, and none where a loss is compared.

        An influence optimizer's step and Hessian are of one function, and so are the losses of a zeroth-order step.
        """
        random = torch.is_grad_enabled() and self.capabilities.row_gradients is None
        model.train(random and self.schedule.dropout)
        if random:
            lora.train_dropout(model)

    def _term_inputs(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Everything that a term may name: each part scored by the model, and the reference's outputs for it."""
        batch = self._cut_to(inputs, self.objective.parts)
        hidden: Tensor | None = None
        if self.objective.reads_hidden:
            logits, hidden = self.reader.with_layer(model, batch, self.objective.layer)
            # engines wait for a gradient of every weight: those above the layer get 0
            hidden = hidden + 0 * logits[:, 0, 0].sum()
        else:
            logits = self.reader(model, batch)
        size = self.args.per_device_train_batch_size
        blocks = {part: slice(i * size, (i + 1) * size) for i, part in enumerate(self.objective.parts)}
        rows = {part: batch["rows"][block] for part, block in blocks.items()}
        return {
            **{part: Scored(logits[block], batch["labels"][block]) for part, block in blocks.items()},
            **({} if hidden is None else {"hidden": {part: hidden[block] for part, block in blocks.items()}}),
            **self.reference.outputs(rows, batch["labels"].shape[1]),
        }

    def _cut_to(self, inputs: dict[str, Tensor], parts: Sequence[str]) -> dict[str, Tensor]:
        """The rows of `parts` of a micro-batch, without the padding that only other rows needed."""
        size = self.args.per_device_train_batch_size
        order = list(self.stream.order)
        if list(parts) == order:
            return inputs
        index = torch.cat([torch.arange(order.index(p) * size, (order.index(p) + 1) * size) for p in parts])
        return some_rows(inputs, index)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        # not Trainer(optimizers=...): DeepSpeed's initialisation silently replaces that by AdamW
        if self.optimizer is None:
            module = self.model if model is None else model
            groups = parameter_groups(module, set(self.get_decay_parameter_names(module)))
            self.optimizer = self.own_optimizer = self.make_optimizer(groups)
            self.capabilities = capabilities(self.optimizer)
        assert self.optimizer is not None
        return self.optimizer

    def _check_engine(self) -> None:
        """Raises RuntimeError if another optimizer or engine than the requested one is about to run."""
        found: Any = self.optimizer
        while hasattr(found, "optimizer"):  # accelerate and DeepSpeed have wrapped theirs around it
            found = found.optimizer
        if found is not self.own_optimizer:
            raise RuntimeError(f"{type(found).__name__} would run, not {type(self.own_optimizer).__name__}")
        stage = self.args.deepspeed["zero_optimization"]["stage"] if isinstance(self.args.deepspeed, dict) else None
        runs = self.deepspeed.zero_optimization_stage() if self.deepspeed is not None else None
        if runs != stage:
            raise RuntimeError(f"ZeRO stage {runs} would run, not {stage}: give every job fresh processes")

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """All micro-batches of the next step; the passes before the step read them all."""
        samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples:
            # random numbers drawn here (dropout, in an ascent) have a seed of their own: a resumed run loads its state
            # of the generator only after this
            cuda = [self.args.device] if self.args.device.type == "cuda" else []
            with torch.random.fork_rng(cuda):
                torch.manual_seed(seed_of("before", self.args.seed, self.state.global_step, self.args.process_index))
                self._before_step(samples)
        return samples, count

    def _before_step(self, micro_batches: Sequence[dict[str, Tensor]]) -> None:
        """What the optimizer requests, and what is logged, of the weights before the step."""
        if self.sums is None:
            self.sums = self._begin_training()
        step = self._step(micro_batches)
        logged = step.number == 0 or (step.number + 1) % self.args.logging_steps == 0
        if logged:
            self._before = passes.gradient_conflict(step) if self.schedule.log_gradients else {}
        if logged and self._measures_retain_nll:
            self._before["retain_nll"] = float(passes.retain_nll(step))
        terms = self._terms
        self._probed_loss = curvature.before_step(step, self.capabilities, self.stream, self.pad_id)
        if self._probed_loss is None:
            self._terms = terms  # the losses logged are those whose gradient is taken, after an ascent
        if logged:
            self.sums.counting = True

    def _begin_training(self) -> StepSums:
        self._check_engine()
        requested = self.capabilities
        summary = requested.curvature and curvature.summary(requested.curvature, self.schedule.batch_size)
        if summary and self.state.is_world_process_zero:
            log.info("%s", summary)
        if requested.sums is None:
            return ComparedSums(requested.ascent.base if requested.ascent is not None else self.own_optimizer)
        requested.sums.raise_nonfinite = False  # such a run ends as diverged
        return requested.sums

    @property
    def _measures_retain_nll(self) -> bool:
        """Whether the NLL of retain rows is measured and checked for divergence: where there is no retain term."""
        return self.objective.retain_function is None and "retain" in self.stream.order

    def _step(self, micro_batches: Sequence[dict[str, Tensor]]) -> Step:
        return Step(
            number=self.state.global_step,
            micro_batches=micro_batches,
            num_rows=self.args.per_device_train_batch_size,
            model=self.model_wrapped,
            module=self.model,  # never wrapped; accelerate's unwrap_model looks for packages on the disk each time
            engine=self.deepspeed,
            reader=self.reader,
            cut_to=lambda batch, parts: self._prepare_inputs(self._cut_to(batch, parts)),
            loss=lambda model, batch: self.compute_loss(model, self._prepare_inputs(batch)),
            terms=lambda model, batch: self.objective.terms(self._term_inputs(model, self._prepare_inputs(batch))),
            seed=self.args.seed,
            rank=self.args.process_index,
            num_ranks=self.args.world_size,
        )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if self._probed_loss is None:
            return super().training_step(model, inputs, num_items_in_batch)
        return self._probed_loss.to(self.args.device) / self.current_gradient_accumulation_steps  # without a gradient

    def read_checkpoint(self, folder: Path) -> None:
        saving.read_weights(self.model, folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        saving.save_weights(self.model, Path(output_dir or str(self.args.output_dir)), first=self.args.should_save)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's numbers, and forget and retain loss apart, means over steps and ranks; `win_rate` where defined.

        Without a retain term, `retain_nll` of the logged step's retain rows before the step, where there are such rows.
        """
        if "loss" in logs:
            terms = ranks.sum_over_ranks(self._terms.to(self.args.device))
            self._terms = torch.zeros_like(self._terms)
            logs["forget_loss"] = float(terms[0] / terms[2])
            if self.objective.retain_function is not None:
                logs["retain_loss"] = float(terms[1] / terms[2])
            assert self.sums is not None
            self.sums.counting = False
            sums = ranks.sum_over_ranks(self.sums.take_statistics().to(self.args.device))
            if self.deepspeed is None:  # each rank has counted every weight; under ZeRO its share
                sums /= self.args.world_size
            logs |= {**logged_statistics(sums, self.sums.clips), **self._before}
            num_nonfinite = int(sums[STATISTICS.index("nonfinite")])
            when = f"at step {self.state.global_step}"
            self.diverged = self.schedule.divergence(logs, self.state.log_history, when, num_nonfinite)
            if self.diverged:
                self.control.should_training_stop = True
        super().log(logs, start_time)

    @property
    def notes(self) -> list[str]:
        """Sentences on this training for the reader of the results."""
        sign_descent = sign_descent_note([e["win_rate"] for e in self.state.log_history if "win_rate" in e])
        term = getattr(self.objective.forget_term, "func", self.objective.forget_term)
        is_influence = term is grad_ascent and self.objective.retain_function is None
        newton = NEWTON if self.capabilities.row_gradients is not None and not is_influence else None
        return [*self.stream.notes, *filter(None, (sign_descent, newton))]

    @property
    def passes(self) -> dict[str, float]:
        """Mean passes of a step so far, as `curvature.passes_per_step` counts them."""
        self.create_optimizer()  # a training without a step left has none
        parts, size = self.objective.parts, self.schedule.batch_size
        return curvature.passes_per_step(self.capabilities, self.state.global_step, size, len(parts))

    def check_end(self) -> None:
        """Set `diverged` if the weights of the end have, without a retain term: no logging step saw the last update."""
        if not self.diverged and self._measures_retain_nll:
            logs, when = {"retain_nll": self._last_retain_nll()}, f"after step {self.state.global_step}"
            self.diverged = self.schedule.divergence(logs, self.state.log_history, when)

    @torch.no_grad()
    def _last_retain_nll(self) -> float:
        """The mean NLL per token of the last step's retain rows, all of which every rank reads."""
        size, last = self.args.per_device_train_batch_size, len(self.stream)
        rows = [{"retain": self.stream[i]["retain"]} for i in range(last - self.schedule.batch_size, last)]
        batches = [collated(rows[i : i + size], self.pad_id) for i in range(0, len(rows), size)]
        self.model.eval()
        scored = [Scored(self.reader(self.model, b), b["labels"]) for b in map(self._prepare_inputs, batches)]
        return float(torch.cat([part.mean_nll for part in scored]).double().mean())
