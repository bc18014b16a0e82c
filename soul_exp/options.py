"""The one table of options: which values each may have, and what it changes; conf/ states meaning, unit and default.

When runs and prepared models are the same, columns of tables, names of folders, `tuned` and forecasts derive from it.
"""

import contextlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from soul_exp import ranges
from soul_exp.ranges import (
    BELOW,
    COUNT,
    FILLED,
    FILLED_OR_NULL,
    FLAG,
    POSITIVE,
    SEED,
    SHARE,
    SOME,
    TEXT,
    TEXT_OR_NULL,
    Choice,
    Number,
    Typed,
)


class Changes(Enum):
    """What a change of an option changes."""

    NUMBERS = "weights and metrics of the unlearned model"
    PREPARED = "the prepared models, and so weights and metrics"
    BASELINE = "the metrics of the input-based baseline only"
    CEILING = "the ceiling of forget quality, and metrics that compare with retrained models of several seeds"
    COURSE = "what is logged and saved during training, and the last digits of numbers"
    LAST_DIGITS = "the order of sums, and so the last digits of numbers"
    NOTHING = "no numbers, only names, folders, speed or size"


COMPARED = (Changes.NUMBERS, Changes.PREPARED, Changes.COURSE)  # two runs that differ in one are not the same
UNSET = object()


@dataclass(frozen=True)
class Option:
    """One option. The defaults apply to an option that the table does not name: it changes numbers."""

    values: ranges.Values | None = None  # None: the code that reads the option checks its value
    changes: Changes = Changes.NUMBERS
    when: tuple[str, Any] | None = None  # (key, value) that another option must have; else it changes nothing
    older: Any = UNSET  # the value that results written before the option existed had
    column: bool | None = None  # of a table, where runs differ; None: where it changes something
    in_folder_name: bool = True  # where it is typed
    size: bool = True  # whether it may change how many bytes a run writes
    is_path: bool = False  # whether its texts, where they are paths, name files

    @property
    def has_column(self) -> bool:
        return self.changes is not Changes.NOTHING if self.column is None else self.column


UNNAMED, SAME_SIZE, FILE = Option(), Option(size=False), Option(is_path=True)
NAME = Option(changes=Changes.NOTHING, in_folder_name=False)  # what only names, places or repeats
MIRROR = Option(TEXT_OR_NULL, Changes.NOTHING, in_folder_name=False, size=False)
ENGINE = Option(changes=Changes.LAST_DIGITS)
SCHEDULE = {
    "epochs": Number(0, 1_000_000, above=True),
    "batch_size": COUNT,
    "warmup_ratio": SHARE,
    "max_grad_norm": Number(0),
}
DEEPSPEED = (  # of its options, those that conf/compute/ states: how ranks share a model; any other one changes numbers
    "train_micro_batch_size_per_gpu train_batch_size gradient_accumulation_steps gradient_clipping bf16.enabled "
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization.*"
).split()

DIALECTS = ("ours", "tofu", "open_unlearning", "soul_release", "muse")  # of soul_exp/metrics/dialects.py

TABLE: dict[str, Option] = {  # `section.*`: every option of that section which has no entry of its own
    "name": Option(BELOW, Changes.NOTHING, in_folder_name=False),
    "seed": Option(SEED, column=False, size=False),  # runs that differ in it are one row
    "stages": Option(Typed(list[str]), Changes.NOTHING, in_folder_name=False),  # that a run unlearns is compared
    "overwrite": Option(FLAG, Changes.NOTHING, in_folder_name=False, size=False),
    "cache": Option(FILLED, Changes.NOTHING, in_folder_name=False),
    "resume": Option(Choice(("exact", "weights", "restart")), Changes.NOTHING, older="exact", in_folder_name=False),
    "save": Option(Choice(("final", "best", "none")), Changes.NOTHING, in_folder_name=False),  # best: best_keep
    "best_keep": Option(SHARE, when=("save", "best"), older=0.9),
    "best_s_mia": Option(SHARE, when=("save", "best"), older=0),
    "input_based": Option(FLAG, Changes.NOTHING, older=False, in_folder_name=False),  # it adds a row
    "paper": Option(FLAG, Changes.NOTHING, older=False, in_folder_name=False, size=False),
    "tuned": Option(TEXT_OR_NULL, column=False, size=False),  # a word in the status
    "tune.*": Option(older=None, column=False, size=False),  # its own column: what was chosen
    "attack": Option(changes=Changes.NOTHING, older={}, in_folder_name=False),  # as the next
    "attack.*": Option(changes=Changes.NOTHING, column=True),  # attacks add to the results of a finished run
    "tune.workers": Option(changes=Changes.NOTHING, size=False),
    "start": Option(changes=Changes.NOTHING),  # of a later request: the model of the one before, compared by content
    "choices.*": NAME,  # what they choose is compared
    "experiment": NAME,
    "hydra.*": Option(changes=Changes.NOTHING, size=False),
    "hydra/launcher": Option(changes=Changes.NOTHING, in_folder_name=False, size=False),
    "dialect": Option(Choice(DIALECTS), older=DIALECTS[0], size=False),
    "utility_suite": Option(Choice(("paper", "embedded", "none", "auto")), older="none"),
    "utility_limit": Option(SOME, older=None),
    "utility_data": Option(FILLED_OR_NULL, Changes.NOTHING, older=None),  # compared by content
    **{f"train.{key}": Option(values, size=False) for key, values in SCHEDULE.items()},
    "train.micro_batch_size": Option(SOME, Changes.COURSE, size=False),
    "train.logging_steps": Option(COUNT, Changes.COURSE, size=False),
    "train.save_steps": Option(SOME, Changes.COURSE),
    "train.log_gradients": Option(FLAG, Changes.COURSE, older=False, size=False),
    "train.max_steps": Option(SOME, size=False),
    "train.diverged_at": Option(Number(0, above=True, null=True), size=False),
    "train.diverged_floor": Option(Number(0), size=False),
    "train.gradient_checkpointing": Option(FLAG, Changes.NOTHING, older=False, column=True, size=False),
    "train.dropout": Option(FLAG, older=True, size=False),
    "train.*": SAME_SIZE,
    **{f"prepare.{key}": Option(values, Changes.PREPARED, size=False) for key, values in SCHEDULE.items()},
    "prepare.seed": Option(SEED, Changes.PREPARED),
    "prepare.adamw.lr": Option(POSITIVE, Changes.PREPARED),
    "prepare.micro_batch_size": Option(SOME, Changes.PREPARED),
    "prepare.logging_steps": Option(COUNT, Changes.NOTHING),
    "prepare.save_steps": Option(SOME, Changes.NOTHING),
    "prepare.*": Option(changes=Changes.PREPARED),
    "evaluate.batch_size": Option(COUNT, Changes.LAST_DIGITS, column=False, size=False),
    "evaluate.max_new_tokens": Option(COUNT, size=False),
    "evaluate.every": Option(SOME, Changes.NOTHING, older=None, in_folder_name=False, size=False),
    "evaluate.*": SAME_SIZE,
    **{f"retrained.{key}": Option(FILLED_OR_NULL, is_path=True) for key in ("path", "records")},
    "retrained.revision": Option(TEXT_OR_NULL),
    "retrained.seeds": Option(COUNT, Changes.CEILING, older=1),
    "wandb.mode": Option(Choice(("offline", "online", "disabled")), Changes.NOTHING, in_folder_name=False, size=False),
    "wandb.project": MIRROR,
    "wandb.entity": MIRROR,
    "wandb.*": Option(changes=Changes.NOTHING, size=False),
    "model.path": Option(FILLED_OR_NULL, Changes.PREPARED, is_path=True),
    "model.revision": Option(TEXT_OR_NULL, Changes.PREPARED),
    "model.tokenizer": Option(FILLED_OR_NULL, Changes.PREPARED, older=None, is_path=True),
    "model.scratch.*": Option(changes=Changes.PREPARED),
    "model.template.prompt": Option(TEXT, Changes.PREPARED),
    "model.template.answer": Option(TEXT, Changes.PREPARED),
    "model.template.system": Option(TEXT_OR_NULL, Changes.BASELINE, when=("input_based", True)),
    "model.max_length": Option(COUNT, Changes.PREPARED),
    "model.dtype": Option(changes=Changes.PREPARED),
    "model.knows_general": Option(FLAG),
    "model.published": Option(Typed(Mapping)),
    "model.num_weights": Option(Number(1, whole=True, null=True), Changes.NOTHING, column=False),
    **{f"task.{key}": FILE for key in "source forget retain holdout requests rtp scorer embedding".split()},
    "task.system_prompt": Option(TEXT_OR_NULL, Changes.BASELINE, when=("input_based", True)),
    "task.columns.alternate_answer": Option(older="alternate_answer"),
    "adapter": Option(older=None),
    "loss.*": SAME_SIZE,
    "optimizer.lr": Option(POSITIVE, size=False),
    "optimizer.*": SAME_SIZE,
    "compute.device": Option(Choice(("cpu", "cuda")), Changes.LAST_DIGITS),
    "compute.processes": Option(COUNT, Changes.LAST_DIGITS),
    "compute.threads": Option(COUNT, Changes.LAST_DIGITS),
    "compute.deepspeed": ENGINE,
    **{f"compute.deepspeed.{key}": ENGINE for key in DEEPSPEED},
    **{f"compute.deepspeed.{key}": Option(Typed(Mapping)) for key in ("bf16", "fp16", "zero_optimization")},
    **{f"compute.deepspeed.{key}": Option(Choice(("auto",)), Changes.LAST_DIGITS) for key in DEEPSPEED[:4]},
}
CHOSEN = ("optimizer.lr", "loss.gamma")  # by trials, where a run has them
ADDED_METRICS = frozenset(  # a finished run of before there was such a metric is the same, and has no value of it
    "open_unlearning_log10_forget_quality forget_ks_distance validation_s_mia validation_utility "
    "validation_forget_probability "
    "validation_forget_extraction_strength s_mia privleak muse_privleak forget_extraction_strength "
    "forget_exact_memorisation retain_extraction_strength retain_exact_memorisation mia_min_k_40_auc forget_accuracy "
    "retain_accuracy authors_accuracy facts_accuracy forget_paraphrased_question_probability "
    "retain_paraphrased_question_probability".split()
) | {
    f"mia_{attack}_{measure}"
    for attack in ("loss", "zlib", "reference", "min_k", "min_k_plus_plus", "gradnorm", "recall")
    for measure in ("auc", "tpr_1", "tpr_10")
}
ADDED_DATA = ("embedding",)  # likewise of its `data_hashes`: what only such a metric depends on
MOVED = {  # `_target_` in results and presets of earlier versions -> where it is now
    "soul_exp.adapters.Lora": "soul_exp.models.lora.Lora",
    "soul_exp.tune.best_forgetting": "soul_exp.stages.selection.best_forgetting",
}


def option_of(key: str) -> Option:
    """The entry of the option `key`, else that of the nearest section (of a group as `loss` its own), or UNNAMED."""
    sections = [key, *(".".join(key.split(".")[:end]) for end in range(key.count("."), 0, -1))]
    names = (key, *(f"{section}.*" for section in sections))
    return next((TABLE[name] for name in names if name in TABLE), UNNAMED)


def changes(key: str, config: Mapping[str, Any]) -> Changes:
    """What a change of the option `key` changes in a run of `config`."""
    option = option_of(key)
    idle = option.when is not None and config.get(option.when[0]) != option.when[1]
    return Changes.NOTHING if idle else option.changes


def prepared(section: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the `settings` in `section` that decide the weights of a prepared model."""
    return {key: value for key, value in settings.items() if option_of(f"{section}.{key}").changes is Changes.PREPARED}


def not_in_folder_names() -> list[str]:
    """The options that do not name a run's folder when they are typed."""
    return [key for key, option in TABLE.items() if not option.in_folder_name and not key.endswith(".*")]


def with_older_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of finished results under today's names, with the values of options that they lack."""
    found = with_todays_targets(config)
    for key, option in TABLE.items():
        *sections, name = key.removesuffix(".*").split(".")
        node: Any = found
        for section in sections:
            node = node.get(section) if isinstance(node, dict) else None
        if isinstance(node, dict) and option.older is not UNSET:
            node.setdefault(name, option.older)
    return found


def with_todays_targets(node: Any) -> Any:
    """`node` with every `_target_` of MOVED replaced."""
    if isinstance(node, Mapping):
        return {
            key: MOVED.get(str(value), value) if key == "_target_" else with_todays_targets(value)
            for key, value in node.items()
        }
    return [with_todays_targets(value) for value in node] if isinstance(node, list) else node


def leaves(node: Any, key: str = "", into_lists: bool = False) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every option below `node`; an empty mapping is a value, a list too unless `into_lists`."""
    if isinstance(node, Mapping) and (node or not key):
        inner: Iterable[tuple[Any, Any]] = node.items()
    elif isinstance(node, list) and into_lists:
        inner = enumerate(node)
    else:
        yield key, node
        return
    for name, value in inner:
        yield from leaves(value, f"{key}.{name}" if key else str(name), into_lists)


def defaults(target: Any) -> dict[str, Any]:
    """The default values of the parameters of a `_target_`."""
    return {name: p.default for name, p in parameters_of(target).items() if p.default is not p.empty}


def parameters_of(target: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a `_target_`; none where it does not exist, which `build` reports."""
    if not isinstance(target, str):
        return {}
    for eval_str in (True, False):  # annotations as texts, where one names what is not there
        with contextlib.suppress(Exception):  # importing it may raise anything
            return inspect.signature(pkgutil.resolve_name(target), eval_str=eval_str).parameters
    return {}
