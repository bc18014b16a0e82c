"""One rank's share of a run: the stages that hold the model, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soul_exp.build import Config, build
from soul_exp.files import explain_full_disk
from soul_exp.stages import RANK_STAGES
from soul_exp.stages.process import end_process, start_process
from soul_exp.stages.stage import CHECKPOINTS, RankJob
from soul_exp.stages.wandb_log import WandbLog
from soul_exp.training import checkpoints


def worker(
    rank: int,
    config: Config,
    reasons: Mapping[str, str],
    fingerprint: str,
    seconds: dict[str, float],
    folder: str,
    trials: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Carry out those of RANK_STAGES that `config` lists, in `folder`."""
    out, run = Path(folder), build(config)
    with explain_full_disk(out, clear=lambda: checkpoints.remove_unmarked(out / CHECKPOINTS)):
        first = rank == 0
        device = start_process(run.compute, rank, seed=run.seed, attention_kernel=run.model.attention)
        wandb_log = WandbLog(run, config, out) if first else None
        job = RankJob(config, run, out, reasons, seconds, trials, fingerprint, device, first, wandb_log)
        for stage in RANK_STAGES:
            if stage.wanted(run):
                job = stage.function(job)
        end_process()
