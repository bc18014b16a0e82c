"""Optimizers: plain `torch.optim.Optimizer` subclasses that import nothing of soul_exp outside this package."""

from .adamw import AdamW
from .elementwise import Elementwise
from .hybrid import Hybrid
from .influence import Influence, woodfisher_bytes
from .kernels import STATISTICS
from .lion import Lion
from .mezo import MeZO
from .muon import Muon
from .sam import SAM
from .signum import Signum
from .sophia import Sophia

__all__ = [
    "SAM",
    "STATISTICS",
    "AdamW",
    "Elementwise",
    "Hybrid",
    "Influence",
    "Lion",
    "MeZO",
    "Muon",
    "Signum",
    "Sophia",
    "woodfisher_bytes",
]
