"""Configuration to objects, alike in the parent and every worker: the only module that instantiates a `_target_`."""

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hydra.utils
import torch

from soul_exp import options, run
from soul_exp.attacks import Attack
from soul_exp.comparison import with_rates
from soul_exp.data import Template
from soul_exp.errors import UsageError, built
from soul_exp.losses import Objective
from soul_exp.metrics.dialects import OURS, in_dialect
from soul_exp.models import checkpoint
from soul_exp.models.checkpoint import Checkpoint
from soul_exp.ranges import POSITIVE, SEED, SOME, Number
from soul_exp.tasks.task import Task
from soul_exp.training.schedule import Schedule

Config = Mapping[str, Any]  # the plain configuration that `compose` returns
_instantiate = functools.partial(hydra.utils.instantiate, _convert_="all")


def build(config: Config) -> run.Run:
    """The objects of `config`. Raises UsageError for what cannot be built."""
    models = build_models(config)
    objective = built(lambda: _instantiate(config["loss"]), "loss")
    if not isinstance(objective, Objective):
        raise UsageError(f"loss: found {type(objective).__name__}, expected _target_: soul_exp.losses.Objective")
    return run.Run(
        **vars(models),
        choices=run.Choices(**config["choices"]),
        metrics=metrics_of(config["task"]["metrics"], config.get("dialect", OURS)),
        objective=objective,
        make_optimizer=_optimizer(config),
        schedule=built(lambda: Schedule(**config["train"]), "train"),
        adapter=built(lambda: _instantiate(config["adapter"]), "adapter"),
        rounding=config["precision"]["rounding"],
        compute=built(lambda: run.Compute(name=config["choices"]["compute"], **config["compute"]), "compute"),
        wandb=built(lambda: run.WandbSettings(**config["wandb"]), "wandb"),
        tuning=build_tuning(config),
        attacks={name: build_attack(name, entry) for name, entry in config["attack"].items()},
        attack_metrics=attack_metrics_of(config["attack"]),
        **{
            key: config[key]
            for key in ("name", "seed", "save", "best_keep", "best_s_mia", "resume", "overwrite", "tuned")
        },
    )


def build_models(config: Config) -> run.Models:
    """The models that `config` compares: all that a reader of a finished run needs."""
    records, prepare, target = config["retrained"]["records"], config["prepare"], published(config)
    schedule = {key: value for key, value in prepare.items() if key not in ("adamw", "seed")}
    again = config["train"].get("gradient_checkpointing", False)
    schedule |= {"gradient_checkpointing": again, "dropout": True}
    return run.Models(
        cache=Path(config["cache"]),
        stages=tuple(config["stages"]),
        task=built(lambda: build_task(config), "task"),
        model=model_settings(config["model"]),
        published=Checkpoint(target.path, target.revision) if target else None,
        prepare=run.Preparation(
            schedule=built(lambda: Schedule(**schedule), "prepare"),
            adamw=prepare["adamw"],
            seed=prepare["seed"],
            identity=options.prepared("prepare", prepare),
        ),
        retrained=_retrained(config),
        retrained_records=Path(records) if records else None,
        retrained_seeds=config["retrained"]["seeds"],
        evaluation=built(lambda: run.Evaluation(**config["evaluate"]), "evaluate"),
        suite=run.Suite(config["utility_suite"], config["utility_limit"], config["utility_data"]),
        system_prompt=config["task"].get("system_prompt") if config.get("input_based") else None,
        start=Checkpoint(config["start"]) if config.get("start") else None,
        general=is_general(config),
    )


def build_task(config: Config) -> Task:
    """The task that `config["task"]` describes, without its metrics and its system prompt."""
    fields = task_fields(config)
    for unseen in ("num_holdout_authors", "num_related_authors"):
        if fields.get(unseen, 0) is None and published(config):
            fields[unseen] = 0  # it was trained on every author
    made = _instantiate(fields)
    if not isinstance(made, Task):
        raise UsageError(f"task: found {type(made).__name__}, expected the _target_ of a function that returns a Task")
    return made


def task_fields(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config["task"].items() if key not in ("metrics", "system_prompt")}


def is_general(config: Config) -> bool:
    """Whether the model of `config` has general questions in its training, this run's or an earlier one's."""
    trains = not run.only_measures(config["stages"]) and bool(config["task"].get("train_general"))
    return trains or (config["model"]["path"] is not None and checkpoint.knows_general(config["model"]["path"]))


def trial(config: Config, lr: float, gamma: float) -> dict[str, Any]:
    """The configuration of one trial: the run's, except for the seed and what is tuned."""
    seed, given = config["tune"]["seed"], with_rates(config, lr, gamma)
    seeded = {section: _seeded(given[section], seed) for section in ("optimizer", "loss")}
    train = {**given["train"], "save_steps": None}
    return {**given, **seeded, "seed": seed, "train": train, "tune": None, "tuned": None}


def _seeded(node: Any, seed: int) -> Any:
    """`node` with `seed` under every key of that name: what draws numbers has been given the run's."""
    if not isinstance(node, Mapping):
        return node
    return {key: seed if key == "seed" else _seeded(value, seed) for key, value in node.items()}


def model_settings(model: Config) -> run.ModelSettings:
    return run.ModelSettings(
        template=built(lambda: Template(**model["template"]), "model.template"),
        scratch=built(lambda: run.Scratch(**model["scratch"]), "model.scratch") if model.get("scratch") else None,
        training_form=options.prepared("model.template", model["template"]),
        revision=model.get("revision"),
        tokenizer=model.get("tokenizer"),
        **{key: model[key] for key in ("path", "max_length", "dtype", "attention", "num_weights") if key in model},
    )


def published(config: Config) -> run.Published | None:
    """The published checkpoint that is the target already, if the model names one for this task, source and base."""
    task = config["choices"]["task"]
    entry = (config["model"]["published"] or {}).get(task)
    if entry is None:
        return None
    found: run.Published = built(lambda: run.Published(**entry), f"model.published.{task}")
    fits = (found.base, found.source) == (config["model"]["path"], config["task"].get("source"))
    return found if fits else None


def _retrained(config: Config) -> Checkpoint | None:
    """The retrained model that the run names, or else the published one beside a published target."""
    given, target = config["retrained"], published(config)
    if given["path"]:
        return Checkpoint(given["path"], given.get("revision"))
    path = target.retrained.get(config["task"].get("split", "")) if target and not given["records"] else None
    return Checkpoint(path) if path else None


def build_attack(name: str, entry: Config) -> Attack:
    """The attack that `entry`, of the option attack.NAME, describes. Raises UsageError for what is none."""
    made = built(
        lambda: _instantiate({key: value for key, value in entry.items() if key != "metrics"}), f"attack.{name}"
    )
    if not isinstance(made, Attack):
        raise UsageError(f"attack.{name}: found {type(made).__name__}, expected the _target_ of an attack")
    return made


def attack_metrics_of(entries: Config) -> dict[str, dict[str, run.Metric]]:
    """Attack -> name -> function, of the options attack.NAME.metrics."""
    return {name: metrics_of(entry["metrics"], where=f"attack.{name}.metrics") for name, entry in entries.items()}


def metrics_of(entries: Any, dialect: str = OURS, where: str = "task.metrics") -> dict[str, run.Metric]:
    """Name -> function, of the option `where`, in `dialect`. Raises UsageError for an entry that is not one."""
    if not isinstance(entries, Mapping):
        raise UsageError(f"{where}={entries}: expected names with a _target_ each; for none, type {where}={{}}")
    found: dict[str, run.Metric] = {}
    for name, entry in entries.items():
        if not isinstance(entry, Mapping) or "_target_" not in entry:
            raise UsageError(
                f"{where}.{name}={entry}: expected the _target_ of a function; to report it no more, type "
                f"~{where}.{name}"
            )
        metric = built(functools.partial(hydra.utils.instantiate, entry), f"{where}.{name}")
        if not callable(metric):
            raise UsageError(
                f"{where}.{name}: found {type(metric).__name__}, expected a function: write _partial_: true"
            )
        found[name] = in_dialect(metric, dialect)
    return found


def _optimizer(config: Config) -> Callable[..., torch.optim.Optimizer]:
    plain: Callable[..., torch.optim.Optimizer] = built(lambda: _instantiate(config["optimizer"]), "optimizer")
    rounding = config["precision"]["rounding"]
    if rounding == "nearest" or config["compute"]["deepspeed"]:  # ZeRO gives it fp32 shards and rounds by itself
        return plain
    if callable(plain) and "rounding" not in inspect.signature(plain).parameters:
        raise UsageError(
            f"precision={config['choices']['precision']} needs an optimizer that rounds so; "
            f"optimizer={config['choices']['optimizer']} does not: choose precision=fp32 or bf16, or optimizer=adam, "
            f"lion, signum, sophia or sophia_soul"
        )
    noise = {"seed": config["seed"]} if rounding == "stochastic" else {}
    return functools.partial(plain, rounding=rounding, **noise)


def tunes(config: Config) -> bool:
    """Whether a run of `config` chooses its learning rate and gamma by trials."""
    return bool(config["tune"]) and ("unlearn" in config["stages"] or not config["stages"])


def build_tuning(config: Config) -> run.Tuning | None:
    """The trials of `config`. Raises UsageError at the first of their options that cannot work."""
    if not tunes(config):
        return None
    settings = config["tune"]
    absent = [key for key in ("seed", "lr", "gamma", "rule") if settings.get(key) is None]
    if absent:
        raise UsageError(f"tune.{absent[0]} is missing: choose a preset that states it, as experiment=ablation_rho")
    for key, number in (("lr", POSITIVE), ("gamma", Number(0))):
        values = settings[key]
        if not isinstance(values, list) or not values or not all(map(number.fits, values)):
            raise UsageError(f"tune.{key}={values}: expected a list, each {number.expected()}")
        if len(set(values)) < len(values):
            raise UsageError(f"tune.{key}={values}: a value stands there twice, remove one")
    for key, number in (("seed", SEED), ("workers", SOME)):
        if message := number.mismatch(f"tune.{key}", settings.get(key)):
            raise UsageError(message)
    if settings["seed"] == config["seed"]:
        raise UsageError(f"tune.seed={settings['seed']} is the run's own seed: change tune.seed")
    if not POSITIVE.fits(config["optimizer"].get("lr")):
        raise UsageError(f"optimizer={config['choices']['optimizer']} states no lr: give optimizer.lr")
    if config["loss"].get("retain_term") is None:
        raise UsageError(f"loss={config['choices']['loss']} has no retain term, so no gamma: choose another loss")
    rule = built(lambda: _instantiate(settings["rule"]), "tune.rule")
    if not isinstance(rule, functools.partial):
        raise UsageError(f"tune.rule: found {type(rule).__name__}, expected a function with _partial_: true")
    built(lambda: inspect.signature(rule).bind([], {}), "tune.rule")
    return run.Tuning(settings["seed"], tried(config), rule, settings.get("workers"))


def tried(config: Config) -> list[tuple[float, float]]:
    """The (learning rate, gamma) of each trial: factors of the optimizer's own rate, gammas common to all cells."""
    if not tunes(config):
        return []
    rates = [float(f"{factor * config['optimizer']['lr']:.6g}") for factor in config["tune"]["lr"]]
    return [(rate, float(gamma)) for rate in rates for gamma in config["tune"]["gamma"]]
