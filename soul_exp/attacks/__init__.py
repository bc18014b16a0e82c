"""Attacks: what may bring back what a model was made to forget, tried alike on every model that a run compares."""

from soul_exp.attacks.attack import Attack, Found, Target
from soul_exp.attacks.depth import Depth
from soul_exp.attacks.prompts import Prompts
from soul_exp.attacks.prune import Prune
from soul_exp.attacks.quantise import Quantise
from soul_exp.attacks.relearn import Relearn, RetrainOnPart
from soul_exp.attacks.retention import Retention
from soul_exp.attacks.sample import Sample

__all__ = ["Attack", "Depth", "Found", "Prompts", "Prune", "Quantise"]
__all__ += ["Relearn", "Retention", "RetrainOnPart", "Sample", "Target"]
