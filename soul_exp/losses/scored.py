"""One part of a batch, and its mean over tokens and then sequences. B sequences, T answer positions, V vocabulary."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of a padded position, torch's own convention


@dataclass(frozen=True)
class Scored:
    """A part under the current model: `logits` [B, T, V], `labels` [B, T] of answer and end token, -100 if padded."""

    logits: Tensor
    labels: Tensor

    @cached_property
    def mask(self) -> Tensor:
        """[B, T], true where there is a label."""
        return self.labels != IGNORED

    @cached_property
    def tokens(self) -> Tensor:
        """[B, T] the labels, 0 where padded, so that they can index a vocabulary."""
        return self.labels.clamp(min=0)

    @cached_property
    def logp(self) -> Tensor:
        """[B, T] log-probability of each label in nats, 0 where padded; computed in fp32 at least."""
        logits = precise(self.logits)
        # flat: along any but the last dimension torch's softmax takes several times as long
        flat = F.cross_entropy(logits.flatten(0, 1), self.labels.flatten(), ignore_index=IGNORED, reduction="none")
        return -flat.view_as(self.labels)

    @cached_property
    def num_tokens(self) -> Tensor:
        """[B] number of labels of each sequence."""
        return self.mask.sum(1)

    @cached_property
    def nll(self) -> Tensor:
        """[B] summed negative log-likelihood of each sequence's labels."""
        return -self.logp.sum(1)

    @cached_property
    def mean_nll(self) -> Tensor:
        """[B] negative log-likelihood per label of each sequence."""
        return self.nll / self.num_tokens

    def mean(self, values: Tensor) -> Tensor:
        """The mean over sequences of the mean over labels of `values` [B, T]; padded positions do not count."""
        return (values.masked_fill(~self.mask, 0.0).sum(1) / self.num_tokens).mean()


def precise(values: Tensor) -> Tensor:
    """`values` in fp32 at least."""
    return values if values.dtype == torch.float64 else values.float()
