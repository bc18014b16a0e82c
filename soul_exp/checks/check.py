"""Everything that can be known before work starts: one message for an error; why a metric is not available."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from soul_exp import results
from soul_exp.artifacts import answer_cache, prepared_models, texts
from soul_exp.artifacts.scores import FORGET_QUALITY, RETAIN, S_MIA, VALIDATION
from soul_exp.build import Config, build
from soul_exp.checks import availability, disk
from soul_exp.checks.attacks import check_attacks
from soul_exp.checks.deepspeed import check_deepspeed
from soul_exp.checks.folders import check_entries, check_readable, check_writable
from soul_exp.checks.memory import check_attack_memory, check_memory, check_prepare_memory
from soul_exp.checks.optimizer import check_optimizer, check_precision
from soul_exp.checks.options import check_options
from soul_exp.distributed.environment import launch_environment
from soul_exp.errors import UsageError
from soul_exp.evaluation import lm_eval_suite
from soul_exp.models import attention, loading, lora
from soul_exp.models.checkpoint import is_local
from soul_exp.models.language_model import fit_vocabulary, load_tokenizer
from soul_exp.models.layers import layer_of, layers_of, recomputing
from soul_exp.run import MEASURING, ModelSettings, Run
from soul_exp.stages import NAMES
from soul_exp.stages.prepare import unprepared
from soul_exp.stages.tune import untried

NO_ALTERNATES = (
    "type loss=npo, or give other plausible answers to the forget questions: task=custom reads them from the column "
    "alternate_answer"
)


@dataclass(frozen=True)
class Checked:
    """What the checks built and found out: the run, and why some of its metrics will be null."""

    run: Run
    reasons: Mapping[str, str]  # metric -> why it is not available
    need: disk.Need | None  # what the run will write to disk; None: unknown
    notes: Sequence[str] = ()  # what a user has to know of the models before the work, and a reader of the results


def check(config: Config, out: Path) -> Checked:
    """The run of `config`, to be carried out in `out`. Raises UsageError at the first thing that cannot work."""
    check_options(config)
    _check_choices(config)
    check_writable(out, "the run's folder")
    check_readable(Path(config["cache"]))
    check_entries(out)
    _check_compute(config["compute"], bool(config["tune"]))
    run = build(config)
    check_precision(run)
    attention.check(run.model.attention, run.compute.device, run.model.dtype)
    notes: list[str] = []
    _check_layers(run, notes)
    check_optimizer(run)
    _check_parts(run)
    lm_eval_suite.check(run.suite.suite, run.suite.data)
    run.schedule.accumulation(run.compute.processes)
    _check_models(run, notes)
    check_memory(run)
    check_prepare_memory(run)
    check_attack_memory(run)
    if run.adapter is not None and (run.unlearns or not run.stages) and (model := run.model.described()) is not None:
        with torch.device("meta"):
            notes.append(lora.coverage(run.adapter.wrapped(model, seed=0)))
    if unprepared(run) or untried(config, run):  # a complete cache is only read
        check_writable(run.cache, "cache")
    needed = disk.need(run)
    disk.check_run(needed, out, run.cache)
    reasons = availability.reasons(config, run)
    if config["input_based"]:
        _check_input_based(config, run)
    if run.save == "best":
        if run.unlearns and not run.schedule.save_steps:
            raise UsageError("save=best compares the weights of every checkpoint: set train.save_steps, or save=final")
        names = (FORGET_QUALITY, RETAIN, *([S_MIA] if run.best_s_mia else []))
        _check_validation(run, reasons, names, "save=best", "choose save=final")
        if run.retrained_records:
            raise UsageError("save=best needs the retrained model's answers to validation rows: give retrained.path")
    if run.evaluation.every and not any(name.startswith(VALIDATION) for name in {*run.metrics} - {*reasons}):
        raise UsageError("evaluate.every evaluates the validation part, and this run has none: leave it out")
    check_attacks(run)
    if run.tuning is not None:
        if run.stages and "prepare" not in run.stages:
            stages = ", ".join(run.stages)
            raise UsageError(f"stages=[{stages}]: trials are compared with prepared models, add prepare to stages")
        names = (FORGET_QUALITY, RETAIN, *([S_MIA] if run.tuning.rule.keywords.get("s_mia") else []))
        _check_validation(run, reasons, names, "tune", "choose task=tofu")
    if run.overwrite or not (out / results.NAME).exists():  # a finished run needs nothing
        check_hub(run)  # after all that is known without it
    if texts.are_here(run):
        rows = [item for attack in run.attacks.values() for item in attack.rows_read(run.task, run.model.template)]
        texts.check(run, run.parts if run.unlearns or not run.stages else (), rows)
    return Checked(run, reasons, needed, notes)


def _check_choices(config: Config) -> None:
    unknown = [stage for stage in config["stages"] if stage not in NAMES]
    if unknown:
        raise UsageError(f"stages={config['stages']}: {unknown[0]!r} is unknown, choose from [{', '.join(NAMES)}]")
    if config["wandb"]["mode"] == "online" and not os.environ.get("WANDB_API_KEY"):
        netrc = Path("~/.netrc").expanduser()
        if not netrc.is_file() or "wandb" not in netrc.read_text():
            raise UsageError("wandb.mode=online needs a key: export WANDB_API_KEY=<your key>, or type wandb login once")


def _check_validation(run: Run, reasons: Mapping[str, str], names: Sequence[str], what: str, advice: str) -> None:
    for name in names:
        if name not in run.metrics:
            raise UsageError(f"{what} compares by {name}, which task={run.choices.task} does not report: {advice}")
        if name in reasons:
            raise UsageError(f"{what} compares by {name}, which is not available: {reasons[name]}")


def _check_input_based(config: Config, run: Run) -> None:
    if not config["task"].get("system_prompt"):
        raise UsageError(
            f"input_based=true: task={run.choices.task} states no system prompt, type +task.system_prompt='<text>' or "
            f"input_based=false"
        )
    if not config["model"]["template"].get("system"):
        raise UsageError(
            "input_based=true: the model's template has no form with a system prompt, type "
            "+model.template.system='<text with {system} and {question}>' or input_based=false"
        )
    target = prepared_models.checkpoints(run).get("target")
    unanswered = target is None or answer_cache.cached_folder(run, target, run.system_prompt) is None
    if run.stages and "prepare" not in run.stages and unanswered:
        raise UsageError(f"stages={config['stages']} with input_based=true: prepare measures it, add prepare to stages")


def _check_parts(run: Run) -> None:
    for part in run.parts:
        if part not in run.task.parts:
            advice = NO_ALTERNATES if part == "alternate" else "choose another loss or task"
            raise UsageError(
                f"loss={run.choices.loss} with optimizer={run.choices.optimizer} needs the part {part!r}, but "
                f"task={run.choices.task} offers {', '.join(run.task.parts)}: {advice}"
            )
        if not run.task.parts[part].rows:
            raise UsageError(f"the part {part!r} of task={run.choices.task} is empty: give it rows")
        masked = any(item.mask_of is not None for row in run.task.parts[part].rows for item in row)
        if masked and run.model.attention in attention.PACKAGES:
            raise UsageError(
                f"loss={run.choices.loss} reads tokens that no position attends to, which model.attention="
                f"{run.model.attention} leaves out: choose one of {', '.join(attention.IN_TORCH)}"
            )


def _check_compute(compute: Config, tunes: bool) -> None:
    environment = launch_environment()
    wanted = environment.num_devices if environment and not tunes else compute["processes"]  # trials start all here
    if compute["device"] == "cuda" and (found := torch.cuda.device_count()) < wanted:
        raise UsageError(
            f"compute needs {wanted} CUDA device(s), found {found}: choose compute=cpu or fewer compute.processes"
        )
    if compute["deepspeed"]:
        check_deepspeed(compute["deepspeed"])


def _check_layers(run: Run, notes: list[str]) -> None:
    """Whether the model, unless it has to be downloaded, has the layer that the loss reads and can be recomputed."""
    path, again, reads_hidden = run.model.path, run.schedule.gradient_checkpointing, run.objective.reads_hidden
    if run.adapter is not None and run.compute.zero_stage == 3:
        raise UsageError("an adapter is not trained under ZeRO-3: choose compute=zero2, where each rank holds the base")
    if path and is_local(path):
        _check_given(path, "model.path", run.model, notes)
        if run.compute.zero_stage == 3 and lora.reads_embedding(path):
            raise UsageError(
                f"model.path={path} is an adapter of single tokens (trainable_token_indices), which reads the complete "
                f"embedding: choose another compute than ZeRO-3"
            )
        if lora.is_adapter(path) and not run.measures_only:
            raise UsageError(
                f"model.path={path} is an adapter, which can only be measured: type stages=[evaluate], or start from a "
                f"checkpoint that a run with adapter.merge=true saved"
            )
    wanted = (again or reads_hidden) and (path or run.model.scratch)
    model = run.model.described() if wanted else None
    if model is not None and reads_hidden:
        layer_of(layers_of(model), run.objective.layer)
    if model is not None and again:
        with recomputing(model):
            pass


def _check_models(run: Run, notes: list[str]) -> None:
    model, stages = run.model, list(run.stages)
    if run.task.trained_before and not model.path:
        raise UsageError(
            "task.trained_before=true takes model.path as the target, but no model.path is given: name a checkpoint, "
            "or type task.trained_before=false to have one trained"
        )
    if not model.path and not model.scratch:
        raise UsageError("the model has neither model.path nor model.scratch: give a checkpoint folder or hub name")
    if not model.path and model.scratch:
        loading.check_scratch(**vars(model.scratch))
        described = model.described()
        assert described is not None
        _check_family(described, model, "the model", notes)
    if run.retrained and run.retrained_records:
        raise UsageError("retrained.path and retrained.records are both given: keep one")
    if run.retrained_seeds > 1 and prepared_models.retrained_role(1) not in prepared_models.recipes(run):
        raise UsageError(
            f"retrained.seeds={run.retrained_seeds}: this run trains no retrained model, as it, its records or the "
            f"target are given: type retrained.seeds=1"
        )
    if run.retrained and is_local(run.retrained.path):
        _check_given(run.retrained.path, "retrained.path", model, notes)
    if run.unlearns and "prepare" not in stages and not prepared_models.exists(run, "target"):
        raise UsageError(f"stages={stages}: the target model is not in the cache yet, add prepare to stages")
    if MEASURING & {*stages} and not run.unlearns and not model.path:
        raise UsageError(
            f"stages=[{', '.join(stages)}] measures a checkpoint: name it with model.path=<folder or hub name>, or add "
            f"unlearn to stages"
        )


def check_hub(run: Run) -> None:
    """Raises UnreachableError if a checkpoint of `run` is neither available from the hub nor in its local cache."""
    for checkpoint in texts.checkpoints_of(run):
        loading.check_hub(checkpoint.path, checkpoint.revision)


def _check_given(path: str, option: str, settings: ModelSettings, notes: list[str]) -> None:
    """Whether the folder `path` holds a sound model that the run's `settings` fit, its tokenizer included."""
    tokenizer = settings.tokenizer or path
    loading.check_folder(Path(path), option, own_tokenizer=tokenizer == path)
    if tokenizer != path and Path(tokenizer).is_dir():
        loading.check_tokenizer(Path(tokenizer), "model.tokenizer")
    model = loading.load_model(path, weights=False)
    _check_family(model, settings, f"{option}={path}", notes)
    if is_local(tokenizer):
        rows = lora.embedding_of(model).num_embeddings
        fit_vocabulary(model, load_tokenizer(tokenizer))
        if getattr(model, lora.GROWN, False):
            notes.append(
                f"{option}={path}: none of the {rows} tokens can pad, so the embedding and the output head get one row "
                f"more, which takes about 1/{rows} of the probability"
            )


def _check_family(model: PreTrainedModel, settings: ModelSettings, label: str, notes: list[str]) -> None:
    """Whether models of that architecture compute with the attention that `settings` ask for; a note on their own."""
    cls = type(lora.bare(model))
    if (own := attention.of_family(cls, settings.attention)) != settings.attention and own == "eager":
        notes.append(f"{label}: {cls.__name__} has no model.attention=sdpa in the library, so its own, eager, is used")
