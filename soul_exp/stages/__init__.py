"""The stages of a run, in their order: to add one, write its function and name it here."""

from soul_exp.stages import evaluate, prepare, tune, unlearn
from soul_exp.stages.stage import Job, RankJob, Stage

STAGES: tuple[Stage[Job], ...] = (  # in the process that started the run; they start workers of their own
    Stage("prepare", lambda run: True, prepare.prepare),  # what exists may still have to answer the probes
    Stage("tune", lambda run: run.tuning is not None, tune.tune, listed=False),
)
RANK_STAGES: tuple[Stage[RankJob], ...] = (  # one after the other in one group of workers, which hold the model
    Stage("unlearn", lambda run: run.unlearns, unlearn.unlearn),
    Stage("evaluate", lambda run: "evaluate" in run.stages, evaluate.evaluate),
)
# the values of the option `stages`
NAMES = (*(each.name for each in STAGES if each.listed), *(each.name for each in RANK_STAGES if each.listed))
