"""Whether two configurations describe the same run: the options that decide its numbers, and the differences."""

from collections.abc import Mapping, Sequence
from typing import Any

from soul_exp import options


def with_rates(config: Mapping[str, Any], lr: Any, gamma: Any) -> dict[str, Any]:
    """`config` with this learning rate and this gamma, or lists of those that were tried."""
    return {**config, "optimizer": {**config["optimizer"], "lr": lr}, "loss": {**config["loss"], "gamma": gamma}}


def compared(config: Mapping[str, Any], tried: Sequence[tuple[float, float]] = ()) -> dict[str, Any]:
    """The values that two runs must share to be the same: options.TABLE's that change more than the last digits.

    Of a tuned run these are all (learning rate, gamma) that it `tried`, not those it chose.
    """
    if tried:
        config = {**with_rates(config, *map(list, zip(*tried, strict=True))), "tuned": None}
    config = {**config, "tune": config.get("tune") or None}
    unlearned = "unlearn" in config["stages"] or not config["stages"]  # or a checkpoint is measured as it is
    return {**_kept(config, config), "unlearned": unlearned}


def _kept(node: Mapping[str, Any], config: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in node.items():
        key = f"{at}.{name}" if at else name
        if isinstance(value, Mapping) and value:
            if inner := _kept(value, config, key):
                found[name] = inner
        elif options.changes(key, config) in options.COMPARED:
            found[name] = value
    return found


def differences(old: Any, new: Any, at: str = "") -> list[str]:
    """The dotted keys, with both values, at which two results of `compared` differ; an absent one has its default."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        added = options.ADDED_METRICS if at == "task.metrics" else ()
        keys = [*old, *(key for key in new if key not in old and key not in added)]
        given = options.defaults(new.get("_target_")) if len(keys) > len(old) or len(keys) > len(new) else {}
        given = {key: {} for key in keys if isinstance(old.get(key, new.get(key)), Mapping)} | given
        pairs = [(key, old.get(key, given.get(key)), new.get(key, given.get(key))) for key in keys]
        return [line for key, a, b in pairs for line in differences(a, b, f"{at}.{key}" if at else key)]
    old, new = (list(value) if isinstance(value, tuple) else value for value in (old, new))
    return [] if old == new else [f"{at}: {old} before, {new} now"]
