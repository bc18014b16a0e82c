"""A copy of a run's numbers in wandb, which nothing reads: it neither ends nor delays a run."""

import json
import logging
import os
import shutil
import statistics
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from soul_exp.build import Config
from soul_exp.errors import first_line
from soul_exp.results import HEADLINE, Results, attack_points
from soul_exp.run import Run
from soul_exp.stages import trajectory
from soul_exp.training.capabilities import takes_one_step

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0  # in a thread, so that only a shorter run waits; then it is an offline run
START_SECONDS = 20.0  # that a run waits, at its end, for wandb itself to start
UPLOAD_SECONDS = 30.0  # at the end of an online run; `wandb sync` uploads what is left
QUIET = {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_ERROR_REPORTING": "false"}
CURVE = "extraction_strength"  # the measure of an attack's curves
FOLDER, ID = "wandb", "run_id.txt"  # in a run's folder, and there: the id of its wandb run


class WandbLog(TrainerCallback):
    """One wandb run of the folder `out`; its steps are the lines of `losses`, train.jsonl, and of its trajectory.

    The curves of attacks, whose axis is their own number of steps, and a table of all metrics come at the end.

    A run that continues after a kill continues the same wandb run, with all of its steps. `wandb.mode=disabled` leaves
    wandb unimported.
    """

    def __init__(self, run: Run, config: Config, out: Path, losses: Path) -> None:
        self.losses, self.read = losses, 0  # bytes
        self.num_validated = 0  # lines of the trajectory
        self.epochs = _epochs_in_a_step(run) if run.unlearns else 0.0
        self.started: Future[Any] = Future()  # the wandb run; None: there is none
        if run.wandb.mode == "disabled":
            self.started.set_result(None)
            return
        continues = losses.is_file() and losses.stat().st_size > 0
        threading.Thread(target=self._start, args=(run, config, out, continues), name="wandb", daemon=True).start()

    def _start(self, run: Run, config: Config, out: Path, continues: bool) -> None:
        try:
            self.started.set_result(_begun(run, config, out, continues))
        except Exception as error:  # whatever it is, the run goes on
            log.warning("wandb: %s: this run is not copied", first_line(error))
            self.started.set_result(None)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.started.done():
            self._guarded(self._send)

    def finish(self, results: Results | None = None) -> None:
        """Put metrics, headline keys and seconds of `results`, if any, into the summary, and close the run once."""

        def send_all(wandb_run: Any) -> None:
            self._send(wandb_run)
            if results is not None:
                for name, curve in _curves(results).items():
                    wandb_run.define_metric(f"{name}/*", step_metric=f"{name}/steps")
                    for steps in sorted(curve):
                        wandb_run.log({f"{name}/steps": steps, **curve[steps]})
                wandb_run.log({"metrics": _table(results)})
                wandb_run.summary.update(_summary(results))
            wandb_run.finish()

        self._guarded(send_all)
        self._forget()

    def _guarded(self, action: Callable[[Any], None]) -> None:
        """`action` on the wandb run, if there is one; an error ends the copy, not the run."""
        try:
            wandb_run = self.started.result(timeout=CONNECT_SECONDS + START_SECONDS)
            if wandb_run is not None:
                action(wandb_run)
        except Exception as error:
            what = first_line(error)
            log.warning(
                "wandb: %s: type wandb sync %s to upload the rest", what, self.losses.parent / FOLDER / "*run-*"
            )
            self._forget()

    def _forget(self) -> None:
        self.started = Future()
        self.started.set_result(None)

    def _send(self, wandb_run: Any) -> None:
        """Log what is new since the last time, in the order of steps; wandb already has those below its own."""
        by_step: dict[int, dict[str, Any]] = {}
        for step, values in (*self._training(), *self._validated()):
            by_step.setdefault(step, {}).update(values)
        for step in sorted(by_step):
            if step >= wandb_run.starting_step:
                wandb_run.log({key: value for key, value in by_step[step].items() if value is not None}, step=step)

    def _training(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if not self.losses.is_file():
            return
        with self.losses.open("rb") as file:
            file.seek(self.read)
            while (line := file.readline()).endswith(b"\n"):
                self.read = file.tell()
                values = json.loads(line)
                values["epoch"] = values["step"] * self.epochs
                yield values.pop("step"), {f"train/{key}": value for key, value in values.items()}

    def _validated(self) -> Iterator[tuple[int, dict[str, Any]]]:
        lines = trajectory.read(self.losses.parent / trajectory.NAME)
        new, self.num_validated = lines[self.num_validated :], len(lines)
        for line in new:
            step = line.pop("step")
            values = {key: value for key, value in line.items() if not isinstance(value, Mapping)}
            yield step, {f"validation/{key}": value for key, value in values.items()}


def _begun(run: Run, config: Config, out: Path, continues: bool) -> Any:
    """The wandb run of `out`, which `continues` the one before or replaces it; offline where it cannot be online."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import wandb

    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    if not (folder / ID).is_file():
        (folder / ID).write_text(uuid.uuid4().hex[:12])
    given: dict[str, Any] = {
        "project": run.wandb.project,
        "entity": run.wandb.entity,
        "dir": str(out),
        "id": (folder / ID).read_text().strip(),
        "resume": "allow" if continues else None,  # None: what wandb has of this id is replaced
        "name": out.name,
        "group": run.name,
        "job_type": "unlearn" if run.unlearns else "evaluate",
        "tags": list(dict.fromkeys(choice for choice in vars(run.choices).values() if choice != "none")),
        "config": dict(config),
    }

    def begin(mode: str) -> Any:
        for rest in _runs_in(folder):  # all that they held stands in train.jsonl
            shutil.rmtree(rest, ignore_errors=True)
        settings = wandb.Settings(
            init_timeout=CONNECT_SECONDS, finish_timeout=UPLOAD_SECONDS, finish_timeout_raises=True
        )
        return wandb.init(mode=mode, settings=settings, **given)  # type: ignore[arg-type]

    try:
        return begin(run.wandb.mode)
    except Exception as error:  # no network, a wrong key, no such project, ...
        if run.wandb.mode == "offline":
            raise
        log.warning("wandb: %s: offline, type wandb sync %s to upload it", first_line(error), folder / "offline-run-*")
        wandb.teardown()  # else its service holds on to the id
        return begin("offline")


def _runs_in(folder: Path) -> Iterator[Path]:
    """The folders of wandb's runs; `latest-run`, a link, is none."""
    return (path for path in folder.glob("*run-*") if path.is_dir() and not path.is_symlink())


def _epochs_in_a_step(run: Run) -> float:
    """Passes over what is to be forgotten, in one optimizer step."""
    leading = min(run.parts, key=lambda name: name == "retain")
    rows = len(run.task.parts[leading].rows)
    return 1.0 if takes_one_step(run.make_optimizer) else run.schedule.batch_size / rows


def _curves(results: Results) -> dict[str, dict[int, dict[str, float]]]:
    """Attack -> number of its steps -> model and branch -> extraction strength, of attacks whose points are steps."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for attack, model, branch, point, measures, _ in attack_points(results):
        if point.isdigit() and (value := measures.get(CURVE)) is not None:
            at = found.setdefault(f"attack/{attack}", {}).setdefault(int(point), {})
            at[f"attack/{attack}/{model}-{branch}"] = value
    return found


def _table(results: Results) -> Any:
    """A row for each metric of each model, with the ends of its interval."""
    import wandb

    rows = [
        [model, name, value, *(results.intervals.get(model, {}).get(name) or (None, None))]
        for model, given in results.metrics.items()
        for name, value in given.items()
    ]
    return wandb.Table(columns=["model", "metric", "value", "low", "high"], data=rows)


def _summary(results: Results) -> dict[str, Any]:
    found: dict[str, Any] = {key: getattr(results, key) for key in HEADLINE}
    found |= {f"{model}/{key}": value for model, given in results.metrics.items() for key, value in given.items()}
    for model, given in results.intervals.items():
        for key, ends in given.items():
            found |= {f"{model}/{key}/{end}": value for end, value in zip(("low", "high"), ends or (), strict=False)}
    found |= {f"seconds/{stage}": value for stage, value in results.seconds.items()}
    found |= {f"passes/{kind}": value for kind, value in results.passes.items()}
    found |= {f"ceiling/{key}": statistics.median(values) for key, values in results.ceiling.items() if values}
    found |= {"collapsed": None if results.collapsed is None else bool(results.collapsed)}
    found |= {"status": results.status, "peak_memory_gib": results.peak_memory_gib}
    return {key: value for key, value in found.items() if value is not None}
