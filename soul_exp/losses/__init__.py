"""What an unlearning run minimises: `forget term + gamma * retain term`.

B sequences, T answer positions, V vocabulary, H hidden size. A term is a plain function of the values that it names:
parts of the batch (each a `Scored`), and these mappings from part to tensor, computed only where a term names them:

- `reference_nll`: the summed answer NLL of the frozen start model, [B];
- `reference_logits`: its logits at answer positions, [B, T, V];
- `hidden`: the output of layer `loss.layer` of the model being trained at answer positions, [B, T, H];
- `reference_hidden`: the output of that layer of the frozen start model, [B, T, H].

Keyword-only parameters are constants of the YAML. Every batch mean is a mean over sequences of per-sequence values, so
no number depends on how a batch is split.
"""

from soul_exp.losses.scored import IGNORED, Scored, precise
from soul_exp.losses.terms import *  # noqa: F403, every term under its own name: `soul_exp.losses.npo`
from soul_exp.losses.terms import __all__ as _terms

__all__ = ["IGNORED", "Scored", "precise"]
__all__ += _terms
