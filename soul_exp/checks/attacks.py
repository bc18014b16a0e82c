"""Whether every attack can be carried out, before the work starts."""

from transformers import PreTrainedModel

from soul_exp.artifacts import prepared_models
from soul_exp.attacks.attack import SAME, check_same_shapes, shapes_of
from soul_exp.errors import UsageError
from soul_exp.models import loading, lora
from soul_exp.models.checkpoint import is_local
from soul_exp.run import Run


def check_attacks(run: Run) -> None:
    """Whether every attack has what it needs; without the stage they are only checked."""
    wanted = "attack" in run.stages
    if wanted and not run.attacks:
        raise UsageError("stages has attack, but no attack is chosen: type attack=[relearn,quantise], or leave it out")
    if run.attacks and run.stages and not wanted:
        raise UsageError(
            f"attack=[{','.join(run.attacks)}] needs its stage: type stages=[{','.join([*run.stages, 'attack'])}]"
        )
    if wanted and run.unlearns and run.save == "none":
        raise UsageError("save=none keeps no model that could be attacked: type save=final")
    names = [name for metrics in run.attack_metrics.values() for name in metrics]
    if twice := [name for name in {*names} if names.count(name) > 1 or name in run.metrics]:
        raise UsageError(f"the metric {min(twice)} is stated twice, by an attack and another one: rename one")
    for name, attack in run.attacks.items():
        if (why := attack.missing(run.task)) is not None:
            raise UsageError(f"attack={name} is not available: {why}")
    reading = ",".join(name for name, attack in run.attacks.items() if attack.reads_original)
    if wanted and reading:
        _check_comparable(run, f"attack=[{reading}]")


def _check_comparable(run: Run, what: str) -> None:
    """Whether there is an original model for attacks, named `what`, and models given beside it are comparable."""
    target = prepared_models.checkpoints(run).get("target")
    is_here = prepared_models.exists(run, "target")
    if not is_here and "prepare" not in run.stages:
        found = "this run has none" if target is None else "it is not in the cache"
        raise UsageError(
            f"{what} compares models with the original, and {found}: run the job that made model.path first, with the "
            f"same cache, or leave the attack out"
        )
    if target is None or not (is_here and is_local(target.path)):
        return
    shapes, vocabulary = shapes_of(_skeleton(target.path)), prepared_models.tokenizer_of(run.model, target).get_vocab()
    others = {"retrained.path": run.retrained, "model.path": run.model.checkpoint if run.measures_only else None}
    for option, at in others.items():
        if at is not None and is_local(at.path):
            label = f"{what}: {option}={at.path}"
            check_same_shapes(shapes_of(_skeleton(at.path)), shapes, label)
            if prepared_models.tokenizer_of(run.model, at).get_vocab() != vocabulary:
                raise UsageError(f"{label} has other tokens than the original: {SAME}")


def _skeleton(path: str) -> PreTrainedModel:
    """The model in the folder `path`, its adapter merged, without storage for its weights."""
    model = loading.load_model(path, weights=False)
    has_adapter = lora.is_wrapped(model)
    return lora.merged(model) if has_adapter else model
