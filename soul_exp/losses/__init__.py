"""What an unlearning run minimises: `forget term + gamma * retain term`.

B sequences, T answer positions, V vocabulary, H hidden size. A term is a plain function of what it names: parts of the
batch (each a `Scored`), and, by part name,

- `reference_nll`: the frozen start model's summed answer NLL, [B];
- `reference_logits`: its logits, [B, T, V];
- `hidden`: what the layer `loss.layer` of the model being trained puts out at answer positions, [B, T, H];
- `reference_hidden`: what that layer of the frozen start puts out, [B, T, H].

Naming one is what makes it available; a term pays for nothing else. Keyword-only parameters are constants that the YAML
states. Every batch mean is a mean over sequences of per-sequence values, so no number depends on how a batch is split.
"""

from soul_exp.losses.ascent import ce_u, grad_ascent, satimp, wga
from soul_exp.losses.distillation import kl, kl_forget, undial
from soul_exp.losses.objective import RETAIN_TERMS, Objective
from soul_exp.losses.preference import dpo, npo, simnpo
from soul_exp.losses.representation import hidden_mse, rmu
from soul_exp.losses.scored import IGNORED, Scored
from soul_exp.losses.supervised import nll, po, random_label

__all__ = [
    "IGNORED",
    "RETAIN_TERMS",
    "Objective",
    "Scored",
    "ce_u",
    "dpo",
    "grad_ascent",
    "hidden_mse",
    "kl",
    "kl_forget",
    "nll",
    "npo",
    "po",
    "random_label",
    "rmu",
    "satimp",
    "simnpo",
    "undial",
    "wga",
]
