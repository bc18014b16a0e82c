"""A copy of a run's numbers in wandb: offline by default, silent, and never read back."""

import math
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from soul_exp.build import Config
from soul_exp.results import HEADLINE, Results
from soul_exp.run import Run


class WandbLog(TrainerCallback):
    """One wandb run in the folder `out`; a trainer logs to it. `wandb.mode=disabled` leaves wandb unimported."""

    def __init__(self, run: Run, config: Config, out: Path) -> None:
        self.run: Any = None
        if run.wandb.mode == "disabled":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_CONSOLE", "off")
        import wandb

        self.run = wandb.init(**vars(run.wandb), dir=str(out), name=out.name, group=run.name, config=dict(config))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.run is not None and logs:
            finite = {f"train/{key}": value for key, value in logs.items() if math.isfinite(value)}
            self.run.log(finite, step=state.global_step)

    def finish(self, results: Results) -> None:
        """Put the metrics, the headline keys and the seconds into the summary and close the run."""
        if self.run is None:
            return
        summary: dict[str, Any] = {key: getattr(results, key) for key in HEADLINE}
        summary |= {f"{model}/{key}": value for model, given in results.metrics.items() for key, value in given.items()}
        summary |= {f"seconds/{stage}": value for stage, value in results.seconds.items()}
        summary |= {"status": results.status, "peak_memory_gib": results.peak_memory_gib}
        self.run.summary.update({key: value for key, value in summary.items() if value is not None})
        self.run.finish()
