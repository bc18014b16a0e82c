"""Sampling: does a model that does not tell what it was made to forget tell it in one of many samples?"""

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from soul_exp.attacks.attack import FORGET, Attack, Found, Target
from soul_exp.data import Encoded, seed_of
from soul_exp.errors import UsageError
from soul_exp.evaluation.probing import beyond, evaluating, likelihoods
from soul_exp.evaluation.records import as_recorded
from soul_exp.metrics.answers import Answers
from soul_exp.metrics.leakage import gives_answer
from soul_exp.metrics.text import words
from soul_exp.models import loading, saving
from soul_exp.models.language_model import LanguageModel
from soul_exp.models.layers import max_positions
from soul_exp.ranges import ANY_COUNT, COUNT, POSITIVE, SEED, Choice
from soul_exp.tasks.task import Probe, Task

OWN, VLLM = "own", "vllm"
TEXT_BYTES = 2**18  # of the different samples of a point: up to it all are recorded, else those that give an answer


@dataclass(frozen=True, kw_only=True)
class Sample(Attack):
    """Samples of the answer to each question of the forget probe, without a limit to the likeliest tokens.

    A sample has at most as many tokens as the longest answer of the probe and `spare_tokens` more. Every question has a
    generator of its own, and all models and temperatures get the same random numbers. Source: arXiv 2511.04934.
    """

    temperature: Sequence[Annotated[float, POSITIVE]]
    num_samples: Annotated[int, COUNT]
    spare_tokens: Annotated[int, ANY_COUNT] = 16
    seed: Annotated[int, SEED] = 0
    backend: Annotated[str, Choice((OWN, VLLM))] = OWN

    grid = "temperature"

    def branches(self) -> dict[str, Any]:
        return {str(float(value)): float(value) for value in self.temperature}

    def __post_init__(self) -> None:
        self.check("temperature")

    def reads(self) -> Sequence[str]:
        return (f"probe.{FORGET}",)

    def missing(self, task: Task) -> str | None:
        if (why := super().missing(task)) is not None:
            return why
        if self.backend == VLLM and importlib.util.find_spec("vllm") is None:
            return "its backend vllm is not installed: type pip install 'soul_exp[vllm]', or attack.sample.backend=own"
        return unreadable(task.probes[FORGET])

    def points(self, target: Target, branch: str) -> Found:
        lm, probe = target.load(), target.task.probes[FORGET]
        with evaluating(lm):
            rows = likelihoods(lm, probe.items, batch_size=target.batch_size, label=target.label)
        encoded = lm.encode(probe.items)
        limit = most_tokens(lm, encoded, self.spare_tokens)
        seeds = [seed_of("sample", self.seed, item.prompt) for item in probe.items]
        sample: Sampler = {OWN: sampled, VLLM: sampled_by_vllm}[self.backend]
        found = sample(
            lm, [row.ids[: row.num_prompt] for row in encoded], seeds, num=self.num_samples,
            temperature=self.branches()[branch], max_new_tokens=limit, batch_size=target.batch_size, label=target.label,
        )  # fmt: skip
        answers = Answers(
            nll=np.array([row.nll for row in rows]),
            answer=[item.answer for item in probe.items],
            entities=probe.entities,
            unit=probe.units,
        )
        return {FORGET: as_recorded(with_samples(answers, found))}


def unreadable(probe: Probe) -> str | None:
    """Why it is unknown whether a text gives an answer of `probe`; None: it can."""
    for item in probe.items if probe.entities is None else ():
        if not words(item.answer):
            return f"the answer {item.answer[:60]!r} has no word, and it is not known what a right answer contains"
    return None


def most_tokens(lm: LanguageModel, rows: Sequence[Encoded], spare: int) -> int:
    """The number of new tokens of a free answer: those of the longest of `rows`, without its end token, and `spare`.

    Raises UsageError if the model has no positions for these.
    """
    limit = max(len(row.ids) - row.num_prompt - 1 for row in rows) + spare
    positions = max_positions(lm.model)
    if (last := beyond(rows, [limit] * len(rows), positions)) is not None:
        found = f"a prompt of {rows[last].num_prompt} tokens and {limit} new ones"
        raise UsageError(f"{found} are more than the {positions} positions of the model: shorten the prompt")
    return limit


def with_samples(answers: Answers, texts: Sequence[Sequence[str]]) -> Answers:
    """`answers` with `samples` and `draws`, of the n sampled `texts` of each example.

    All different texts are kept where they have TEXT_BYTES at most, else those that tell the answer.
    """
    different = [list(dict.fromkeys(row)) for row in texts]
    if sum(len(text.encode(errors="replace")) for row in different for text in row) > TEXT_BYTES:
        entities: Sequence[Sequence[str] | None] = answers.entities or [None] * len(answers)
        triples = zip(different, answers.needed("answer"), entities, strict=True)
        different = [
            [text for text, hit in zip(row, gives_answer(row, answer, known), strict=True) if hit]
            for row, answer, known in triples
        ]
    numbers = [{text: number for number, text in enumerate(row, start=1)} for row in different]
    draws = [np.array([of.get(text, 0) for text in row]) for of, row in zip(numbers, texts, strict=True)]
    return replace(answers, samples=different, draws=draws)


# What samples: `num` texts after each of the `prompts` (token ids), each prompt with a seed of its own.
Sampler = Callable[..., list[list[str]]]


@torch.no_grad()
def sampled(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, num: int, temperature: float,
    max_new_tokens: int, batch_size: int, label: str = "",
) -> list[list[str]]:  # fmt: skip
    """`num` samples after each prompt, at most `batch_size` at a time, which share what the model computes of it.

    A sample depends on its prompt and seed: questions do not meet in a batch, so that nothing is padded. Of two batch
    sizes only a random number within rounding of the boundary between two tokens gives another text. Raises UsageError
    for models whose layers keep something else than keys and values.
    """
    device, ends = next(lm.model.parameters()).device, end_tokens(lm)
    texts = []
    with evaluating(lm):
        for prompt, seed in tqdm(list(zip(prompts, seeds, strict=True)), desc=label, unit="question", leave=False):
            generator = torch.Generator().manual_seed(seed)
            uniform = torch.rand(num, max_new_tokens, dtype=torch.float64, generator=generator).to(device)
            read: Any = lm.model(input_ids=torch.tensor([prompt], device=device), use_cache=True)
            cache, logits = _of_prompt(lm, read), read.logits[:, -1]
            ids = [
                row
                for some in uniform.split(batch_size)
                for row in _continued(lm, copy.deepcopy(cache), logits, some, temperature, ends)
            ]
            texts.append(decoded(lm, ids))
    return texts


def _of_prompt(lm: LanguageModel, read: Any) -> Any:
    """The cache in the output of the model for a prompt. Raises UsageError if samples cannot share it."""
    cache = getattr(read, "past_key_values", None)
    layers = getattr(cache, "layers", ())
    if not layers or not all(hasattr(layer, "batch_repeat_interleave") for layer in layers):
        raise UsageError(
            f"attack=sample: what {type(lm.model).__name__} keeps of a prompt cannot be shared by samples (it is no "
            f"attention cache): type attack.sample.backend=vllm, or leave the attack out"
        )
    return cache


def _continued(
    lm: LanguageModel, cache: Any, logits: Tensor, uniform: Tensor, temperature: float, ends: Sequence[int]
) -> list[list[int]]:
    """The token ids of one sample for each row of `uniform` [n, T], numbers in [0, 1), of which each token takes one.

    `cache` is what the model keeps of the prompt, and `logits` [1, V] are those after it. The end token is left out.
    """
    num = len(uniform)
    cache.batch_repeat_interleave(num)
    logits, going = logits.expand(num, -1), torch.arange(num, device=uniform.device)
    stop, found = torch.tensor(ends, device=uniform.device), [list[int]() for _ in range(num)]
    for step in range(uniform.shape[1]):
        token = drawn(logits, uniform[going, step], temperature)
        ended = torch.isin(token, stop)
        for row, each in zip(going[~ended].tolist(), token[~ended].tolist(), strict=True):
            found[row].append(each)
        if ended.any():
            cache.batch_select_indices((~ended).nonzero()[:, 0])
            going, token = going[~ended], token[~ended]
        if not len(going) or step + 1 == uniform.shape[1]:
            break
        model: Any = lm.model
        logits = model(input_ids=token[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
    return found


def drawn(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """A token [n] for each row of `logits` [n, V], by the inverse of the distribution at a number of `uniform` [n]."""
    above = (logits.double() / temperature).softmax(-1).cumsum(-1)
    place = torch.searchsorted(above, uniform[:, None] * above[:, -1:], right=True)
    return place[:, 0].clamp(max=logits.shape[-1] - 1)


def end_tokens(lm: LanguageModel) -> list[int]:
    """The tokens that end an answer."""
    assert lm.model.generation_config is not None
    ends = lm.model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def decoded(lm: LanguageModel, ids: list[list[int]]) -> list[str]:
    return [text.strip() for text in lm.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def sampled_by_vllm(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, num: int, temperature: float,
    max_new_tokens: int, batch_size: int, label: str = "",
) -> list[list[str]]:  # fmt: skip
    """As `sampled`, with vLLM, whose random numbers are others; temperature 0 gives greedy answers.

    `batch_size` and `label` do not count: vLLM has a schedule and a progress bar of its own. It reads the model from a
    temporary copy, for which this process then frees the device.
    """
    from vllm import LLM, SamplingParams

    del batch_size, label
    ends = end_tokens(lm)
    with tempfile.TemporaryDirectory() as folder:
        saving.save(lm.model, lm.tokenizer, Path(folder))
        loading.move(lm.model, "cpu")
        torch.cuda.empty_cache()
        longest = max(map(len, prompts)) + max_new_tokens
        engine = LLM(
            model=folder, dtype=str(lm.model.dtype).removeprefix("torch."), max_model_len=longest, seed=0,
            generation_config="vllm", enable_prefix_caching=True,
        )  # fmt: skip
        options = [
            SamplingParams(
                n=num, temperature=temperature, top_p=1.0, top_k=-1, max_tokens=max_new_tokens, seed=seed % 2**32,
                stop_token_ids=ends, detokenize=False,
            )
            for seed in seeds
        ]  # fmt: skip
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = engine.generate(requests, options)
    ids = [[[token for token in each.token_ids if token not in ends] for each in one.outputs] for one in outputs]
    return [decoded(lm, rows) for rows in ids]
