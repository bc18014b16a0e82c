"""UDS: outputs of blocks exchanged between models, and the score of what they cost."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from composing import composed
from conftest import items, small_model
from test_attack_retention import moved, target_of, task_of

from soul_exp.artifacts import prepared_models
from soul_exp.artifacts.measures import attack_measures
from soul_exp.attacks import Depth
from soul_exp.attacks.depth import scored_tokens
from soul_exp.build import build
from soul_exp.checks.check import check
from soul_exp.data import Item
from soul_exp.errors import UsageError
from soul_exp.evaluation.probing import likelihoods
from soul_exp.evaluation.records import read_records, write_records
from soul_exp.metrics.answers import Answers, UndefinedError
from soul_exp.metrics.depth import items_in_uds, losses, uds
from soul_exp.models import saving
from soul_exp.models.checkpoint import Checkpoint
from soul_exp.tasks.task import Probe


def blocks(*lost: list[float], name: str = "author") -> dict[str, Any]:
    """A branch whose items lose so many nats per token at each block; nan: without entity tokens."""
    found, units = np.array(lost), [f"{name} {i}" for i in range(len(lost))]
    logp = np.where(np.isnan(found[:, 0]), np.nan, -0.5)
    return {"blocks": Answers(np.ones(len(lost)), entity_logp=logp, exchanged_logp=logp[:, None] - found, unit=units)}


NONE = [np.nan, np.nan]
RETAIN = blocks([0.0, 0.2], [0.1, 0.4], [0.2, 0.9], NONE, name="kept")  # medians 0.1 and 0.4: below 0.2 of the others
RETRAINED = {"forget": blocks([4.0, 6.0], [2.0, 0.4], [0.05, 0.3], NONE), "retain": RETAIN}
# items: both blocks count; the first alone, as 0.4 is not above its median; none; no tokens


def test_the_score_is_the_share_of_the_retrained_models_losses_over_the_blocks_that_count() -> None:
    attacked = {"forget": blocks([1.0, 9.0], [-1.0, 0.4], [9.0, 9.0], NONE)}
    first = (4 * 0.25 + 6 * 1) / 10  # more than the retrained model's loss counts as it
    second = 0.0  # less than nothing as nothing
    assert uds(attacked, RETRAINED) == pytest.approx((first + second) / 2)
    assert items_in_uds(attacked, RETRAINED) == 0.5


def test_the_retrained_models_states_score_1_and_the_originals_0() -> None:
    assert uds(RETRAINED, RETRAINED) == 1.0
    assert uds({"forget": blocks(*[[0.0, 0.0]] * 3, NONE)}, RETRAINED) == 0.0


def test_a_block_must_cost_more_than_0_05_nats_even_where_retain_items_lose_nothing() -> None:
    retain = blocks([0.0, 0.0], [0.0, 0.0])
    retrained = {"forget": blocks([0.04, 0.06], [0.04, 0.01]), "retain": retain}
    assert uds({"forget": blocks([0.04, 0.03], [0.04, 0.01])}, retrained) == pytest.approx(0.5)
    assert items_in_uds(retrained, retrained) == 0.5


@pytest.mark.parametrize(
    ("retain", "forget", "reason"),
    [
        ([1.1, 1.1], [5.0, 5.0], r"uninformative: .* cost forget items 5.00 and retain items 1.10 .* at most 0.2 of"),
        ([0.0, 0.0], [0.0, 0.0], "uninformative"),
        ([-9.0, -9.0], [-1.0, -1.0], "uninformative"),
        ([0.0, 0.0], [0.04, 0.04], "at no block does the retrained model's state cost a forget item enough to count"),
    ],
)
def test_a_retrained_model_that_differs_in_more_than_the_rows_or_in_nothing_has_no_score(
    retain: list[float], forget: list[float], reason: str
) -> None:
    retrained = {"forget": blocks(forget, forget), "retain": blocks(retain)}
    with pytest.raises(UndefinedError, match=reason):
        uds(retrained, retrained)


def test_the_interval_pairs_the_models_by_unit_and_draws_the_retain_items_by_themselves() -> None:
    """Where the attacked model's states cost half of the retrained one's, every resample of units says half too."""
    lost = [[4.0 + i, 6.0 - i] for i in range(6)]
    retrained = {"forget": blocks(*lost), "retain": blocks(*[[0.1 * i, 0.2] for i in range(5)], name="kept")}
    half = {"forget": blocks(*(np.array(lost) / 2).tolist()), "retain": retrained["retain"]}
    records = {"depth": {"unlearned": half, "retrained": retrained}}
    found = attack_measures({"depth": {"uds": uds}}, records, seed=0)
    assert found.metrics["unlearned"]["uds"] == pytest.approx(0.5)
    assert found.intervals["unlearned"]["uds"] == pytest.approx([0.5, 0.5])
    assert found.attacks["depth"]["unlearned"]["forget"]["blocks"] == pytest.approx({"loss_0": 3.25, "loss_1": 1.75})


# ---- Tokens


def test_the_tokens_of_an_entity_are_those_that_hold_one_of_its_characters() -> None:
    lm = small_model()
    rows = [Item("Which is it?", "north maple pearl"), Item("And this?", "Maple, maple"), Item("And that?", "quartz")]
    encoded = lm.encode(rows)
    found = scored_tokens(lm, rows, encoded, [("maple",), ("maple", "absent"), ("maple",)])
    for row, read, expected in zip(encoded, found, (" maple", "Maplemaple", ""), strict=True):
        tokens = np.array(row.ids[row.num_prompt : -1])
        assert len(read) == len(tokens)
        text = "".join(lm.tokenizer.decode([token]) for token in tokens[read])
        assert text.replace(" ", "") == expected.strip().replace(" ", "")
    assert not found[2].any() and found[0].any() and not found[0].all()
    every = scored_tokens(lm, rows, encoded, None)
    assert all(
        read.all() and len(read) == len(row.ids) - row.num_prompt - 1 for read, row in zip(every, encoded, strict=True)
    )


# ---- Exchange


def lines(count: int, start: int = 0) -> Probe:
    rows = items(count, start)
    return Probe(rows, entities=[(row.answer.split()[-1],) for row in rows], units=[f"item {i}" for i in range(count)])


def test_exchanged_with_its_own_states_a_model_loses_nothing_and_with_anothers_what_a_copy_by_hand_loses() -> None:
    """By hand: one text at a time, the other model's hidden state put where the next token is one of the entity's."""
    original = small_model()
    other = moved(original)
    probe = lines(9)
    task = task_of(forget=probe, retain=lines(5, 9))
    own = Depth().points(target_of(original, original, task), "forget")["blocks"]
    assert isinstance(own, Answers) and not losses(own).any()
    found = Depth().points(target_of(original, other, task), "forget")
    answers = found["blocks"]
    assert isinstance(answers, Answers) and answers.exchanged_logp is not None
    rows = original.encode(probe.items)
    read = scored_tokens(original, probe.items, rows, probe.entities)
    for model in (original.model, other.model):
        model.eval()
    for i, (row, is_read) in enumerate(zip(rows, read, strict=True)):
        ids = torch.tensor([row.ids])
        places = [row.num_prompt - 1 + int(t) for t in is_read.nonzero()[0]]
        for block in range(2):
            with torch.no_grad():
                kept: list[torch.Tensor] = []
                hook = other.model.model.layers[block].register_forward_hook(lambda m, a, o, kept=kept: kept.append(o))
                other.model(input_ids=ids)
                hook.remove()

                def put(module: Any, args: Any, output: Any, kept: Any = kept, places: Any = places) -> Any:
                    output = output.clone()
                    output[0, places] = kept[0][0, places]
                    return output

                hook = original.model.model.layers[block].register_forward_hook(put)
                table = original.model(input_ids=ids).logits[0].log_softmax(-1)
                hook.remove()
            expected = np.mean([float(table[place, row.ids[place + 1]]) for place in places])
            assert answers.exchanged_logp[i, block] == pytest.approx(expected, abs=1e-5)
    plain = likelihoods(original, probe.items, batch_size=4)
    np.testing.assert_allclose(answers.nll, [score.nll for score in plain], atol=1e-5)
    expected_logp = [score.logp[:-1][mask].mean() for score, mask in zip(plain, read, strict=True)]
    np.testing.assert_allclose(answers.numbers("entity_logp"), expected_logp, atol=1e-5)


def test_answers_without_entity_tokens_have_no_number_and_are_counted_apart_also_in_records(tmp_path: Any) -> None:
    original = small_model()
    probe = replace(lines(6), entities=[("nowhere",), *lines(6).entities[1:]])  # type: ignore[index]
    task = task_of(forget=probe, retain=Probe(items(4)))
    target = target_of(original, moved(original), task)
    found = Depth().points(target, "forget")
    answers = found["blocks"]
    assert isinstance(answers, Answers)
    assert np.isnan(losses(answers)).all(axis=1).tolist() == [True] + [False] * 5
    assert found["tokens"]["entity"]["items"] == 5 and found["tokens"]["entity"]["all_items"] == 6  # type: ignore[index]
    every = Depth().points(target, "retain")["tokens"]
    assert list(every) == ["answer"]  # this probe has no entities: all tokens of the answers
    write_records(tmp_path / "blocks.jsonl", answers)
    np.testing.assert_array_equal(losses(read_records(tmp_path / "blocks.jsonl")), losses(answers))


def test_a_model_with_another_tokenizer_or_architecture_is_an_error() -> None:
    original, shallow = small_model(), small_model(num_hidden_layers=1)
    task = task_of(forget=lines(3), retain=lines(3))
    with pytest.raises(UsageError, match=r"absent, and .* in the original: name a checkpoint of the original's arch"):
        Depth().points(target_of(original, shallow, task), "forget")
    other = replace(original, template=replace(original.template, answer=" the {answer}"))
    with pytest.raises(UsageError, match="the model reads other tokens than the original"):
        Depth().points(target_of(original, other, task), "forget")


def test_the_original_and_the_retrained_model_begin_with_the_same_weights(tmp_path: Any) -> None:
    """Otherwise any two states differ, and the score is uninformative: prepare.seed makes both."""
    run = build(composed(tmp_path))
    seeds = {role: made_by["prepare"]["seed"] for role, made_by in prepared_models.recipes(run).items()}
    assert seeds == {"target": run.prepare.seed, "retrained": run.prepare.seed}


# ---- Before the work


def test_a_checkpoint_that_cannot_be_compared_with_the_original_stops_before_the_work(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {name: tmp_path / name for name in ("target", "same", "shallow", "renamed")}
    models = {name: small_model(num_hidden_layers=1 if name == "shallow" else 2) for name in folders}
    for name, folder in folders.items():
        folder.mkdir()
        saving.save(models[name].model, models[name].tokenizer, folder)
    words = json.loads((folders["renamed"] / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    (folders["renamed"] / "tokenizer.json").write_text(json.dumps(words))

    def checked(name: str) -> None:
        attack = ("attack=[depth,retention]", "stages=[attack]", f"model.path={folders[name]}", "loss=npo")
        check(composed(tmp_path, *attack, "wandb.mode=disabled"), tmp_path / "run")

    with pytest.raises(UsageError, match=r"attack=\[depth,retention\] compares models with the original, and it"):
        checked("same")
    monkeypatch.setattr(prepared_models, "exists", lambda models, role: True)
    monkeypatch.setattr(prepared_models, "checkpoints", lambda models: {"target": Checkpoint(str(folders["target"]))})
    checked("same")
    with pytest.raises(UsageError, match=r"/shallow: model.layers.1.* is absent, and \[\d+, \d+\] in the orig"):
        checked("shallow")
    with pytest.raises(UsageError, match="/renamed has other tokens than the original: name a checkpoint"):
        checked("renamed")


def test_what_is_shown_of_the_tiny_model_is_never_called_depth(tmp_path: Any) -> None:
    """Its two blocks are the output and one state."""
    assert all("depth" not in name for name in build(composed(tmp_path, "attack=[depth]")).attack_metrics["depth"])
