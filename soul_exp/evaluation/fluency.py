"""How likely generated texts are under another model: what fluent text is, and what nonsense is."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from soul_exp.data import Encoded, Item, pad
from soul_exp.distributed import zero3
from soul_exp.distributed.ranks import in_batches
from soul_exp.evaluation.durations import stage
from soul_exp.evaluation.probing import evaluating
from soul_exp.losses import Scored
from soul_exp.metrics.answers import Answers
from soul_exp.models import lora
from soul_exp.models.language_model import LanguageModel
from soul_exp.models.layers import max_positions
from soul_exp.tasks.task import Probe


@stage("fluency")
def with_fluency(
    lm: LanguageModel, probes: Mapping[str, Probe], answers: Mapping[str, Answers], *, batch_size: int, label: str = ""
) -> dict[str, Answers]:
    """`answers` with `generation_nll`: the NLL of each generated text under `lm`, given the prompt of its probe.

    Every rank calls it, does its share and gets all of them.
    """
    texts = {name: given.generation for name, given in answers.items() if given.generation is not None}
    pairs = [pair for name, given in texts.items() for pair in zip(probes[name].items, given, strict=True)]
    with evaluating(lm):
        scores = iter(text_nll(lm, *map(list, zip(*pairs, strict=True)), batch_size=batch_size, label=label))
    scored = {name: np.array([next(scores) for _ in given]) for name, given in texts.items()}
    return {**answers, **{name: replace(answers[name], generation_nll=values) for name, values in scored.items()}}


def text_nll(
    lm: LanguageModel, items: Sequence[Item] = (), texts: Sequence[str] = (), *, batch_size: int, label: str = ""
) -> list[float]:
    """The NLL of each text and an end token, given the prompt of its item, in nats per token.

    Any text can be read; an empty one is its end token alone. Tokens beyond the model's positions are left out.
    """
    rows = _encoded(lm, items, texts)
    device = next(lm.model.parameters()).device

    @torch.no_grad()
    def score(numbers: Sequence[int]) -> list[float]:
        batch = {key: value.to(device) for key, value in pad([rows[i] for i in numbers], lm.pad_id).items()}
        scored = Scored(lm.reader(lm.model, batch), batch["labels"])
        return [float(-logp[mask].double().mean().cpu()) for logp, mask in zip(scored.logp, scored.mask, strict=True)]

    lengths = [len(row.ids) for row in rows]
    return in_batches(lengths, score, batch_size, label=label, lockstep=zero3.is_sharded(lm.model))


def _encoded(lm: LanguageModel, items: Sequence[Item], texts: Sequence[str]) -> list[Encoded]:
    """The token ids of the prompts, `texts` and end tokens; prompt and text are tokenised together where they can."""
    if not items:
        return []
    prompts = [row.ids[: row.num_prompt] for row in lm.encode(items)]
    # generated text is stripped: running text goes on after the blank that its own answer begins with
    blanks = [" " if item.raw and item.answer[:1].isspace() else "" for item in items]
    answered = [replace(item, answer=blank + text) for item, blank, text in zip(items, blanks, texts, strict=True)]
    pairs = [lm.template.texts(item) for item in answered]
    together = lm.tokenizer([prompt + answer for prompt, answer in pairs])["input_ids"]
    apart = lm.tokenizer([answer for _, answer in pairs], add_special_tokens=False)["input_ids"]
    end, known = lm.tokenizer.eos_token_id, lora.embedding_of(lm.model).num_embeddings
    longest = max_positions(lm.model)
    rows = []
    for prompt, both, alone in zip(prompts, together, apart, strict=True):
        ids = both[len(prompt) :] if both[: len(prompt)] == list(prompt) else alone
        ids = [token for token in ids if token != end and token < known]
        rows.append(Encoded([*prompt, *ids[: longest and longest - len(prompt) - 1], end], len(prompt)))
    return rows
