"""The stages of a run, in their order: to add one, write its function and name it here."""

from typing import Any

from soul_exp.stages import attack, evaluate, prepare, tune, unlearn
from soul_exp.stages.stage import Job, RankJob, Stage

STAGES: tuple[Stage[Job], ...] = (  # in the process that started the run; they start workers of their own
    Stage("prepare", lambda run: True, prepare.prepare),  # what exists may still have to answer the probes
    Stage("tune", lambda run: run.tuning is not None, tune.tune, listed=False),
)
RANK_STAGES: tuple[Stage[RankJob], ...] = (  # one after the other in one group of workers, which hold the model
    Stage("unlearn", lambda run: run.unlearns, unlearn.unlearn),
    Stage("evaluate", lambda run: "evaluate" in run.stages or "attack" in run.stages, evaluate.evaluate),
)
LAST_STAGES: tuple[Stage[Job], ...] = (  # as STAGES, once there are results
    Stage("attack", lambda run: "attack" in run.stages, attack.attack),
)
# the values of the option `stages`
EVERY: tuple[Stage[Any], ...] = (*STAGES, *RANK_STAGES, *LAST_STAGES)
NAMES = tuple(each.name for each in EVERY if each.listed)
