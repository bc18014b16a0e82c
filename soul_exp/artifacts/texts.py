"""Whether a run's models can read its texts: tokens are counted and compared before anything is trained."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from soul_exp.artifacts import prepared_models
from soul_exp.artifacts.prepared_models import foreign_tokenizer
from soul_exp.data import Encoded, Item, Template, content_hash, encode
from soul_exp.errors import UsageError
from soul_exp.evaluation.probing import beyond, num_new_tokens, scored_items
from soul_exp.models import loading
from soul_exp.models.checkpoint import Checkpoint
from soul_exp.models.language_model import train_tokenizer
from soul_exp.models.layers import max_positions
from soul_exp.run import Models, ModelSettings
from soul_exp.tasks.task import Probe, Task, evenly_spaced, rephrased_probes

CHUNK = 64  # rows that are read together
NUM_OTHERS = 2000
NUM_ADDED = 4  # tokens that a tokenizer adds to a text, at most
_CHECKED: set[str] = set()
Read = Callable[..., list[Encoded]]  # of items, the tokens that the model reads


def start_tokenizer(models: Models) -> PreTrainedTokenizerBase:
    """The tokenizer of the prepared models: that of the model they start from, or a new one, of the target's rows."""
    model = models.model
    if model.path:
        return prepared_models.tokenizer_of(model, model.checkpoint)
    assert model.scratch is not None
    texts = ["".join(model.template.texts(item)) for item in models.task.target_rows]
    return train_tokenizer(texts, model.scratch.vocab_size, model.max_length)


def are_here(models: Models) -> bool:
    """Whether `check` reads files of this machine only; otherwise a worker calls it, which may download."""
    return all(Path(each.path).is_dir() for each in checkpoints_of(models))


def checkpoints_of(models: Models) -> list[Checkpoint]:
    """The checkpoints that `check` reads: the one to start from, the retrained one, and the one of the tokenizer."""
    name = models.model.tokenizer
    tokenizer = Checkpoint(name, models.model.revision if name == models.model.path else None) if name else None
    return [each for each in (_start(models), models.retrained, tokenizer) if each is not None]


def check(models: Models, parts: Sequence[str] = (), more_rows: Sequence[Item] = ()) -> None:
    """Raises UsageError unless the models of a run read the rows of `parts`, prepare and the probes, and `more_rows`.

    That is: no text is longer than they read, alone and under the system prompt; answers end before the last position,
    and are no longer than the longest text that the model is made for; and a retrained
    model that is given makes the same tokens of the probes. A process checks the same texts once.
    """
    given = [at and at.identity() for at in (_start(models), models.retrained)]
    settings = [models.model, models.evaluation, models.system_prompt, models.stages, parts, more_rows]
    key = content_hash([models.task.hashes, given, foreign_tokenizer(models.model), settings], default=vars)
    if key not in _CHECKED:
        _check(models, parts, more_rows)
        _CHECKED.add(key)


def _check(models: Models, parts: Sequence[str], more_rows: Sequence[Item]) -> None:
    task, model, start = models.task, models.model, _start(models)
    made = start or (
        prepared_models.checkpoints(models)["target"] if prepared_models.exists(models, "target") else None
    )
    tokenizer = prepared_models.tokenizer_of(model, made) if made else start_tokenizer(models)
    prepares = "prepare" in models.stages or not models.stages
    rows = [*task.target_rows, *task.retrained_rows] if prepares and prepared_models.recipes(models) else []
    rows += [item for part in parts for row in task.parts[part].rows for item in row]
    probed = [*task.prefix, *(item for probe in _asked(task) for item in scored_items(probe))]
    described = _described(start, model)
    positions = max_positions(described)
    if positions is None:  # else `_check_ends` knows how long each answer may be
        _check_length(models.evaluation.max_new_tokens, described)
    longest = min(model.max_length, positions or model.max_length)
    prompts = [None, models.system_prompt] if models.system_prompt is not None else [None]
    for prompt in prompts:
        template = replace(model.template, system_prompt=prompt)
        read = functools.partial(encode, tokenizer=tokenizer, template=template, max_length=longest)
        trained = [*_some(rows, template, longest), *_some(more_rows, template, longest)] if prompt is None else []
        _check_rows(task, list(dict.fromkeys([*probed, *trained])), read)
        if positions is not None:
            _check_ends(models, positions, read)
    if models.retrained and model.tokenizer is None:
        other = prepared_models.tokenizer_of(model, models.retrained)
        for item, ours, theirs in zip(probed, read(probed), read(probed, tokenizer=other), strict=True):
            if ours != theirs:
                raise UsageError(
                    f"retrained.path={models.retrained.path}: its tokenizer makes other tokens of {item.prompt[:60]!r} "
                    f"than that of {start.path if start else 'the model'}, so that numbers per token cannot be "
                    f"compared: give the model that was retrained from the same one"
                )


def _asked(task: Task) -> list[Probe]:
    return [*task.probes.values(), *rephrased_probes(task.probes).values()]


def _some(rows: Sequence[Item], template: Template, longest: int) -> list[Item]:
    """Of many `rows` those that may have more than `longest` tokens, of a byte or more each, and NUM_OTHERS others."""
    unique = list(dict.fromkeys(rows))
    sizes = [len("".join(template.texts(item)).encode()) for item in unique]
    long = [item for item, size in zip(unique, sizes, strict=True) if size + NUM_ADDED > longest]
    return long + evenly_spaced(unique, NUM_OTHERS)


def _start(models: Models) -> Checkpoint | None:
    """The checkpoint whose tokenizer the run's models have; None: a new one."""
    if models.published is not None and not models.measures_only:
        return models.published
    return models.model.checkpoint if models.model.path else None


def _check_rows(task: Task, items: Sequence[Item], read: Read) -> None:
    """Raises the error of the first of `items` that cannot be read.

    It begins with its file and line, if it has one, and ends with what leaves it out, if that is an option.
    """
    for some in (items[start : start + CHUNK] for start in range(0, len(items), CHUNK)):
        try:
            read(some)
        except UsageError:
            for item in some:
                try:
                    read([item])
                except UsageError as error:
                    instead = f", or type {task.optional[item]}" if item in task.optional else ""
                    raise UsageError(f"{task.location_of(item)}{error}{instead}") from None
            raise


def _described(start: Checkpoint | None, model: ModelSettings) -> PreTrainedModel:
    described = loading.load_model(start.path, start.revision, weights=False) if start else model.described()
    assert described is not None
    return described


def _check_length(max_new_tokens: int, model: PreTrainedModel) -> None:
    """Raises UsageError if answers may be longer than the longest text that the model's configuration states."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and max_new_tokens > longest:
        raise UsageError(
            f"evaluate.max_new_tokens={max_new_tokens}: expected at most {longest}, the longest text that the model is "
            f"made for (max_position_embeddings)"
        )


def _check_ends(models: Models, positions: int, read: Read) -> None:
    """Raises UsageError if an answer of the longest allowed length would end beyond the last of the `positions`."""
    free = [(item, probe.cut) for probe in _asked(models.task) if probe.generate for item in probe.items]
    new, rows = models.evaluation.max_new_tokens, read([item for item, _ in free])
    limits = [num_new_tokens(row, cut, new) for (_, cut), row in zip(free, rows, strict=True)]
    if (last := beyond(rows, limits, positions)) is not None:
        item, size = free[last][0], rows[last].num_prompt
        raise UsageError(
            f"{models.task.location_of(item)}the prompt {item.prompt[:60]!r} has {size} tokens, and with "
            f"evaluate.max_new_tokens={new} its answer can pass the {positions} positions of the model: type "
            f"evaluate.max_new_tokens={max(1, positions + 1 - size)}, or shorten the prompt"
        )
