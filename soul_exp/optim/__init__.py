"""Optimizers: plain `torch.optim.Optimizer` subclasses that import nothing of soul_exp outside this package."""

from .elementwise import Elementwise
from .hybrid import Hybrid
from .influence import Influence, woodfisher_bytes
from .kernels import STATISTICS
from .mezo import MeZO
from .momentum import AdamW, Lion, Signum
from .muon import Muon
from .sam import SAM
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
