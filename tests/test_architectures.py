"""Architectures that are not in conf/model/: evaluation, every kind of optimizer and ZeRO-2, on tiny random models.

`python tests/test_architectures.py [names]` runs the matrix (half an hour) and writes its rows to docs/models.md.
"""

from __future__ import annotations

import math
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import items, small_model
from engines import MODEL, Case, Ended, run
from test_engines import deepspeed_of, ended

from soul_exp.artifacts import prepared_models
from soul_exp.checks import check
from soul_exp.errors import UsageError
from soul_exp.evaluation.gradients import gradient_norms
from soul_exp.evaluation.probing import generations, likelihoods
from soul_exp.models import attention, lora, saving
from soul_exp.models.checkpoint import Checkpoint
from soul_exp.models.language_model import LanguageModel
from soul_exp.models.loading import from_scratch

DOC = Path(__file__).parents[1] / "docs" / "models.md"
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
COMMON = {**WIDE, "intermediate_size": 64, "max_position_embeddings": 256}
GROUPED = {**COMMON, "num_key_value_heads": 2}
SLIDING = {**GROUPED, "head_dim": 8, "sliding_window": 16}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.1}
OLD |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT = {"ffn_dim": 64, "max_position_embeddings": 256, "init_std": 0.1, "dropout": 0.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {  # name -> configuration; the name is the model_type unless one is given
    "gpt2": OLD,
    "gpt_bigcode": OLD,
    "gpt_neox": {**COMMON, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                "window_size": 16, "max_position_embeddings": 256, "initializer_range": 0.1, "resid_dropout": 0.0,
                "embed_dropout": 0.0, "attention_dropout": 0.0},
    "gptj": {**OLD, "rotary_dim": 4},
    "opt": {**WIDE, **OPT, "word_embed_proj_dim": 32},
    "opt, projected, norms last": {**WIDE, **OPT, "model_type": "opt", "word_embed_proj_dim": 16,
                                   "do_layer_norm_before": False},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.1, "hidden_dropout": 0.0},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 256,
            "initializer_range": 0.1},
    "falcon": {**WIDE, "multi_query": True, "parallel_attn": True, "alibi": False, "bias": False},
    "falcon, alibi": {**WIDE, "model_type": "falcon", "multi_query": False, "parallel_attn": False, "alibi": True},
    "phi": {**COMMON, "partial_rotary_factor": 0.5},
    "phi3": GROUPED,
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 16},
    "stablelm": {**COMMON, "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "starcoder2": {**GROUPED, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "qwen2": {**GROUPED, "tie_word_embeddings": True},
    "qwen3": {**GROUPED, "head_dim": 8},
    "smollm3": GROUPED,
    "olmo2": GROUPED,
    "cohere": {**GROUPED, "logit_scale": 0.25},
    "granite": {**GROUPED, "logits_scaling": 4.0, "residual_multiplier": 0.5},
    "gemma2": {**SLIDING, "query_pre_attn_scalar": 8, "final_logit_softcapping": 30.0},
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 8},
    "mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {**GROUPED, **EXPERTS},
    "qwen2_moe": {**GROUPED, **EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
                  "decoder_sparse_step": 1},
    "mamba": {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
    "mamba2": {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "expand": 2,
               "n_groups": 1, "chunk_size": 16},
}  # fmt: skip
TRAINED = {  # column -> optimizer of tests/engines.py, and whether of an adapter
    "sophia, gnb": ("sophia", False),
    "sophia, hutchinson": ("sophia_hutchinson", False),
    "adam": ("adam", False),
    "muon": ("muon", False),
    "lora": ("sophia", True),
}
TARGETS = {"mamba": ["in_proj", "x_proj", "dt_proj"], "mamba2": ["in_proj"]}  # peft refuses out_proj, and so all-linear
COLUMNS = ("evaluation", *TRAINED, "ZeRO-2")
START = 2 * math.log(2) / 0.1  # of NPO, beta 0.1; KL starts at 0
YES = "yes"


def made(name: str, folder: Path) -> Path:
    """A tiny random model of an architecture, as a checkpoint."""
    tokenizer = small_model().tokenizer
    config = {"model_type": name, **ARCHITECTURES[name]}
    saving.save(from_scratch(config, tokenizer, seed=0), tokenizer, folder)
    check._check_given(str(folder), "model.path", MODEL, [])
    return folder


def row(name: str, folder: Path) -> Iterator[tuple[str, str]]:
    """(column, YES or what is wrong) for one architecture."""
    path = made(name, folder / "model")
    lm = prepared_models.load(MODEL, Checkpoint(str(path)))
    yield "evaluation", _evaluates(lm)
    start = torch.cat([p.detach().flatten() for p in lm.model.parameters()])
    cases = {
        column: Case("npo_kl", optimizer, adapter=is_adapter and TARGETS.get(name, True))
        for column, (optimizer, is_adapter) in TRAINED.items()
    }
    alone = {}
    for column, case in cases.items():
        try:
            alone[column] = run(case, path, folder / column, 1)
            yield column, _trained(alone[column], start, bool(case.adapter))
        except UsageError as error:
            yield column, str(error)
    on_two = {column: case for column, case in cases.items() if column in alone and column != "muon"}
    cases = {column: replace(case, deepspeed=deepspeed_of("zero2")) for column, case in on_two.items()}
    (folder / "zero2").mkdir()
    together = ended(cases, path, folder / "zero2")
    wrong = [column for column in cases if not all(_is_equal(one, alone[column], start) for one in together[column])]
    yield "ZeRO-2", f"other numbers: {', '.join(wrong)}" if wrong else YES


def _evaluates(lm: LanguageModel) -> str:
    """Token scores in batches of 128, one by one, and of the plain model without mask; likewise gradients, answers."""
    rows = items(9)
    many, one = (likelihoods(lm, rows, batch_size=size) for size in (128, 1))
    answers = [generations(lm, rows, batch_size=size, max_new_tokens=8) for size in (128, 1)]
    norms = gradient_norms(lm, rows[:3])
    lm.model.eval()
    for i, (read, alone, encoded) in enumerate(zip(many, one, lm.encode(rows), strict=True)):
        lm.model.zero_grad()
        logits = lm.model(input_ids=torch.tensor([encoded.ids])).logits[0, encoded.num_prompt - 1 : -1].float()
        table, labels = logits.log_softmax(-1), torch.tensor(encoded.ids[encoded.num_prompt :])
        own, mean = table.gather(1, labels[:, None])[:, 0], (table.exp() * table).sum(-1)
        plain = {"logp": own, "mean_logp": mean, "var_logp": (table.exp() * (table - mean[:, None]) ** 2).sum(-1)}
        for field, expected in plain.items():
            pairs = ((getattr(read, field), getattr(alone, field)), (getattr(alone, field), expected.detach().numpy()))
            if not all(np.allclose(*pair, atol=1e-4) for pair in pairs):
                return f"{field} depends on the batch"
        if i < len(norms):
            own[:-1].mean().backward()
            each = torch.stack([p.grad.norm() for p in lm.model.parameters() if p.grad is not None])
            if not np.allclose(norms[i], (float(each.norm()), float(each.mean())), rtol=1e-3):
                return f"gradient norms {norms[i]} instead of {float(each.norm())}, {float(each.mean())}"
    lm.model.zero_grad()
    return YES if answers[0] == answers[1] else "answers depend on the batch"


def _trained(found: Ended, start: torch.Tensor, adapter: bool) -> str:
    first, last = found.logged[0], found.logged[-1]
    if abs(first["forget_loss"] - START) > 1e-4 or abs(first["retain_loss"]) > 1e-5:
        return f"starts at {first['forget_loss']:.4f} and {first['retain_loss']:.1e}"
    finite = all(math.isfinite(value) for value in (*last.values(), *found.answers))
    moved = adapter or bool((found.weights != start).any())
    lower = last["forget_loss"] < first["forget_loss"]
    return YES if finite and moved and lower else f"ends at {last['forget_loss']:.4f}"


def _is_equal(one: Ended, alone: Ended, start: torch.Tensor) -> bool:
    """Two ranks end where one process does: engines sum in other orders, and a step divides by numbers near 0.

    That is, 99.9 % of the weights are within 1 % of the largest change (of an adapter, of one step at full length).
    """
    moved = float((alone.weights - start).abs().max()) if alone.weights.shape == start.shape else 1e-2
    far = ((one.weights - alone.weights).abs() > 0.01 * moved).double().mean()
    return float(far) <= 1e-3 and one.answers == pytest.approx(alone.answers, rel=1e-3)


def line(name: str, cells: dict[str, str]) -> str:
    config = {"model_type": name, **ARCHITECTURES[name]}
    own = attention.of_family(type(lora.bare(from_scratch(config, small_model().tokenizer, seed=0))), "sdpa")
    return f"| {name} | {own} | {' | '.join(cells[column] for column in COLUMNS)} |"


@pytest.mark.parametrize("name", ["gemma2", "cohere", "mixtral"])  # a soft cap, a scale, routed experts
def test_an_architecture_is_evaluated_as_it_computes_logits(name: str, tmp_path: Path) -> None:
    assert _evaluates(prepared_models.load(MODEL, Checkpoint(str(made(name, tmp_path / "model"))))) == YES


def test_gradient_norms_of_adapted_experts_are_those_of_the_merged_model_and_change_nothing(tmp_path: Path) -> None:
    """peft puts weights of experts in other places while they run."""
    lm = prepared_models.load(MODEL, Checkpoint(str(made("mixtral", tmp_path / "model"))))
    lm = lm.with_model(lora.Lora(2, 4.0, 0.0, "all-linear", merge=True).wrapped(lm.model, seed=0))
    for name, p in lm.model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    before = [row.nll for row in likelihoods(lm, items(5), batch_size=5)]
    adapted = gradient_norms(lm, items(5))
    assert [row.nll for row in likelihoods(lm, items(5), batch_size=5)] == before
    merged = gradient_norms(lm.with_model(lora.merged(lm.model)), items(5))
    np.testing.assert_allclose(adapted, merged, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_right_in_every_cell(name: str, tmp_path: Path) -> None:
    assert dict(row(name, tmp_path)) == dict.fromkeys(COLUMNS, YES)


def test_the_document_lists_these_architectures_and_all_of_their_cells() -> None:
    rows = [text for text in DOC.read_text().splitlines() if re.match(r"\| [a-z].* \| (sdpa|eager) \|", text)]
    assert rows == [line(name, dict.fromkeys(COLUMNS, YES)) for name in ARCHITECTURES]


if __name__ == "__main__":
    for name in sys.argv[1:] or ARCHITECTURES:
        with tempfile.TemporaryDirectory() as place:
            cells = dict.fromkeys(COLUMNS, "-")
            try:
                for column, cell in row(name, Path(place)):
                    cells[column] = cell
            except Exception as error:
                cells |= {"ZeRO-2": f"{type(error).__name__}: {str(error)[-300:]}"}
        new = line(name, cells)
        print(new, flush=True)
        text = DOC.read_text() if DOC.exists() else ""
        old = re.search(rf"^\| {re.escape(name)} \|.*$", text, re.MULTILINE)
        DOC.write_text(text.replace(old[0], new) if old else f"{text.rstrip()}\n{new}\n")
