"""Whether two configurations describe the same run: what is compared, and how a difference is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# these do not change the numbers, or (the data, and so what a sequence starts from) are compared by content
NOT_COMPARED = (
    *("name", "stages", "overwrite", "cache", "save", "compute", "wandb", "choices", "resume", "start"),
    *("input_based", "utility_data"),
)
NO_NUMBER = ("logging_steps", "save_steps")  # options of `prepare` that change no weight


def compared(config: Mapping[str, Any], tried: Sequence[tuple[float, float]] = ()) -> dict[str, Any]:
    """What two runs must share to be the same; of tuned runs not the numbers chosen, but all that were `tried`."""
    if tried:
        rates, gammas = map(list, zip(*tried, strict=True))
        given = {"optimizer": {**config["optimizer"], "lr": rates}, "loss": {**config["loss"], "gamma": gammas}}
        config = {**config, **given, "tuned": None}
    kept = {key: value for key, value in config.items() if key not in NOT_COMPARED}
    kept["task"] = {key: value for key, value in config["task"].items() if key != "system_prompt"}
    form = {key: value for key, value in config["model"]["template"].items() if key != "system"}
    kept["model"] = {**config["model"], "template": form}
    kept["unlearned"] = "unlearn" in config["stages"] or not config["stages"]  # or a checkpoint measured as it is
    kept["tune"] = {key: value for key, value in (config.get("tune") or {}).items() if key != "workers"}
    kept["best_keep"] = config["best_keep"] if config["save"] == "best" else None  # other weights are measured
    kept["train"] = {key: value for key, value in config["train"].items() if key != "gradient_checkpointing"}
    kept["evaluate"] = {key: value for key, value in config["evaluate"].items() if key != "batch_size"}
    kept["prepare"] = {key: value for key, value in config["prepare"].items() if key not in NO_NUMBER}
    return kept


def differences(old: Any, new: Any, at: str = "") -> list[str]:
    """The dotted keys at which two configurations differ, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)]
    return [] if old == new else [f"{at}: {old} before, {new} now"]
