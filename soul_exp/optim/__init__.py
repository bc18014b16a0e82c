"""Optimizers: plain `torch.optim.Optimizer` subclasses that import nothing of soul_exp outside this package."""

from .elementwise import Elementwise as Elementwise
from .hybrid import Hybrid as Hybrid
from .influence import Influence as Influence
from .influence import woodfisher_bytes as woodfisher_bytes
from .kernels import STATISTICS as STATISTICS
from .mezo import MeZO as MeZO
from .momentum import AdamW as AdamW
from .momentum import Lion as Lion
from .momentum import Signum as Signum
from .muon import Muon as Muon
from .sam import SAM as SAM
from .sophia import Sophia as Sophia
