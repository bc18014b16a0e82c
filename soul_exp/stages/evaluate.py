"""The stage that evaluates: the unlearned model answers every probe, and results.json compares it with the others."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from soul_exp import results
from soul_exp.artifacts import answer_cache
from soul_exp.distributed import zero3
from soul_exp.stages.stage import CHECKPOINTS, RECORDS, RankJob
from soul_exp.stages.summary import summary
from soul_exp.stages.unlearn import load
from soul_exp.training import checkpoints

log = logging.getLogger(__name__)


def evaluate(job: RankJob) -> RankJob:
    """Evaluate the model of `job`, or the one that model.path names; rank 0 writes records and results.json."""
    run = job.run
    lm = job.lm or load(run, run.model.checkpoint, job.device)
    job.seconds["unlearn"] = job.outcome.seconds if job.outcome else 0.0
    start = time.perf_counter()
    finite = zero3.is_finite(lm.model)  # else it cannot answer
    answers = answer_cache.answers_of(lm, run, "unlearned") if finite else {}
    job.seconds["evaluate"] = time.perf_counter() - start
    if job.first:
        log.info("evaluate unlearned: %d probes in %.0f s", len(run.task.probes), job.seconds["evaluate"])
        answer_cache.write_answers(job.out / RECORDS, answers)
        found = summary(job, answers)
        results.write(job.out, found)
        assert job.wandb_log is not None
        job.wandb_log.finish(found)
        checkpoints.remove_all(job.out / CHECKPOINTS)
    return replace(job, lm=lm)
