"""A language model as lm-eval sees it; the ranks divide its forward passes. Importing lm_eval here takes seconds."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import torch
from tqdm.auto import tqdm

from soul_exp import compat
from soul_exp.distributed import zero3
from soul_exp.distributed.ranks import in_batches
from soul_exp.models.language_model import LanguageModel

MAX_POSITIONS = 8192  # of a forward pass, which computes logits at all of them: 1 GB for 32,000 tokens in fp32
MAX_NLL = 700.0  # nats per word: exp of more is not a finite float, and an unlearned model reaches it


class SharedModel(compat.SharedLikelihoods, lm_eval.models.huggingface.HFLM):
    """lm-eval's wrapper of a model; `in_batches` divides its forward passes over the ranks."""

    def __init__(self, lm: LanguageModel, batch_size: int, label: str) -> None:
        super().__init__(
            pretrained=lm.model,
            tokenizer=lm.tokenizer,
            backend="causal",
            max_length=lm.max_length,
            batch_size=2**30,  # all texts at once
            logits_cache=False,  # one forward pass per call, as lockstep needs
            softmax_dtype=torch.float32,
        )
        self._lm, self._num_texts, self._label = lm, batch_size, f"{label}: utility"

    def share(
        self, requests: Sequence[Any], compute: Callable[[Sequence[Any]], list[tuple[float, bool]]]
    ) -> list[tuple[float, bool]]:
        """The likelihood of each request, the ranks dividing batches of texts of similar length."""
        lengths = [min(len(context) + len(continuation), self._lm.max_length) for _, context, continuation in requests]
        found: dict[int, tuple[float, bool]] = {}
        widths = [1 << (length - 1).bit_length() for length in lengths]  # the next power of 2
        for width in sorted(set(widths), reverse=True):  # short texts need not go in a long one's small batches
            rows = [i for i, its_width in enumerate(widths) if its_width == width]

            def work(numbers: Sequence[int], rows: Sequence[int] = rows) -> list[tuple[float, bool]]:
                return compute([requests[rows[i]] for i in numbers])

            of_rows, num_texts = [lengths[i] for i in rows], max(1, min(self._num_texts, MAX_POSITIONS // width))
            done = in_batches(of_rows, work, num_texts, label=self._label, lockstep=zero3.is_sharded(self._lm.model))
            found |= zip(rows, done, strict=True)
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        floors = [-MAX_NLL * len(request.args[0].split()) for request in requests]
        found = super().loglikelihood_rolling(requests, disable_tqdm)
        return [max(value, floor) for value, floor in zip(found, floors, strict=True)]  # nan stays nan


@contextmanager
def quiet() -> Iterator[None]:
    """In the block, lm-eval shows no progress bars or warnings, and tokenizers no warning of texts cut later."""
    noisy: list[Any] = [lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface]
    bars = {module: module.tqdm for module in noisy}
    levels = {logger: logger.level for logger in map(logging.getLogger, ("lm_eval", "transformers"))}
    datasets.disable_progress_bars()
    for logger in levels:
        logger.setLevel(logging.ERROR)
    for module in noisy:
        module.tqdm = lambda *args, **options: tqdm(*args, **{**options, "disable": True})
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        for module, bar in bars.items():
            module.tqdm = bar
