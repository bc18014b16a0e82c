"""Losses begin where their definitions say: the frozen start's logits are the model's own, and dropout is off."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import items
from test_trainer import parts, run, weights
from transformers import LlamaForCausalLM

from soul_exp import losses
from soul_exp.data import Template, pad
from soul_exp.errors import UsageError
from soul_exp.losses import Objective, Scored
from soul_exp.models import loading
from soul_exp.models.language_model import LanguageModel
from soul_exp.models.layers import has_dropout
from soul_exp.models.lora import Lora
from soul_exp.optim import SAM, AdamW
from soul_exp.training.reference import FrozenHead

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0},
    "gemma2": {"final_logit_softcapping": 3.0},
    "hyperclovax": {"logits_scaling": 0.3},  # a factor, where Granite divides
}


class ScaledCappedMasked(LlamaForCausalLM):
    """A scale, a soft cap and a masked token, none of which its configuration names."""

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = 5 * torch.tanh(0.5 * output.logits / 5)
        output.logits[..., 7] = torch.finfo(output.logits.dtype).min
        return output


class Drifting(LlamaForCausalLM):
    """Its logits depend on more than what the head reads."""

    calls = 0

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        Drifting.calls += 1
        output.logits = output.logits + 0.01 * Drifting.calls
        return output


def of_family(name: str, lm: LanguageModel) -> LanguageModel:
    if name in FAMILIES:
        model = loading.from_scratch({"model_type": name, **SIZES, **FAMILIES[name]}, lm.tokenizer, seed=0)
        return LanguageModel.of(model, lm.tokenizer, Template("{question}:"), 128)
    lm.model.__class__ = ScaledCappedMasked
    return lm


def first_step(lm: LanguageModel, folder: Path, term: Any) -> dict[str, float]:
    """What a training with `term` and a KL retain term logs at its first step, before any weight has changed."""
    run(lm, folder, Objective(term, "kl"), batch_size=12, max_steps=1)
    logged: dict[str, float] = json.loads((folder / "train.jsonl").read_text().splitlines()[0])
    return logged


@pytest.mark.parametrize("family", [*FAMILIES, "other"])
def test_kl_and_kl_forget_are_0_at_the_start(family: str, lm: LanguageModel, tmp_path: Path) -> None:
    logged = first_step(of_family(family, lm), tmp_path, losses.kl_forget)
    assert abs(logged["forget_loss"]) < 1e-6 and abs(logged["retain_loss"]) < 1e-6


@pytest.mark.parametrize("family", ["granite", "other"])
def test_with_an_adapter_too(family: str, lm: LanguageModel, tmp_path: Path) -> None:
    lm = of_family(family, lm)
    lm = lm.with_model(Lora(4, 8, 0.0, "all-linear", merge=False).wrapped(lm.model, seed=0))
    logged = first_step(lm, tmp_path, losses.kl_forget)
    assert abs(logged["forget_loss"]) < 1e-6 and abs(logged["retain_loss"]) < 1e-6


@pytest.mark.parametrize("family", ["cohere", "other"])
def test_undial_without_a_lowered_label_starts_at_the_entropy_of_the_model(
    family: str, lm: LanguageModel, tmp_path: Path
) -> None:
    lm = of_family(family, lm)
    rows = pad(parts(lm)["forget"][1], lm.pad_id)
    with torch.no_grad():
        scored = Scored(lm.reader(lm.model.eval(), rows), rows["labels"])
    logp = scored.logits.log_softmax(-1)
    entropy = float(scored.mean(-(logp.exp() * logp).sum(-1)))
    logged = first_step(lm, tmp_path, functools.partial(losses.undial, beta=0.0))
    assert logged["forget_loss"] == pytest.approx(entropy, rel=1e-5) and entropy > 0.5


@pytest.mark.parametrize("family", [*FAMILIES, "other"])
def test_the_frozen_head_gives_the_models_logits_where_the_bare_head_does_not(family: str, lm: LanguageModel) -> None:
    lm = of_family(family, lm)
    one, rows = pad(lm.encode(items(1)), lm.pad_id), pad(lm.encode(items(5, start=20)), lm.pad_id)
    with torch.no_grad():
        frozen = FrozenHead(lm.model.eval(), lm.reader, one)
        logits, states = lm.reader(lm.model, rows), lm.reader.hidden
        assert states is not None
        assert not torch.allclose(lm.reader.head(states), logits, atol=1e-2)
        for p in lm.model.parameters():
            p.add_(0.1)  # training goes on; the frozen head does not follow
        torch.testing.assert_close(frozen(states), logits)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert sum(p.numel() for p in frozen.parameters()) == sum(p.numel() for p in lm.reader.head.parameters())


def test_logits_that_depend_on_more_than_the_heads_input_stop_before_training(
    lm: LanguageModel, tmp_path: Path
) -> None:
    lm.model.__class__ = Drifting
    with pytest.raises(
        UsageError, match=r"logits of Drifting cannot .*: choose .* other than kl, kl_forget and undial"
    ):
        run(lm, tmp_path, Objective(losses.grad_ascent, "kl"))
    run(lm, tmp_path, Objective(losses.grad_ascent, "nll"), max_steps=1)  # which reads no logits of the reference


# --- dropout --------------------------------------------------------------------------------------------------------

RANDOM: dict[str, dict[str, Any]] = {  # a model that draws random numbers in training mode, in each of the places
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "layerdrop": 0.9,
            "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0},
    "llama": {**SIZES, "attention_dropout": 0.3},
    "mixtral": {**SIZES, "router_jitter_noise": 0.5},
}  # fmt: skip


def random(name: str, lm: LanguageModel) -> LanguageModel:
    model = loading.from_scratch({"model_type": name, "initializer_range": 0.3, **RANDOM[name]}, lm.tokenizer, seed=0)
    return LanguageModel.of(model, lm.tokenizer, Template("{question}:"), 128)


NPO_KL = Objective(functools.partial(losses.npo, beta=0.1), "kl")


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("name", RANDOM)
def test_npo_starts_at_2_ln_2_over_beta_and_kl_at_0_unless_dropout_is_on(
    name: str, dropout: bool, lm: LanguageModel, tmp_path: Path
) -> None:
    lm = random(name, lm)
    assert has_dropout(lm.model)
    run(lm, tmp_path, NPO_KL, batch_size=12, max_steps=1, dropout=dropout)
    logged = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    if dropout:
        assert logged["retain_loss"] > 1e-4 and abs(logged["forget_loss"] - 13.862944) > 1e-4
    else:
        assert logged["forget_loss"] == pytest.approx(2 * math.log(2) / 0.1, abs=1e-4)  # 13.8629
        assert abs(logged["retain_loss"]) < 1e-6


def test_an_ascent_draws_no_random_number_either(lm: LanguageModel, tmp_path: Path) -> None:
    """Its losses are not logged: the weights after a step are those of the same model without dropout."""
    ends = []
    for rate in (0.3, 0.0):
        given = random("llama", lm)
        for module in given.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = rate
        assert has_dropout(given.model) == (rate > 0)
        run(given, tmp_path / str(rate), NPO_KL, functools.partial(SAM, lr=1e-2, base=AdamW), max_steps=2)
        ends.append(weights(given))
    assert torch.equal(*ends)


def test_an_adapters_own_dropout_acts_where_the_models_is_off(lm: LanguageModel, tmp_path: Path) -> None:
    """An adapter adds 0 at the start, so that losses begin right with its dropout too."""
    ends = []
    for rate in (0.0, 0.5):
        given = random("gpt2", lm)
        given = given.with_model(Lora(4, 8, rate, "all-linear", merge=False).wrapped(given.model, seed=0))
        folder = tmp_path / str(rate)
        run(given, folder, NPO_KL, functools.partial(torch.optim.SGD, lr=1.0), max_steps=3)
        logged = json.loads((folder / "train.jsonl").read_text().splitlines()[0])
        assert logged["forget_loss"] == pytest.approx(13.862944, abs=1e-4) and abs(logged["retain_loss"]) < 1e-6
        ends.append(weights(given))
    assert not torch.allclose(*ends, atol=1e-4)
