"""Unlearning steps: a thin subclass of `transformers.Trainer`; nothing of its loop is written again.

B rows of each part in a micro-batch, T answer positions, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from soul_exp import compat
from soul_exp.data import seed_of, some_rows
from soul_exp.losses import Objective, Scored, grad_ascent
from soul_exp.models import loading, lora
from soul_exp.models.layers import AnswerReader
from soul_exp.optim.kernels import STATISTICS
from soul_exp.training import passes
from soul_exp.training.passes import Step
from soul_exp.training.reference import Reference
from soul_exp.training.schedule import Schedule
from soul_exp.training.statistics import Watch, described, remark
from soul_exp.training.stream import Collator, Stream

log = logging.getLogger(__name__)

JUDGED = {"loss": "loss", "forget_loss": "forget loss", "retain_loss": "retain loss", "retain_nll": "retain NLL"}


class Unlearner(compat.OwnCheckpointReading, Trainer):
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
        self.pad_id = pad_id
        self.diverged: str | None = None
        self.watch: Watch | None = None
        self._conflict: dict[str, float] = {}
        self._retain_nll: dict[str, float] = {}  # of the step about to be logged, where the loss has no retain term
        self._probed: Tensor | None = None  # the mean loss that a zeroth-order step saw
        self._terms = torch.zeros(3, dtype=torch.float64)  # sums of forget and retain term, number of micro-batches

    # --- the loss -------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        self._set_mode(model)
        forget, retain = self.objective.terms(self._available(model, inputs))
        seen = torch.stack([forget, retain if retain is not None else forget, torch.ones_like(forget)]).detach()
        self._terms = self._terms.to(seen.device) + seen.double()  # not to the CPU, which would wait for the device
        return self.objective.total(forget, retain)

    def _set_mode(self, model: nn.Module) -> None:
        """Dropout as the schedule and the adapter say where a gradient is taken, and none where a loss is compared.

        A static optimizer's gradient is of the same function as its Hessian; a zeroth-order one probes one function.
        """
        random = torch.is_grad_enabled() and not getattr(self.base_optimizer, "static", False)
        model.train(random and self.schedule.dropout)
        if random:
            lora.train_dropout(model)

    def _available(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Everything that a term may name: each part scored by the model, and what the frozen start said of it."""
        batch = self._rows_of(inputs, self.objective.parts)
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
        available: dict[str, Any] = {
            part: Scored(logits[block], batch["labels"][block]) for part, block in blocks.items()
        }
        if hidden is not None:
            available["hidden"] = {part: hidden[block] for part, block in blocks.items()}
        available["reference_hidden"] = self.reference.states_of(rows, batch["labels"].shape[1])
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
        return some_rows(inputs, index)

    def read_checkpoint(self, folder: Path) -> None:
        loading.read_weights(cast(PreTrainedModel, self.model), folder)

    # --- the optimizer and its passes -----------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        # not Trainer(optimizers=...): DeepSpeed's initialisation replaces that by AdamW without a word
        if self.optimizer is None:
            self.optimizer = self._asked = self.make_optimizer(self._groups(model if model is not None else self.model))
        assert self.optimizer is not None
        return self.optimizer

    def _check_engine(self) -> None:
        """Raises RuntimeError if another optimizer or engine than the one asked for is about to run."""
        if self.base_optimizer is not self._asked:
            raise RuntimeError(f"{type(self.base_optimizer).__name__} would run, not {type(self._asked).__name__}")
        asked = self.args.deepspeed["zero_optimization"]["stage"] if isinstance(self.args.deepspeed, dict) else None
        engine = getattr(self, "deepspeed", None)
        runs = engine.zero_optimization_stage() if engine is not None else None
        if runs != asked:
            raise RuntimeError(f"ZeRO stage {runs} would run, not {asked}: give every job fresh processes")

    def _groups(self, module: Any) -> list[dict[str, Any]]:
        """Trained parameters by role; norms and biases do not decay, all else does.

        "embedding": of every embedding, positions included, and of the output head; "hidden": the matrices of other
        linear layers; "other": the rest, such as norms, biases, fused experts, and what a module holds by itself.
        """
        decayed = set(self.get_decay_parameter_names(module))
        ends = [end for end in (module.get_input_embeddings(), module.get_output_embeddings()) if end is not None]
        embeddings = _ids(p for part in (*ends, *_embeddings(module)) for p in part.parameters())
        matrices = _ids(part.weight for part in module.modules() if isinstance(part, nn.Linear | Conv1D))
        groups: dict[str, dict[str, Any]] = {
            "hidden": {"params": [], "role": "hidden"},
            "embedding": {"params": [], "role": "embedding"},
            "decayed": {"params": [], "role": "other"},
            "other": {"params": [], "role": "other", "weight_decay": 0.0},
        }
        for name, p in module.named_parameters():
            if p.requires_grad:
                role = "embedding" if id(p) in embeddings else "hidden" if id(p) in matrices else "decayed"
                groups[role if name in decayed else "other"]["params"].append(p)
        return [group for group in groups.values() if group["params"]]

    @property
    def base_optimizer(self) -> Any:
        """Our own optimizer, under whatever accelerate and DeepSpeed have wrapped around it."""
        optimizer: Any = self.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        return optimizer

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """All micro-batches of the next step: what the optimizer asks of them beforehand sees them all."""
        samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples:
            # what is drawn here (dropout, in a climb) has a seed of its own: a resumed run loads its state of the
            # generator only after this
            cuda = [self.args.device] if self.args.device.type == "cuda" else []
            with torch.random.fork_rng(cuda):
                torch.manual_seed(seed_of("before", self.args.seed, self.state.global_step, self.args.process_index))
                self._before_step(samples)
        return samples, count

    def _before_step(self, samples: Sequence[dict[str, Tensor]]) -> None:
        optimizer, number = self.base_optimizer, self.state.global_step
        inner = getattr(optimizer, "base", optimizer)  # under a sharpness-aware wrapper
        if self.watch is None:
            self._check_engine()
            self.watch = Watch(inner)
            if (said := passes.announced(inner, self.schedule.batch_size)) and self.state.is_world_process_zero:
                log.info("%s", said)
        step = self._step(samples, inner)
        logged = number == 0 or (number + 1) % self.args.logging_steps == 0
        if logged and self.schedule.log_gradients:
            self._conflict = passes.gradient_conflict(step)
        if logged and self._reads_retain:
            self._retain_nll = {"retain_nll": float(passes.retain_nll(step))}
        if getattr(optimizer, "static", False):
            passes.collect_samples(step, self.stream, self.pad_id)
        if passes.curvature_is_due(inner, number):
            passes.refresh_curvature(step)
        self._probed = None
        if hasattr(optimizer, "ascend"):
            terms = self._terms.clone()
            passes.climb(replace(step, optimizer=optimizer))
            self._terms = terms  # the losses logged are those of the climbed weights, whose gradient is taken
        elif getattr(optimizer, "zeroth", False):
            self._probed = passes.estimate_without_gradient(step)
        if logged:
            self.watch.begin()

    @property
    def _reads_retain(self) -> bool:
        """Whether the NLL of retain rows is measured, since no retain term is: logged, and judged as that is."""
        return self.objective.retain_function is None and "retain" in self.stream.order

    def _step(self, samples: Sequence[dict[str, Tensor]], optimizer: Any) -> Step:
        assert self.model is not None
        return Step(
            number=self.state.global_step,
            samples=samples,
            num_rows=self.args.per_device_train_batch_size,
            model=self.model_wrapped,
            module=self.model,  # never wrapped; accelerate's unwrap_model looks for packages on the disk each time
            engine=getattr(self, "deepspeed", None),
            reader=self.reader,
            optimizer=optimizer,
            rows_of=lambda sample, parts: self._prepare_inputs(self._rows_of(sample, parts)),
            loss=lambda model, sample: self.compute_loss(model, self._prepare_inputs(sample)),
            terms=lambda model, sample: self.objective.terms(self._available(model, self._prepare_inputs(sample))),
            seed=self.args.seed,
            rank=self.args.process_index,
            world=self.args.world_size,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        loading.save_weights(cast(PreTrainedModel, self.model), folder, first=self.args.should_save)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if self._probed is None:
            return super().training_step(model, inputs, num_items_in_batch)
        return self._probed.to(self.args.device) / self.current_gradient_accumulation_steps  # no gradient is wanted

    # --- what is logged -------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's numbers, and forget and retain loss apart, means over steps and ranks; `win_rate` where defined.

        Without a retain term, `retain_nll` of the logged step's retain rows before the step, where there are such rows.
        """
        if "loss" in logs:
            terms = self._sum_over_ranks(self._terms)
            self._terms = torch.zeros_like(self._terms)
            logs["forget_loss"] = float(terms[0] / terms[2])
            if self.objective.retain_function is not None:
                logs["retain_loss"] = float(terms[1] / terms[2])
            assert self.watch is not None
            sums = self._sum_over_ranks(self.watch.take())
            if getattr(self, "deepspeed", None) is None:  # each rank has counted every weight; under ZeRO its share
                sums /= self.args.world_size
            logs |= {**described(sums, self.watch.clips), **self._conflict, **self._retain_nll}
            self._stop_if_diverged(logs, num_nonfinite=int(sums[STATISTICS.index("nonfinite")]))
        super().log(logs, start_time)

    @property
    def remarks(self) -> list[str]:
        """What a reader of the results has to know of this training."""
        said = [remark([entry["win_rate"] for entry in self.state.log_history if "win_rate" in entry])]
        if getattr(self.base_optimizer, "static", False):
            term = getattr(self.objective.forget_term, "func", self.objective.forget_term)
            if term is not grad_ascent or self.objective.retain_function is not None:
                said.append("one Newton step of this loss: influence unlearning proper has loss=grad_ascent")
        return [*self.stream.notes, *(sentence for sentence in said if sentence)]

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.args.world_size > 1:
            values = values.to(self.args.device)
            dist.all_reduce(values)
        return values

    def _stop_if_diverged(self, logs: Mapping[str, float], num_nonfinite: int) -> None:
        when = f"at step {self.state.global_step}"
        lost = next((key for key in JUDGED if not math.isfinite(logs.get(key, 0.0))), None)
        if lost:
            self.diverged = f"the {JUDGED[lost]} is {logs[lost]} {when}"
        elif num_nonfinite:
            self.diverged = f"{num_nonfinite} gradient coordinates are not finite {when}"
        else:
            exceeded = [self._exceeded(key, logs[key], when) for key in ("retain_loss", "retain_nll") if key in logs]
            self.diverged = next(filter(None, exceeded), None)
        if self.diverged:
            self.control.should_training_stop = True

    def _exceeded(self, key: str, value: float, when: str) -> str | None:
        """Why a retain term of `value` has diverged from its first logged value; None if it has not."""
        limit, floor = self.schedule.diverged_at, self.schedule.diverged_floor
        history = [entry[key] for entry in self.state.log_history if key in entry]
        if limit is None or not history or value <= limit * max(history[0], floor):
            return None
        return (
            f"the {JUDGED[key]} is {value:.3g} {when}, above {limit:g} x max({history[0]:.3g} at the start, {floor:g})"
        )

    def judge_end(self) -> None:
        """Without a retain term the weights of the end are judged too: no logging step has seen the last update."""
        if self.diverged or not self._reads_retain:
            return
        value, when = self._last_retain_nll(), f"after step {self.state.global_step}"
        lost = None if math.isfinite(value) else f"the retain NLL is {value} {when}"
        self.diverged = lost or self._exceeded("retain_nll", value, when)

    @torch.no_grad()
    def _last_retain_nll(self) -> float:
        """The mean NLL per token of the last step's retain rows, all of which every rank reads."""
        assert self.model is not None
        size, last = self.args.per_device_train_batch_size, len(self.stream)
        rows = [{"retain": self.stream[i]["retain"]} for i in range(last - self.schedule.batch_size, last)]
        batches = [Collator(self.pad_id)(rows[i : i + size]) for i in range(0, len(rows), size)]
        self.model.eval()
        scored = [Scored(self.reader(self.model, b), b["labels"]) for b in map(self._prepare_inputs, batches)]
        return float(torch.cat([part.mean_nll for part in scored]).double().mean())


def _embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """Every embedding in `model`; of one with an adapter, what is wrapped around it."""
    for module in model.modules():
        if isinstance(module, nn.Embedding) or isinstance(getattr(module, "base_layer", None), nn.Embedding):
            yield module


def _ids(params: Iterable[Any]) -> set[int]:
    return {id(p) for p in params}
