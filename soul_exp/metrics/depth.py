"""How much of what the retrained model lacks, block by block, a model lacks too. N items, L blocks.

The original model answers while the output of one of its blocks is exchanged for another model's. What an answer loses
by that, in nats per token, is what the other model's state lacks of it there.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from soul_exp.metrics.answers import Answers, UndefinedError
from soul_exp.metrics.scale import Scale

FORGET, RETAIN, BLOCKS = "forget", "retain", "blocks"  # two branches, and the point of each
LEAST = 0.05  # nats per token: a block at which the retrained model's state loses no more does not count
MOST = 0.2  # of the loss on the forget items, on the retain items: else the two models differ in more than the rows
Points = Mapping[str, Mapping[str, Any]]


def losses(answers: Answers) -> np.ndarray:
    """What each item loses by the exchange of each block, in nats per token, [N, L]; nan without entity tokens."""
    return answers.numbers("entity_logp")[:, None] - answers.numbers("exchanged_logp")


def mean_losses(answers: Answers) -> list[float]:
    """The mean of `losses` at each block over the items that have entity tokens; nan if none has."""
    found = answers.per_example(losses)
    known = found[~np.isnan(found).any(axis=1)]
    return known.mean(axis=0).tolist() if len(known) else [float("nan")] * found.shape[1]


def _weights(retrained: Points) -> np.ndarray:
    """The loss by the retrained model's state where it counts, else 0, [N, L] of the forget items.

    It counts where it is above 0.05 and above the median of the retain items at that block.
    """
    forget, retain = (retrained[name][BLOCKS].per_example(losses) for name in (FORGET, RETAIN))
    known = retain[~np.isnan(retain).any(axis=1)]
    usual, changed = (float(np.mean(each[~np.isnan(each)])) if each.size else 0.0 for each in (known, forget))
    if not changed > 0 or usual > MOST * changed:
        raise UndefinedError(
            f"uninformative: the retrained model's states cost forget items {changed:.2f} and retain items {usual:.2f} "
            f"nats per token, expected at most {MOST:g} of the former: it differs in more than the rows, such as its "
            f"initial weights"
        )
    return np.where(forget > np.maximum(LEAST, np.median(known, axis=0)), forget, 0.0)  # nan is not above


@Scale("higher", 0, 1)
def uds(attacked: Points, retrained: Points) -> float:
    """How much of what the retrained model's states lack the attacked model's lack too, in [0, 1].

    1: all of it is gone, as in the retrained model; 0: all is there, as in the original. The mean over items of sum d_r
    clip(d_u / d_r, 0, 1) / sum d_r over the blocks that count, with d_u and d_r the losses by the attacked and by the
    retrained model's states. Items without a block that counts do not. Of a model of two blocks it compares one block
    and the output. Source: UDS, arXiv 2605.24614.
    """
    weights, own = _weights(retrained), attacked[FORGET][BLOCKS].per_example(losses)
    counted = weights.any(axis=1)
    if not counted.any():
        raise UndefinedError("at no block does the retrained model's state cost a forget item enough to count")
    lacking = np.where(weights > 0, np.clip(own, 0, weights), 0.0)
    return float(np.mean(lacking[counted].sum(axis=1) / weights[counted].sum(axis=1)))


@Scale("higher", 0, 1, no_interval="it counts the items that can tell, of which no sample is drawn")
def items_in_uds(attacked: Points, retrained: Points) -> float:
    """The share of the forget items over which `uds` is a mean, in [0, 1]: those with a block that counts.

    It is the same for every attacked model. The others have no entity tokens, or the retrained model lacks nothing.
    """
    return float(_weights(retrained).any(axis=1).mean())
