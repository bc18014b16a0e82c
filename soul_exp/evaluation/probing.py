"""A model's answers to a task's probes: likelihoods and free answers, batched by length, divided over the ranks.

One forward pass over all answers gives what every metric of likelihoods and every token-level membership attack reads.
Beyond rounding in the last digits, numbers depend on neither batch size nor number of ranks. P answer positions, V
vocabulary.
"""

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from soul_exp.data import Encoded, Item, pad, without_end
from soul_exp.distributed import zero3
from soul_exp.distributed.ranks import in_batches
from soul_exp.errors import UsageError
from soul_exp.evaluation.durations import stage
from soul_exp.evaluation.gradients import gradient_norms
from soul_exp.evaluation.records import as_recorded
from soul_exp.losses import IGNORED, precise
from soul_exp.metrics.answers import Answers
from soul_exp.metrics.text import pieces, rouge_l_recall
from soul_exp.models import lora
from soul_exp.models.language_model import LanguageModel
from soul_exp.models.layers import max_positions
from soul_exp.tasks.task import Probe, attacked_probes, is_attacked, rephrased_probes

CUT_TOKENS = 2  # new tokens per token of the answer, where the text is cut by words
CHUNK = 64  # answer positions whose logits are read at once: 32 MiB in fp32 with 128 k tokens
log = logging.getLogger(__name__)

UNLIKELY = -1e3  # log-probabilities below it count as it in means: exp of it is 0 in fp32, so that 0 * -inf is no nan


def evaluate_probes(
    lm: LanguageModel, probes: Mapping[str, Probe], *, batch_size: int, max_new_tokens: int,
    prefix: Sequence[Item] = (), label: str = "evaluate",
) -> dict[str, Answers]:  # fmt: skip
    """The model's answers to every probe; every rank does its share and gets them all.

    Probes that `is_attacked` names are scored once more after `prefix`, if there is one and the model has positions
    for it, those of `attacked_probes` get gradient norms, and those of `rephrased_probes` are asked in other words too.
    """
    probes = {name: replace(probe, items=without_end(probe.items, lm.tokenizer)) for name, probe in probes.items()}
    conditional = [item for name, probe in probes.items() if prefix and is_attacked(name) for item in probe.items]
    if conditional and (positions := max_positions(lm.model)) is not None:
        rows, before = lm.encode(conditional), lm.encode(prefix)
        try:
            preceded(rows, before, conditional, positions)
        except UsageError as error:  # the attack that needs it is not available
            log.warning("%s: no ReCaLL: %s", label, error)
            prefix, conditional = (), []
    norms = gradient_norms(
        lm, [item for name in attacked_probes(probes) for item in probes[name].items], label=f"{label}: gradients"
    )
    answers_to = functools.partial(_answers_to, lm, batch_size=batch_size, max_new_tokens=max_new_tokens)
    with evaluating(lm):
        found = answers_to(probes, label=label)
        after = likelihoods(lm, conditional, batch_size=batch_size, prefix=prefix, label=f"{label}: after a prefix")
        # in batches of their own, so that they change no digit of the others
        again = answers_to(rephrased_probes(probes), label=f"{label}: paraphrased questions")
    rest = iter(after), iter(norms)
    for name, answers in found.items():
        added: dict[str, Any] = {}
        if prefix and is_attacked(name):
            added["recall_ll"] = np.array([next(rest[0]).logp[:-1].mean(dtype=np.float64) for _ in range(len(answers))])
        if name in attacked_probes(probes):
            added["gradnorm"], added["gradnorm_mean"] = np.array([next(rest[1]) for _ in range(len(answers))]).T
        if answers.generation is not None:
            given = answers.generation, answers.needed("answer")
            added["rouge_l"] = rouge_l_recall(*given, ascii_only=probes[name].ascii_only)
        if name in again:
            other = again[name]
            added |= {"rephrased_nll": other.nll, "rephrased_generation": other.generation}
            added |= {"bare_nll": other.bare_nll, "bare_wrong_nll": other.bare_wrong_nll}
        elif probes[name].paraphrases is not None:
            added |= {"bare_nll": None, "bare_wrong_nll": None}  # they are of the paraphrased question, not asked here
        found[name] = as_recorded(replace(answers, **added))
    return found


@dataclass(frozen=True)
class TokenScores:
    """The n tokens of one answer and its end token, each given the prompt and the tokens before it."""

    logp: np.ndarray  # [n + 1] log-probability in nats
    right: np.ndarray  # [n + 1] whether the token is the most likely one
    mean_logp: np.ndarray  # [n + 1] mean of log p(v) over the vocabulary, v drawn from p, in nats: minus the entropy
    var_logp: np.ndarray  # [n + 1] its variance, in nats^2

    @property
    def nll(self) -> float:
        """Negative log-likelihood in nats per token, the end token included."""
        return float(-self.logp.mean(dtype=np.float64))

    @property
    def bare_nll(self) -> float:
        """The same of the answer tokens alone, without the end token."""
        return float(-self.logp[:-1].mean(dtype=np.float64))


def _answers_to(
    lm: LanguageModel, probes: Mapping[str, Probe], *, batch_size: int, max_new_tokens: int, label: str
) -> dict[str, Answers]:
    items = [item for probe in probes.values() for item in scored_items(probe)]
    free = [(item, probe.cut) for probe in probes.values() if probe.generate for item in probe.items]
    scores = likelihoods(lm, items, batch_size=batch_size, label=f"{label}: likelihoods")
    texts = generations(
        lm, [item for item, _ in free], batch_size=batch_size, max_new_tokens=max_new_tokens,
        cut=[cut for _, cut in free], label=f"{label}: answers",
    )  # fmt: skip
    left = iter(scores), iter(texts)  # each probe takes its own
    return {name: _answers(probe, *left) for name, probe in probes.items()}


@stage("probabilities")
def likelihoods(
    lm: LanguageModel, items: Sequence[Item], *, batch_size: int, prefix: Sequence[Item] = (), label: str = ""
) -> list[TokenScores]:
    """The token scores of the answer of each item, after the rows `prefix`, each complete with its end token, if any.

    Raises UsageError for a row that ends beyond the model's positions.
    """
    encoded = lm.encode(items)
    if prefix:
        encoded = preceded(encoded, lm.encode(prefix), items, max_positions(lm.model))
    device = next(lm.model.parameters()).device

    @torch.no_grad()
    def score(rows: Sequence[int]) -> list[TokenScores]:
        batch = {key: value.to(device) for key, value in pad([encoded[i] for i in rows], lm.pad_id).items()}
        logits, labels = lm.reader(lm.model, batch), batch["labels"]
        found = token_statistics(logits, labels).cpu().numpy()
        ends = np.cumsum((labels != IGNORED).sum(1).cpu().numpy())[:-1]
        return [TokenScores(row[0], row[1] > 0, *row[2:]) for row in np.split(found, ends, axis=1)]

    lengths = [len(row.ids) for row in encoded]
    return in_batches(lengths, score, batch_size, label=label, lockstep=zero3.is_sharded(lm.model))


def token_statistics(logits: Tensor, labels: Tensor) -> Tensor:
    """[4, P] of the P labels: log-probability, 1 if most likely else 0, mean and variance of log p(v) with v ~ p.

    `logits` [B, T, V], `labels` [B, T], of which IGNORED ones do not count. In fp32 at least, for CHUNK positions at a
    time: no copy of the logits is larger than that.
    """
    flat, places = logits.flatten(0, 1), (labels != IGNORED).flatten().nonzero()[:, 0]
    wanted = labels.flatten()[places]
    found = []
    for some, tokens in zip(places.split(CHUNK), wanted.split(CHUNK), strict=True):
        read = flat[some]
        logp = precise(read).log_softmax(-1)
        own = logp.gather(1, tokens[:, None])[:, 0]
        right = read.argmax(-1) == tokens
        p = logp.exp()
        mean = (p * logp.clamp_(min=UNLIKELY)).sum(-1)
        variance = logp.sub_(mean[:, None]).square_().mul_(p).sum(-1)
        found.append(torch.stack([own, right.to(own.dtype), mean, variance]))
    return torch.cat(found, 1)


def preceded(
    rows: Sequence[Encoded], before: Sequence[Encoded], items: Sequence[Item], positions: int | None
) -> list[Encoded]:
    """`rows`, of `items`, with all tokens of the rows `before` as a part of their prompts.

    Raises UsageError if one then ends beyond the model's `positions` (None: any number).
    """
    context = [token for row in before for token in row.ids]
    for item, row in zip(items, rows, strict=True):
        if positions is not None and (size := len(context) + len(row.ids)) > positions:
            raise UsageError(
                f"the row {item.prompt[:60]!r} has {size} tokens after the {len(before)} rows that ReCaLL puts before "
                f"it, and the model has {positions} positions: shorten the rows, or take a model that reads more"
            )
    return [Encoded([*context, *row.ids], len(context) + row.num_prompt) for row in rows]


@stage("generation")
def generations(
    lm: LanguageModel, items: Sequence[Item], *, batch_size: int, max_new_tokens: int,
    cut: Sequence[bool] | None = None, label: str = "",
) -> list[str]:  # fmt: skip
    """The greedy answer to each item's prompt, at most `max_new_tokens` tokens, without special tokens.

    Where `cut` is true, the text has at most as many words as the item's answer; it may have CUT_TOKENS times its
    tokens, because rarer words have more.
    """
    encoded = lm.encode(items)
    cut = cut if cut is not None else [False] * len(items)
    limits = [num_new_tokens(row, is_cut, max_new_tokens) for row, is_cut in zip(encoded, cut, strict=True)]
    if (last := beyond(encoded, limits, max_positions(lm.model))) is not None:
        found = f"the prompt {items[last].prompt[:60]!r} and {limits[last]} new tokens"
        raise UsageError(f"{found} are more than the model has positions: ask for fewer, or shorten it")
    device, sharded = next(lm.model.parameters()).device, zero3.is_sharded(lm.model)

    @torch.no_grad()
    def answer(numbers: Sequence[int]) -> list[str]:
        rows = [encoded[i] for i in numbers]
        # padded on the left: every answer begins in the same column
        left = functools.partial(pad_sequence, batch_first=True, padding_side="left")
        ids = left([torch.tensor(row.ids[: row.num_prompt]) for row in rows], padding_value=lm.pad_id)
        mask = left([torch.ones(row.num_prompt, dtype=torch.long) for row in rows])
        generate: Any = lm.model.generate  # its stub has a Tensor's type
        out = generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max(limits[i] for i in numbers),
            synced_gpus=sharded,  # all ranks run every layer together, until the last answer of any rank ends
        )
        new = [line[: limits[i]] for i, line in zip(numbers, out[:, ids.shape[1] :], strict=True)]
        texts = lm.tokenizer.batch_decode(new, skip_special_tokens=True)
        words = [len(pieces(items[i].answer)) if cut[i] else None for i in numbers]
        cuts = zip(texts, words, strict=True)
        return [text.strip() if most is None else "".join(pieces(text)[:most]).lstrip() for text, most in cuts]

    # whatever the checkpoint's settings are, of which only the end tokens stay; settings passed to `generate` are not
    # enough: it takes the unset ones from the model's
    model: Any = lora.bare(lm.model)
    given = model.generation_config
    greedy = {"do_sample": False, "num_beams": 1, "pad_token_id": lm.pad_id}
    model.generation_config = GenerationConfig(**greedy, eos_token_id=given.eos_token_id)
    try:
        return in_batches([row.num_prompt for row in encoded], answer, batch_size, label=label, lockstep=sharded)
    finally:
        model.generation_config = given


def num_new_tokens(row: Encoded, cut: bool, max_new_tokens: int) -> int:
    """The most tokens that the free answer to the prompt of `row` may have."""
    return min(max_new_tokens, CUT_TOKENS * (len(row.ids) - row.num_prompt)) if cut else max_new_tokens


def beyond(rows: Sequence[Encoded], limits: Sequence[int], positions: int | None) -> int | None:
    """Of `rows`, with `limits` on new tokens, the number of the one that ends last, if that is beyond `positions`."""
    ends = [row.num_prompt + limit - 1 for row, limit in zip(rows, limits, strict=True)]  # the last is not read
    return ends.index(max(ends)) if positions is not None and ends and max(ends) > positions else None


def scored_items(probe: Probe) -> list[Item]:
    """The items whose likelihood a probe needs, in the order in which `_answers` takes their scores."""
    return [*probe.items, *(probe.paraphrases or ()), *(item for row in probe.wrong or () for item in row)]


def _answers(probe: Probe, scores: Iterator[TokenScores], texts: Iterator[str]) -> Answers:
    own = [next(scores) for _ in probe.items]
    paraphrases = [next(scores) for _ in probe.paraphrases] if probe.paraphrases else None
    wrong = [[next(scores) for _ in row] for row in probe.wrong] if probe.wrong else None
    free = [next(texts) for _ in probe.items] if probe.generate else None
    return Answers(
        nll=np.array([row.nll for row in own]),
        logp=[row.logp[:-1] for row in own],  # without the end token
        right=[row.right[:-1] for row in own],
        mean_logp=[row.mean_logp[:-1] for row in own],
        var_logp=[row.var_logp[:-1] for row in own],
        paraphrase_nll=np.array([row.nll for row in paraphrases]) if paraphrases else None,
        wrong_nll=np.array([[each.nll for each in row] for row in wrong]) if wrong else None,
        bare_nll=np.array([row.bare_nll for row in paraphrases or own]) if wrong else None,
        bare_wrong_nll=np.array([[each.bare_nll for each in row] for row in wrong]) if wrong else None,
        question=[item.prompt for item in probe.items],
        answer=[item.answer for item in probe.items],
        entities=probe.entities,
        generation=free,
        unit=probe.units,
    )


def evaluating(lm: LanguageModel) -> AbstractContextManager[None]:
    """In the block, the model is in evaluation mode and can be run, sharded or not."""
    return zero3.evaluating(lm.model)
