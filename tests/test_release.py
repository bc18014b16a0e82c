"""loss=po_release and loss=npo_release against what the SOUL release computes, with transformers' own loss."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path

import pytest
import torch
from composing import composed, job
from conftest import items
from torch import Tensor, nn

from soul_exp import losses
from soul_exp.checks.check import check
from soul_exp.data import Item, Part, encode, pad, some_rows
from soul_exp.errors import UsageError
from soul_exp.losses import Objective, Scored
from soul_exp.models import attention
from soul_exp.models.language_model import LanguageModel
from soul_exp.optim import AdamW
from soul_exp.tasks.refusals import QUESTIONS
from soul_exp.tasks.task import forget_parts
from soul_exp.training.schedule import Schedule
from soul_exp.training.train import train

LENGTH = 128  # tokens to which a text is padded, 512 in the release
FORGET = [*items(5), Item("Which is longest?", " ".join(["amber birch cedar"] * 12))]


@pytest.fixture
def parts() -> dict[str, Part]:
    return forget_parts(FORGET, QUESTIONS)


def tokens(lm: LanguageModel, text: str) -> list[int]:
    return list(lm.tokenizer(text)["input_ids"])


def release_loss(model: nn.Module, prompt: list[int], taught: list[int], num_attended: int) -> Tensor:
    """One padded text: labels are `taught`, the attention mask has `num_attended` ones, the mean is over labels."""
    ids = prompt + taught
    padded = torch.full((1, LENGTH), 0)
    padded[0, : len(ids)] = torch.tensor(ids)
    labels = torch.full((1, LENGTH), -100)
    labels[0, len(prompt) : len(ids)] = torch.tensor(taught)
    mask = (torch.arange(LENGTH) < num_attended).long()[None]
    return model(input_ids=padded, attention_mask=mask, labels=labels).loss


def refusal_loss(lm: LanguageModel, item: Item, refusal: str, masked: bool = True) -> Tensor:
    prompt, answer = (tokens(lm, text) for text in (lm.template.texts(item)[0], f" {item.answer}"))
    taught = tokens(lm, f" {refusal}")  # without an end token
    return release_loss(lm.model, prompt, taught, len(prompt) + len(answer) if masked else LENGTH)


def scored(lm: LanguageModel, rows: list[Item]) -> Scored:
    batch = pad(encode(rows, lm.tokenizer, lm.template, 128), lm.pad_id)
    return Scored(lm.reader(lm.model, batch), batch["labels"])


def test_po_release_is_the_loss_of_the_release_with_its_gradient(lm: LanguageModel, parts: dict[str, Part]) -> None:
    rows = [row[0] for row in parts["fixed_refusal"].rows]
    assert all(len(row) == 1 for row in parts["fixed_refusal"].rows)  # fixed: no visit draws another
    assert len({row.answer for row in rows}) > 1 and {row.answer for row in rows} <= set(QUESTIONS)
    sizes = [(len(tokens(lm, f" {row.answer}")), len(tokens(lm, f" {row.mask_of}"))) for row in rows]
    assert any(refusal > answer for refusal, answer in sizes) and any(refusal < answer for refusal, answer in sizes)

    gradients = []
    for loss in (
        losses.po_release(scored(lm, rows)),
        torch.stack([refusal_loss(lm, item, row.answer) for item, row in zip(FORGET, rows, strict=True)]).mean(),
    ):
        lm.model.zero_grad()
        loss.backward()
        gradients.append((loss.detach(), torch.cat([p.grad.flatten() for p in lm.model.parameters()])))
    (ours, our_gradient), (theirs, their_gradient) = gradients
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-6)
    # each property is visible: another mask, the end token
    unmasked = [refusal_loss(lm, item, row.answer, masked=False) for item, row in zip(FORGET, rows, strict=True)]
    assert abs(torch.stack(unmasked).mean().item() - theirs.item()) > 1e-3
    assert abs(losses.po(scored(lm, rows)).item() - theirs.item()) > 1e-3


def test_npo_release_is_the_loss_of_the_release(lm: LanguageModel) -> None:
    start = copy.deepcopy(lm.model)
    for p in lm.model.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    before, now = [], []
    for item in FORGET:
        prompt = tokens(lm, lm.template.texts(item)[0])
        taught = [*tokens(lm, f" {item.answer}"), lm.tokenizer.eos_token_id]
        for model, found in ((start, before), (lm.model, now)):
            found.append(release_loss(model, prompt, taught, LENGTH).detach())
    increase = torch.stack(now) - torch.stack(before)
    theirs = -(2 / 0.1) * (1 / (1 + torch.exp(-0.1 * increase))).log().mean()
    current = scored(lm, FORGET)
    reference = {"forget": scored(lm.with_model(start), FORGET).nll.detach()}
    ours = losses.npo_release(current, reference, beta=0.1)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6) and abs(theirs.item() - 20 * math.log(2)) > 1e-2


def test_a_run_of_po_release_logs_the_loss_of_the_release_at_its_first_step(
    lm: LanguageModel, parts: dict[str, Part], tmp_path: Path
) -> None:
    pairs = zip(FORGET, parts["fixed_refusal"].rows, strict=True)
    expected = torch.stack([refusal_loss(lm, item, row[0].answer) for item, row in pairs]).mean().item()
    given = {"fixed_refusal": parts["fixed_refusal"], "retain": Part.of(items(12, 20))}
    outcome = train(
        lm.model, lm.reader,
        {name: (part, lm.encode([item for row in part.rows for item in row])) for name, part in given.items()},
        objective=Objective(losses.po_release, "nll"), make_optimizer=functools.partial(AdamW, lr=1e-4),
        schedule=Schedule(epochs=1, batch_size=6, micro_batch_size=1, max_steps=1, warmup_ratio=0.0, logging_steps=1),
        seed=0, pad_id=lm.pad_id, folder=tmp_path, label="po_release",
    )  # fmt: skip
    assert outcome.last["forget_loss"] == pytest.approx(expected, rel=1e-5)


def test_rows_of_a_batch_keep_the_tokens_to_which_no_position_attends(lm: LanguageModel) -> None:
    rows = [Item("a", "amber birch cedar", mask_of="amber"), Item("a", "amber birch")]
    batch = pad(encode(rows, lm.tokenizer, lm.template, 128), lm.pad_id)
    first = some_rows(batch, torch.tensor([0]))
    assert torch.equal(first["input_ids"], batch["input_ids"][:1]) and torch.equal(first["labels"], batch["labels"][:1])
    assert int(first["attention_mask"].sum()) == len(tokens(lm, "".join(lm.template.texts(Item("a", "amber")))))


@pytest.mark.parametrize("loss", ["po", "npo"])
def test_methods_of_the_papers_tables_use_the_losses_of_the_release(loss: str) -> None:
    for order in ("fo", "so", "sophia"):
        config, _ = job("model=tiny", f"method={loss}_{order}")
        assert config["choices"]["loss"] == f"{loss}_release"


def test_an_attention_that_leaves_masked_tokens_out_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "check", lambda *_: None)  # which stops without a GPU
    config = composed(tmp_path, "loss=po_release", "model.attention=flash_attention_2")
    with pytest.raises(UsageError, match="loss=po_release reads tokens that no position attends to, which"):
        check(config, tmp_path / "run")
