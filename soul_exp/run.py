"""What one run is made of: typed, frozen, the same in the parent and in every worker. `build` makes it."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from transformers import PreTrainedModel

from soul_exp.attacks import Attack
from soul_exp.data import Template
from soul_exp.losses import Objective
from soul_exp.models import loading
from soul_exp.models.checkpoint import Checkpoint
from soul_exp.models.lora import Lora
from soul_exp.ranges import MOST, Number
from soul_exp.tasks.task import Task
from soul_exp.training.curvature import CURVATURE_PARTS, SAMPLED
from soul_exp.training.schedule import Schedule

Metric = Callable[..., float]
MEASURING = {"evaluate", "attack"}  # stages that change no model
VOCABULARY = Number(258, MOST, whole=True)  # all bytes, the end and the padding
HESSIAN_PARTS = {"retain": ("retain",), "all": ("forget", "retain")}  # whose rows an influence step's Hessian is of


@dataclass(frozen=True)
class Scratch:
    """A model to be made with random weights, and the size of its new tokenizer's vocabulary."""

    vocab_size: Annotated[int, VOCABULARY]
    config: Mapping[str, Any]  # of transformers' AutoConfig


@dataclass(frozen=True)
class ModelSettings:
    """What prepare starts from, and how every model of a run is loaded and reads text."""

    template: Template
    max_length: int  # tokens of prompt, answer and end token
    dtype: str = "float32"
    attention: str = "sdpa"
    path: str | None = None  # a folder or a hub name; None: from scratch
    revision: str | None = None
    tokenizer: str | None = None  # None: each checkpoint's own
    scratch: Scratch | None = None
    num_weights: int | None = None  # of the model on the hub, before it is here; None: unknown
    training_form: Mapping[str, str] = field(default_factory=dict)  # what is stated of the template that training reads

    @property
    def checkpoint(self) -> Checkpoint:
        assert self.path is not None
        return Checkpoint(self.path, self.revision)

    def described(self) -> PreTrainedModel | None:
        """What prepare starts from, without storage for its weights; None if that would need a download."""
        if self.path:
            return loading.load_model(self.path, weights=False) if Path(self.path).is_dir() else None
        assert self.scratch is not None
        return loading.skeleton(loading.scratch_config(**vars(self.scratch)), "model.scratch.config")


@dataclass(frozen=True)
class Published:
    """A published checkpoint that was trained on a task's rows already."""

    source: str  # the task.source that it was trained on
    base: str  # the model.path that it was trained from
    path: str  # a folder or a hub name
    revision: str | None = None
    retrained: Mapping[str, str] = field(default_factory=dict)  # task.split -> a published retrained model


@dataclass(frozen=True)
class Preparation:
    """How the target and the retrained model are trained: AdamW on the answers."""

    schedule: Schedule
    adamw: Mapping[str, Any]  # of torch.optim.AdamW
    seed: int
    identity: Mapping[str, Any]  # of its options those that decide the weights, for the cache's key


@dataclass(frozen=True)
class Evaluation:
    """How answers are computed."""

    batch_size: int  # changes no number in fp32; in bf16 it is part of what identifies cached answers
    max_new_tokens: int
    every: int | None = None  # optimizer steps between evaluations on the validation part; None: no trajectory

    @property
    def of_probes(self) -> dict[str, Any]:
        """What decides the answers to probes."""
        return {"batch_size": self.batch_size, "max_new_tokens": self.max_new_tokens}


@dataclass(frozen=True)
class Suite:
    """The utility suite, the number of items of each of its tasks (None: all), and the folder of its data."""

    suite: str  # "paper" | "embedded" | "none"
    limit: int | None
    data: str | None


@dataclass(frozen=True)
class Compute:
    """The processes of a run, and how they share a model."""

    name: str
    device: str  # "cpu" | "cuda"
    processes: int
    threads: int  # of each process
    deepspeed: Mapping[str, Any] | None

    @property
    def alone(self) -> bool:
        """Whether one process does all the work, without a process group."""
        return self.processes == 1 and not self.deepspeed

    @property
    def zero_stage(self) -> int | None:
        """1, 2 or 3; None without DeepSpeed."""
        return self.deepspeed["zero_optimization"]["stage"] if self.deepspeed else None


@dataclass(frozen=True)
class Choices:
    """The names that were chosen in the groups of conf/."""

    model: str
    task: str
    loss: str
    optimizer: str
    compute: str
    precision: str
    adapter: str


@dataclass(frozen=True)
class Models:
    """The models that a run compares: what decides their weights and their answers."""

    cache: Path
    stages: tuple[str, ...]
    task: Task
    model: ModelSettings
    published: Checkpoint | None  # the target, where the model names a published one for this task, source and base
    prepare: Preparation
    retrained: Checkpoint | None  # as given by retrained.path
    retrained_records: Path | None  # its answers, as given by retrained.records
    retrained_seeds: int  # how many retrained models are trained, where one is
    evaluation: Evaluation
    suite: Suite
    system_prompt: str | None  # of the input-based baseline; None: it is not measured
    start: Checkpoint | None  # what unlearning starts from, where that is not the target
    general: bool  # whether the model has general questions in its training, this run's or an earlier one's

    @property
    def measures_only(self) -> bool:
        """Whether model.path is only measured: the other models were made from something else."""
        return only_measures(self.stages)

    @property
    def target_is_given(self) -> bool:
        """Whether model.path is the target as it is."""
        return self.task.trained_before and not self.measures_only

    @property
    def unlearns(self) -> bool:
        return "unlearn" in self.stages


@dataclass(frozen=True)
class WandbSettings:
    """Where a run's numbers are copied to."""

    mode: Literal["offline", "online", "disabled"]
    project: str
    entity: str | None


@dataclass(frozen=True)
class Tuning:
    """Trials of learning rate x gamma before unlearning, and the rule that selects one."""

    seed: int
    grid: Sequence[tuple[float, float]]  # (learning rate, gamma) of each trial
    rule: functools.partial[Any]
    workers: int | None  # processes side by side; None: the machine decides

    def __str__(self) -> str:
        """On what data and by which rule a run is tuned: for results and the captions of tables."""
        rule = (inspect.getdoc(self.rule.func) or self.rule.func.__name__).splitlines()[0].rstrip(".")
        constants = ", ".join(f"{key}={value}" for key, value in self.rule.keywords.items())
        rates, gammas = map(set, zip(*self.grid, strict=True))
        return (
            f"validation part, {len(self.grid)} trials a cell ({len(rates)} learning rates x "
            f"{len(gammas)} gammas, seed {self.seed}): {rule[0].lower()}{rule[1:]} ({constants})"
        )


@dataclass(frozen=True)
class Run(Models):
    """All that one run is made of, typed: no field is a mapping of options, except what belongs to libraries."""

    name: str
    seed: int
    choices: Choices
    metrics: Mapping[str, Metric]
    objective: Objective
    make_optimizer: Callable[..., torch.optim.Optimizer]  # at its precision, still to be given its parameters
    schedule: Schedule
    adapter: Lora | None
    rounding: str  # of weights, one of optim.kernels.ROUNDINGS
    compute: Compute
    wandb: WandbSettings
    tuning: Tuning | None
    attacks: Mapping[str, Attack]  # by name
    attack_metrics: Mapping[str, Mapping[str, Metric]]  # attack -> metric
    save: str  # "final" | "best" | "none"
    best_keep: float
    best_s_mia: float
    resume: str  # "exact" | "weights" | "restart"
    overwrite: bool
    tuned: str | None  # on what the numbers were tuned

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that this run reads: the loss's, the curvature's where the optimizer wants one, and `retain`."""
        retain = self.task.parts.get("retain")  # without a retain term its NLL is only measured (Unlearner.log)
        measured = retain is not None and bool(retain.rows) and self.objective.retain_function is None
        read = (*self.objective.parts, *_parts_of_curvature(self.make_optimizer), *(("retain",) if measured else ()))
        return tuple(dict.fromkeys(read))


def only_measures(stages: Sequence[str]) -> bool:
    """Whether a run of `stages` measures a given checkpoint, and neither prepares nor unlearns one."""
    return bool(stages) and {*stages} <= MEASURING


def settings_of(make_optimizer: Callable[..., Any]) -> dict[str, Any]:
    """The keyword arguments that an optimizer, a partial, is going to be built with, defaults of its class included."""
    return {name: parameter.default for name, parameter in inspect.signature(make_optimizer).parameters.items()}


def _parts_of_curvature(make_optimizer: Callable[..., Any]) -> tuple[str, ...]:
    settings = settings_of(make_optimizer)
    if settings.get("hessian") in HESSIAN_PARTS:
        return ("forget", "retain")  # the ratio of their sizes scales the step
    if isinstance(settings.get("base"), functools.partial):
        return _parts_of_curvature(settings["base"])
    return CURVATURE_PARTS[settings.get("curvature_on") or "retain"] if settings.get("estimator") in SAMPLED else ()
