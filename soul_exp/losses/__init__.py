"""What an unlearning run minimises: `forget term + gamma * retain term`.

B sequences, T answer positions, V vocabulary, H hidden size. A term is a plain function of the values that it names:
parts of the batch (each a `Scored`), and these mappings from part to tensor:

- `reference_nll`: the summed answer NLL of the frozen start model, [B];
- `reference_logits`: its logits at answer positions, [B, T, V];
- `hidden`: the output of layer `loss.layer` of the model being trained at answer positions, [B, T, H];
- `reference_hidden`: the output of that layer of the frozen start model, [B, T, H].

The run computes only the values that a term names. Keyword-only parameters are constants of the YAML. Every batch mean
is a mean over sequences of per-sequence values, so no number depends on how a batch is split.

- `ascent`: grad_ascent, wga, satimp, ce_u. Make the answers less likely.
- `distillation`: undial, kl_forget, kl. Compare distributions with those of the start model.
- `preference`: npo, simnpo, dpo. Compare likelihoods with those of the start model, through a sigmoid.
- `supervised`: po, random_label, nll. Make other answers, or the retained ones, more likely.
- `representation`: rmu, hidden_mse. Move the output of a layer, or hold it.
- `objective`: the two terms of a run; `scored`: a part of the batch under the current model.
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
