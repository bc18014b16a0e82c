"""Whether DeepSpeed knows each option of compute.deepspeed and takes its value, and whether the program can use it."""

import contextlib
import io
import logging
from collections.abc import KeysView, Mapping
from typing import Any, Self

from pydantic import ValidationError

from soul_exp.errors import UsageError, first_line
from soul_exp.ranges import Typed, as_typed
from soul_exp.schema import nearest

AT = "compute.deepspeed"
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")  # "auto", from `train`


def check_deepspeed(settings: Mapping[str, Any]) -> None:
    """Raises UsageError for the first option that DeepSpeed or this program does not know, or cannot use."""
    stage = (settings.get("zero_optimization") or {}).get("stage")
    if stage not in (1, 2, 3):
        raise UsageError(f"{AT}.zero_optimization.stage={stage}: expected 1, 2 or 3; else choose compute=ddp")
    _check_known(settings)
    for section in ("optimizer", "scheduler"):
        if section in settings:
            raise UsageError(
                f"{AT}.{section} would replace the run's own by DeepSpeed's: remove it, and "
                f"choose {'optimizer=' if section == 'optimizer' else 'train.lr_scheduler='}"
            )
    if (settings.get("fp16") or {}).get("enabled"):
        raise UsageError(f"{AT}.fp16 scales the loss, which no curvature here expects: choose precision=")


def _check_known(settings: Mapping[str, Any]) -> None:
    """Let DeepSpeed read `settings`: what it looks up are the options that it knows; its models check the sections."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):  # it says which accelerator it has found
        from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    given = _Recorded({**_without_auto(settings), **dict.fromkeys(BATCH, 1)})
    try:
        DeepSpeedConfig(given)
    except ValidationError as error:
        first = error.errors()[0]
        sections = [name for name, value in given.items() if isinstance(value, dict) and first["loc"][0] in value]
        key = ".".join([AT, *sections[:1], *map(str, first["loc"])])
        raise UsageError(f"{key}={as_typed(first['input'])}: {first['msg']} by DeepSpeed: correct it") from error
    except (ValueError, TypeError, AttributeError, AssertionError, KeyError, DeepSpeedConfigError) as error:
        raise UsageError(f"{AT}: DeepSpeed cannot read its options ({first_line(error)}): correct them") from error
    for name, value in settings.items():
        if name not in given.defaults:
            raise UsageError(f"{AT}.{name} is no option of DeepSpeed{nearest(name, given.defaults, AT)}")
        default = given.defaults[name]
        if isinstance(default, int | float) and value != "auto":
            kind = bool if isinstance(default, bool) else float
            if found := Typed(kind).mismatch(f"{AT}.{name}", value):
                raise UsageError(found)


def _without_auto(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` without what transformers fills in."""
    given = {name: _without_auto(value) if isinstance(value, Mapping) else value for name, value in settings.items()}
    return {name: value for name, value in given.items() if value != "auto"}


class _Recorded(dict[str, Any]):
    """Options that note which names are looked up, and with which default."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.defaults: dict[str, Any] = {}

    def __contains__(self, name: object) -> bool:
        self.defaults.setdefault(str(name))
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self.defaults.setdefault(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.defaults[name] = default
        return super().get(name, default)

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        return KeysView(self)  # whose `in` asks this mapping

    def __copy__(self) -> Self:
        return self
