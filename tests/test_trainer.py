"""The trainer: splits, curvature, divergence, checkpoints."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import items
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

import soul_exp.training.train as train_module
from soul_exp import losses
from soul_exp.data import Item, Part, pad, seed_of
from soul_exp.errors import UsageError
from soul_exp.losses import Objective, Scored
from soul_exp.models.language_model import LanguageModel
from soul_exp.models.layers import parameter_groups
from soul_exp.models.lora import Lora
from soul_exp.optim import SAM, AdamW, Hybrid, Influence, MeZO, Sophia
from soul_exp.tasks.task import forget_parts
from soul_exp.training import curvature
from soul_exp.training.reference import compute_reference
from soul_exp.training.schedule import Schedule
from soul_exp.training.statistics import sign_descent_note
from soul_exp.training.stream import Stream
from soul_exp.training.train import Outcome, train
from soul_exp.training.trainer import Unlearner

SGD = functools.partial(torch.optim.SGD, lr=0.05)
SOPHIA = functools.partial(Sophia, lr=1e-3)


def ce_u(forget: Scored) -> torch.Tensor:
    """About as strong as the others: an untrained model gives a label 1/320, and so small is the gradient."""
    return 64 * losses.ce_u(forget)


OBJECTIVES = {
    "grad_diff": Objective(losses.grad_ascent, "nll"),
    "npo": Objective(functools.partial(losses.npo, beta=0.1), "nll"),
    "npo_kl": Objective(functools.partial(losses.npo, beta=0.1), "kl"),
    "simnpo": Objective(functools.partial(losses.simnpo, beta=2.5, margin=0.0), "nll"),
    "po": Objective(losses.po, "kl"),
    "grad_ascent": Objective(losses.grad_ascent, None),
    "dpo": Objective(functools.partial(losses.dpo, beta=0.1, plain=False), "nll"),
    "altpo": Objective(functools.partial(losses.altpo, beta=0.1), "nll"),
    "wga": Objective(functools.partial(losses.wga, alpha=1.0), "nll"),
    "satimp": Objective(functools.partial(losses.satimp, beta1=2.0, beta2=1.0), "nll"),
    "ce_u": Objective(ce_u, None),
    "undial": Objective(functools.partial(losses.undial, beta=5.0), None),
    "random_label": Objective(losses.random_label, "nll"),
    "kl_forget": Objective(losses.kl_forget, "nll"),
    "rmu": Objective(functools.partial(losses.rmu, steering=6.5, seed=0), "hidden_mse", gamma=10.0, layer=0),
    "po_release": Objective(losses.po_release, "nll"),
    "npo_release": Objective(functools.partial(losses.npo_release, beta=0.1), "nll"),
}


def parts(lm: LanguageModel, names: tuple[str, ...] = ("forget", "retain")) -> dict[str, Any]:
    forget, retain = items(12), items(20, start=30)
    refusal = Part([[Item(i.prompt, "I do not know."), Item(i.prompt, "No idea.")] for i in forget], follows="forget")
    labels = Part([[Item(i.prompt, forget[k - d].answer) for d in (1, 2)] for k, i in enumerate(forget)], "forget")
    every = {"forget": Part.of(forget), "retain": Part.of(retain), "refusal": refusal, "random_label": labels}
    every["alternate"] = labels
    every["fixed_refusal"] = forget_parts(forget, ["I do not know.", "No idea."])["fixed_refusal"]
    return {name: (every[name], lm.encode([i for row in every[name].rows for i in row])) for name in names}


def run(
    lm: LanguageModel,
    folder: Path,
    objective: Objective,
    make_optimizer: Callable[..., Any] = SGD,
    names: tuple[str, ...] = (),
    **schedule: Any,
) -> Outcome:
    settings = {"epochs": 1, "batch_size": 4, "max_steps": 4, "warmup_ratio": 0.0, "logging_steps": 1, **schedule}
    return train(
        lm.model, lm.reader, parts(lm, names or objective.parts), objective=objective, make_optimizer=make_optimizer,
        schedule=Schedule(**settings), seed=0, pad_id=lm.pad_id, folder=folder / "checkpoints", label="unlearn",
        records=folder / "train.jsonl",
    )  # fmt: skip


def weights(lm: LanguageModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in lm.model.parameters()]).clone()


RESUMED: dict[str, tuple[Callable[..., Any], torch.dtype]] = {
    "sophia": (functools.partial(Sophia, lr=1e-3, interval=3), torch.float32),
    "stochastic rounding": (functools.partial(AdamW, lr=1e-3, rounding="stochastic"), torch.bfloat16),
    "hybrid, at a zeroth-order turn": (
        functools.partial(
            Hybrid, lr=1e-3, first_order=AdamW, zeroth_order=functools.partial(MeZO, lr=1e-4), first_steps=4
        ),
        torch.float32,
    ),
    "sam": (functools.partial(SAM, lr=1e-3, base=AdamW), torch.float32),
}


def fresh(lm: LanguageModel, state: dict[str, torch.Tensor]) -> LanguageModel:
    lm.model.load_state_dict(state)
    return lm


@pytest.fixture
def start(lm: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in lm.model.state_dict().items()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_result_does_not_depend_on_the_split_into_accumulation_steps(
    name: str, lm: LanguageModel, start: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    ends = []
    for micro in (4, 2, 1):
        outcome = run(fresh(lm, start), tmp_path / str(micro), OBJECTIVES[name], micro_batch_size=micro)
        ends.append((weights(lm), outcome.last["forget_loss"]))
    assert not torch.equal(ends[0][0], torch.cat([v.flatten() for v in start.values()]))
    for other in ends[1:]:
        torch.testing.assert_close(other[0], ends[0][0], rtol=0, atol=2e-6)
        assert other[1] == pytest.approx(ends[0][1], rel=1e-4)


@pytest.mark.parametrize("interval", [1, 2])
def test_curvature_does_not_depend_on_the_split_either(
    interval: int, lm: LanguageModel, start: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    ends, wins = [], []
    sophia = functools.partial(Sophia, lr=1e-2, rho=300.0, eps=1e-8, interval=interval)
    for micro in (4, 1):
        outcome = run(fresh(lm, start), tmp_path / str(micro), OBJECTIVES["grad_diff"], sophia, micro_batch_size=micro)
        ends.append(weights(lm))
        wins.append(outcome.last["win_rate"])
    assert 0.05 < wins[0] < 0.95  # a saturated update would hide a wrong curvature
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-4)
    assert (ends[0] - ends[1]).abs().mean() < 1e-7


def test_two_runs_with_the_same_seed_agree_bit_for_bit(
    lm: LanguageModel, start: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    ends = []
    for number in range(2):
        run(fresh(lm, start), tmp_path / str(number), OBJECTIVES["npo"], functools.partial(Sophia, lr=1e-3, interval=2))
        ends.append(weights(lm))
    assert torch.equal(*ends)


def one_trainer(
    lm: LanguageModel,
    folder: Path,
    objective: Objective,
    names: tuple[str, ...],
    make: Callable[..., Any] = SOPHIA,
) -> Unlearner:
    """An Unlearner before its first step, as `train` builds it, with a batch of one step."""
    made: list[Unlearner] = []

    class Stop(Unlearner):
        def train(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
            made.append(self)

    original, train_module.Unlearner = train_module.Unlearner, Stop  # type: ignore[misc]
    try:
        run(lm, folder, objective, make, names)
    finally:
        train_module.Unlearner = original  # type: ignore[misc]
    return made[0]


def test_the_curvature_pass_squares_the_gradient_of_the_sampled_loss(
    lm: LanguageModel, start: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """After one pass h is (1 - beta2) times the squared gradient; weights, momentum and gradients are untouched."""
    made = one_trainer(lm, tmp_path, OBJECTIVES["grad_diff"], ("forget", "retain"))
    made.create_optimizer()
    made.model_wrapped, made.state.global_step = lm.model, 0
    batch = made.data_collator([made.train_dataset[i] for i in range(4)])
    made._before_step([batch])
    retained = made._cut_to(batch, ["retain"])
    logits = made.reader(lm.model.eval(), retained)
    labels = curvature.sampled_labels(logits.detach(), {**retained, "places": torch.arange(4)}, ["retain"], (0, 0))
    w = 1 / (4 * (retained["labels"] != -100).sum(1, keepdim=True))
    (F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100) * w.sqrt()).sum().backward()
    for name, p in lm.model.named_parameters():
        state = made.own_optimizer.state[p]
        assert p.grad is not None
        torch.testing.assert_close(state["hessian"], 0.05 * p.grad**2, rtol=1e-3, atol=1e-12)
        assert (state["exp_avg"] == 0).all() and torch.equal(p.detach(), start[name])


SIZES = {"vocab_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
OPT = {"ffn_dim": 12, "max_position_embeddings": 16, "word_embed_proj_dim": 4}
MIXTRAL = {"intermediate_size": 12, "num_key_value_heads": 2, "num_local_experts": 3}
MAMBA = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4}
ROLES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {  # family -> its sizes, role -> names of weights
    "gpt2": (
        {"vocab_size": 40, "n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 16},
        {"hidden": "c_attn c_proj c_fc c_proj", "embedding": "wte wpe", "decayed": ""},  # tied: the head is wte
    ),
    "opt": (
        {**SIZES, **OPT},
        {
            "hidden": "project_out project_in k_proj v_proj q_proj out_proj fc1 fc2",
            "embedding": "embed_tokens embed_positions",
            "decayed": "",
        },
    ),
    "llama": (
        {**SIZES, "intermediate_size": 12, "tie_word_embeddings": False},
        {
            "hidden": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
            "embedding": "embed_tokens lm_head",
            "decayed": "",
        },
    ),
    "mixtral": (
        {**SIZES, **MIXTRAL},
        {
            "hidden": "q_proj k_proj v_proj o_proj",
            "embedding": "embed_tokens lm_head",
            "decayed": "gate experts.gate_up_proj experts.down_proj",
        },
    ),
    "mamba": (
        MAMBA,
        {"hidden": "in_proj x_proj dt_proj out_proj", "embedding": "embeddings", "decayed": "A_log D conv1d norm_f"},
    ),
}


def roles_of(model: torch.nn.Module) -> dict[str, list[str]]:
    """role -> names of weights; "decayed" are those of role "other" that decay."""
    names = {id(p): name.removesuffix(".weight") for name, p in model.named_parameters()}
    groups = parameter_groups(model, set(object.__new__(Unlearner).get_decay_parameter_names(model)))
    return {
        "decayed" if group["role"] == "other" and "weight_decay" not in group else group["role"]: [
            names[id(p)] for p in group["params"]
        ]
        for group in groups
    }


@pytest.mark.parametrize("family", ROLES)
def test_a_weight_has_its_role_from_the_module_that_holds_it(family: str) -> None:
    """Position embeddings are embeddings; hidden are matrices of linear layers, and no expert, router or recurrence."""
    sizes, expected = ROLES[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    found = roles_of(model)
    for role, names in expected.items():
        ends = [next((n for n in names.split() if name.endswith(n)), name) for name in found.get(role, [])]
        assert sorted(ends) == sorted(names.split()), role
    assert all("norm" in name or "ln_" in name or "bias" in name for name in found["other"])
    assert sum(map(len, found.values())) == len(list(model.parameters()))


def test_of_an_adapter_the_matrices_of_linear_layers_alone_are_hidden() -> None:
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **ROLES["gpt2"][0]))
    targets = ["c_attn", "wte", "wpe"]
    made = Lora(r=2, alpha=4, dropout=0.0, target_modules=targets, merge=False).wrapped(model, seed=0)
    found = roles_of(made)
    assert {name.rpartition("c_attn.")[2] for name in found["hidden"]} == {"lora_A.default", "lora_B.default"}
    assert sorted(name.partition("transformer.")[2] for name in found["embedding"]) == [
        f"{end}.lora_embedding_{side}.default" for end in ("wpe", "wte") for side in "AB"
    ]
    assert set(found) == {"hidden", "embedding"}


@pytest.mark.parametrize(
    "optimizer",
    [functools.partial(Sophia, lr=1e-3, interval=2), functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)],
)
def test_every_optimizer_logs_what_its_steps_did(
    optimizer: Any, lm: LanguageModel, start: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Norms of m, h and the change of the weights, and the share that changed, of the logged step itself."""
    run(lm, tmp_path, OBJECTIVES["grad_diff"], optimizer, max_steps=1)
    logged = json.loads((tmp_path / "train.jsonl").read_text())
    before, after = torch.cat([v.flatten() for v in start.values()]), weights(lm)
    assert logged["update_norm"] == pytest.approx(float((after - before).norm()), rel=1e-4)
    assert logged["effective_update"] == pytest.approx(float((after != before).double().mean()), rel=1e-6)
    assert 0.5 < logged["effective_update"] < 1.0 and logged["m_norm"] > 0
    assert ("win_rate" in logged) == (logged["h_norm"] > 0) == (optimizer.func is Sophia)


def test_sign_descent_is_noted_once(lm: LanguageModel, tmp_path: Path) -> None:
    tight = functools.partial(Sophia, lr=1e-4, rho=1e-9)
    (note,) = run(lm, tmp_path / "tight", OBJECTIVES["grad_diff"], tight).notes
    assert note.startswith("sign descent: ") and "only 0.0% of the coordinates were not clipped" in note
    assert not run(lm, tmp_path / "wide", OBJECTIVES["grad_diff"], functools.partial(Sophia, lr=1e-4, rho=1e6)).notes


@pytest.mark.parametrize(
    ("lr", "changes", "advice"),
    [
        (
            1e-2,
            {"max_steps": 1, "warmup_ratio": 0.1},
            "1 step(s): its one step is the warm-up's first, whose learning ",
        ),
        (1e-2, {"max_steps": 2, "warmup_ratio": 0.1}, None),
        (1e-30, {"max_steps": 2}, "2 step(s): the learning rate is 0, or its updates are lost in rounding: raise opt"),
    ],
)
def test_a_training_that_changed_no_weight_says_so_and_what_to_type(
    lr: float, changes: dict[str, Any], advice: str | None, lm: LanguageModel, tmp_path: Path
) -> None:
    before = weights(lm)
    outcome = run(lm, tmp_path, OBJECTIVES["grad_diff"], functools.partial(torch.optim.SGD, lr=lr), **changes)
    assert torch.equal(weights(lm), before) == (advice is not None)
    assert [note.startswith(f"no weight changed in {advice}") for note in outcome.notes] == [True] * bool(advice)
    assert all(("type train.warmup_ratio=0" in note) == (lr == 1e-2) for note in outcome.notes)


def test_the_later_half_decides_on_sign_descent() -> None:
    """A curvature that starts at 0 clips everything at first: that alone is no degeneration."""
    assert sign_descent_note([0.0, 0.01, 0.2, 0.3]) is None
    assert sign_descent_note([0.4, 0.3, 0.06, 0.02]) is not None  # mean 0.04
    assert sign_descent_note([]) is None


def test_a_gradient_that_turns_nan_under_our_optimizer_ends_as_diverged(lm: LanguageModel, tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                next(lm.model.parameters()).grad[3, 3] = float("nan")

    outcome = train(
        lm.model, lm.reader, parts(lm), objective=OBJECTIVES["npo"], make_optimizer=functools.partial(Sophia, lr=1e-4),
        schedule=Schedule(1, 4, max_steps=6, logging_steps=1), seed=0, pad_id=lm.pad_id,
        folder=tmp_path / "checkpoints", label="unlearn", callbacks=[Poison()],
    )  # fmt: skip
    assert outcome.diverged == "1 gradient coordinates are not finite at step 3" and outcome.num_steps == 3
    assert torch.isfinite(weights(lm)).all()  # the coordinate was left as it was


def test_the_gradient_conflict_is_logged_on_request_and_changes_no_number(
    lm: LanguageModel, start: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    ends = []
    for wanted in (True, False):
        run(fresh(lm, start), tmp_path / str(wanted), OBJECTIVES["npo"], log_gradients=wanted)
        ends.append(weights(lm))
    assert torch.equal(*ends)
    lines = [[json.loads(line) for line in (tmp_path / str(wanted) / "train.jsonl").open()] for wanted in (True, False)]
    assert all(-1 <= line["gradient_cosine"] <= 1 and line["retain_gradient_norm"] > 0 for line in lines[0])
    assert all("gradient_cosine" not in line for line in lines[1])


def full_gradient(lm: LanguageModel, objective: Objective, clip: float | None = None) -> list[torch.Tensor]:
    """Of the loss on all twelve forget rows and twelve of the retain rows, in the order of the parameters."""
    batch = {name: pad(encoded[:12], lm.pad_id) for name, (_, encoded) in parts(lm).items()}
    scored = {name: Scored(lm.reader(lm.model, rows), rows["labels"]) for name, rows in batch.items()}
    lm.model.zero_grad()
    objective.total(*objective.terms(scored)).backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(lm.model.parameters(), clip)
    found = [p.grad.clone() for p in lm.model.parameters() if p.grad is not None]
    lm.model.zero_grad()
    return found


def test_sharpness_aware_steps_ascend_along_the_gradient_of_all_rows_and_clip_the_gradient_there(
    lm: LanguageModel, start: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Against the method written out: w - lr clip(g(w + radius g / ||g||)), whatever the accumulation."""
    objective = Objective(losses.grad_ascent, None)
    sam = functools.partial(SAM, lr=0.5, radius=0.3, base=torch.optim.SGD)
    ends = []
    for micro in (12, 3):
        run(fresh(lm, start), tmp_path / str(micro), objective, sam, batch_size=12, micro_batch_size=micro, max_steps=1,
            max_grad_norm=0.05)  # fmt: skip
        ends.append(weights(lm))
    fresh(lm, start)
    first = full_gradient(lm, objective)
    norm = torch.cat([g.flatten() for g in first]).norm()
    before = [p.detach().clone() for p in lm.model.parameters()]
    with torch.no_grad():
        for p, g in zip(lm.model.parameters(), first, strict=True):
            p.add_(0.3 * g / norm)
    second = full_gradient(lm, objective, clip=0.05)
    expected = torch.cat([(w - 0.5 * g).flatten() for w, g in zip(before, second, strict=True)])
    moved = torch.cat([w.flatten() for w in before])
    for end in ends:
        assert float((end - moved).norm()) == pytest.approx(0.5 * 0.05, rel=1e-3)  # the clip was active
        torch.testing.assert_close(end, expected, rtol=0, atol=2e-6)


def test_a_zeroth_order_run_takes_no_gradient_and_does_not_depend_on_the_split(
    lm: LanguageModel, start: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    class NoGradient(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            assert all(p.grad is None for p in lm.model.parameters())

    ends = []
    for micro in (4, 2):
        outcome = train(
            fresh(lm, start).model, lm.reader, parts(lm), objective=OBJECTIVES["grad_diff"],
            make_optimizer=functools.partial(MeZO, lr=1e-4), pad_id=lm.pad_id, seed=0, label="unlearn",
            schedule=Schedule(1, 4, micro_batch_size=micro, max_steps=3, warmup_ratio=0, logging_steps=1),
            folder=tmp_path / str(micro), records=tmp_path / f"{micro}.jsonl", callbacks=[NoGradient()],
        )  # fmt: skip
        ends.append(weights(lm))
        lines = [json.loads(line) for line in (tmp_path / f"{micro}.jsonl").open()]
        assert all(line["loss"] == pytest.approx(line["forget_loss"] + line["retain_loss"], abs=1e-5) for line in lines)
        assert outcome.last["effective_update"] > 0.5
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-5)
    assert (ends[0] - torch.cat([v.flatten() for v in start.values()])).abs().max() > 1e-4


def test_a_hybrid_run_alternates(lm: LanguageModel, tmp_path: Path) -> None:
    make = functools.partial(
        Hybrid, lr=1e-3, first_order=torch.optim.SGD, zeroth_order=functools.partial(MeZO, lr=1e-5), first_steps=2
    )
    run(lm, tmp_path, OBJECTIVES["grad_diff"], make, max_steps=6)
    norms = [json.loads(line)["grad_norm"] for line in (tmp_path / "train.jsonl").open()]
    assert [norm > 0 for norm in norms] == [True, True, False, True, True, False]


@pytest.mark.parametrize("inverse", ["diagonal", "woodfisher"])
def test_influence_unlearning_is_one_newton_step_of_the_forget_loss(
    inverse: str, lm: LanguageModel, start: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """theta + alpha (N_f / N_r) (H + lambda I)^-1 grad L_f, with H of six retain rows, whatever the batch size."""
    objective = Objective(losses.grad_ascent, None)
    make = functools.partial(Influence, lr=1e-2, damping=0.1, num_samples=6, inverse=inverse)
    outcome = run(lm, tmp_path, objective, make, ("forget", "retain"), epochs=7, batch_size=5, max_grad_norm=0.001)
    moved = weights(lm)
    fresh(lm, start).model.eval()
    gradient = torch.cat([g.flatten() for g in full_gradient(lm, objective)]).double()  # of minus L_f
    samples = []
    for i in np.random.default_rng(seed_of("influence", 0)).permutation(20)[:6]:
        batch = pad([parts(lm)["retain"][1][i]], lm.pad_id)
        Scored(lm.reader(lm.model, batch), batch["labels"]).mean_nll.sum().backward()
        samples.append(torch.cat([p.grad.flatten() for p in lm.model.parameters() if p.grad is not None]).double())
        lm.model.zero_grad()
    rows = torch.stack(samples)
    if inverse == "diagonal":
        direction = gradient / (rows.square().mean(0) + 0.1)
    else:
        direction = conjugate_gradients(lambda v: 0.1 * v + rows.T @ (rows @ v) / 6, gradient)
    assert outcome.num_steps == 1 and not outcome.notes
    expected = weights(lm).double() - 1e-2 * 12 / 20 * direction
    assert (expected - weights(lm)).abs().max() > 1e-5
    torch.testing.assert_close(moved.double(), expected, rtol=0, atol=1e-6)


def test_an_influence_step_of_another_loss_says_that_it_is_one(lm: LanguageModel, tmp_path: Path) -> None:
    make = functools.partial(Influence, lr=1e-3, damping=0.1, num_samples=4)
    outcome = run(lm, tmp_path, OBJECTIVES["po"], make, ("forget", "retain", "refusal"))
    assert outcome.notes == ["one Newton step of this loss: influence unlearning proper has loss=grad_ascent"]


def conjugate_gradients(product: Callable[[torch.Tensor], torch.Tensor], b: torch.Tensor) -> torch.Tensor:
    """x with `product(x) = b`, by a way that has no inverse in it."""
    x, residual = torch.zeros_like(b), b.clone()
    direction = residual
    for _ in range(50):
        image = product(direction)
        step = (residual @ residual) / (direction @ image)
        x, following = x + step * direction, residual - step * image
        if following.norm() < 1e-10 * b.norm():
            break
        direction, residual = following + (following @ following) / (residual @ residual) * direction, following
    return x


@pytest.mark.parametrize("estimator", ["gnb", "hutchinson"])
def test_curvature_passes_disturb_neither_order_schedule_nor_random_numbers(
    estimator: str, lm: LanguageModel, start: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Where rho is so small that every step is a sign, a pass at each step or only at the first makes no difference."""
    lm.model.config.attention_dropout = 0.1  # draws from the random state that a pass must leave alone
    for layer in lm.model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    ends, rates = [], []
    for interval in (1, 1000):
        make = functools.partial(Sophia, lr=1e-3, rho=1e-30, eps=1e-30, estimator=estimator, interval=interval)
        run(fresh(lm, start), tmp_path / str(interval), OBJECTIVES["npo"], make, max_steps=6, dropout=True)
        ends.append(weights(lm))
        rates.append([json.loads(line)["learning_rate"] for line in (tmp_path / str(interval) / "train.jsonl").open()])
    assert torch.equal(*ends) and rates[0] == rates[1]
    assert not torch.equal(ends[0], torch.cat([v.flatten() for v in start.values()]))


def test_forget_and_retain_loss_are_logged_apart(lm: LanguageModel, tmp_path: Path) -> None:
    batch = {name: pad(encoded, lm.pad_id) for name, (_, encoded) in parts(lm).items()}
    run(
        lm,
        tmp_path,
        Objective(losses.grad_ascent, "nll", gamma=0.5),
        functools.partial(torch.optim.SGD, lr=0.0),
        batch_size=12,
    )
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    with torch.no_grad():
        nll = Scored(lm.reader(lm.model.eval(), batch["forget"]), batch["forget"]["labels"]).mean_nll.mean()
    mean = sum(line["forget_loss"] for line in lines) / 4  # four steps of twelve rows visit each row four times
    assert mean == pytest.approx(-float(nll), rel=1e-5)
    for line in lines:
        assert line["loss"] == pytest.approx(line["forget_loss"] + 0.5 * line["retain_loss"], rel=1e-5)


def test_a_run_whose_retain_loss_explodes_stops_and_says_why(lm: LanguageModel, tmp_path: Path) -> None:
    outcome = run(
        lm, tmp_path, OBJECTIVES["grad_diff"], functools.partial(torch.optim.SGD, lr=30.0),
        max_steps=50, diverged_at=1.5, max_grad_norm=0.0,
    )  # fmt: skip
    assert outcome.num_steps < 50
    assert outcome.diverged is not None and ("retain loss" in outcome.diverged or "nan" in outcome.diverged)


def test_a_loss_that_turns_nan_stops_the_run(lm: LanguageModel, tmp_path: Path) -> None:
    outcome = run(lm, tmp_path, OBJECTIVES["grad_ascent"], functools.partial(torch.optim.SGD, lr=1e30), max_steps=50)
    assert outcome.num_steps < 50 and outcome.diverged is not None and "nan" in outcome.diverged
    assert all(json.loads(line) for line in (tmp_path / "train.jsonl").open())


@pytest.mark.parametrize("optimizer", [SGD, functools.partial(Sophia, lr=1e-3, interval=2, curvature_on="forget")])
def test_without_a_retain_term_the_retain_nll_is_logged_and_changes_no_number(
    optimizer: Any, lm: LanguageModel, start: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """It is that of the step's retain rows before the step, whatever the split; other numbers stay to the last bit."""
    objective, ends, logged = OBJECTIVES["grad_ascent"], [], []
    for label, names, micro in (
        ("full", ("forget", "retain"), 4),
        ("split", ("forget", "retain"), 2),
        ("without", ("forget",), 4),
    ):
        run(fresh(lm, start), tmp_path / label, objective, optimizer, names, micro_batch_size=micro, logging_steps=2)
        ends.append(weights(lm))
        logged.append([json.loads(line) for line in (tmp_path / label / "train.jsonl").open()])
    assert torch.equal(ends[0], ends[2]) and [line["step"] for line in logged[0]] == [1, 2, 4]
    assert [{key: line[key] for key in line if key != "retain_nll"} for line in logged[0]] == logged[2]
    assert [line["retain_nll"] for line in logged[1]] == pytest.approx([line["retain_nll"] for line in logged[0]], 1e-4)
    planned = Stream({name: parts(lm)[name] for name in ("forget", "retain")}, num_steps=4, batch_size=4, seed=0)
    first = pad([planned[i]["retain"][1] for i in range(4)], lm.pad_id)
    with torch.no_grad():
        nll = Scored(fresh(lm, start).reader(lm.model.eval(), first), first["labels"]).mean_nll.mean()
    assert logged[0][0]["retain_nll"] == pytest.approx(float(nll), rel=1e-6)


@pytest.mark.parametrize(("lr", "steps"), [(3.0, 50), (30.0, 1)])
def test_ascent_that_destroys_what_is_retained_ends_as_diverged_also_at_its_last_step(
    lr: float, steps: int, lm: LanguageModel, tmp_path: Path
) -> None:
    """Its own loss is finite and does not show it."""
    outcome = run(
        lm, tmp_path, OBJECTIVES["grad_ascent"], functools.partial(torch.optim.SGD, lr=lr), ("forget", "retain"),
        max_steps=steps, diverged_at=1.5, max_grad_norm=0.0,
    )  # fmt: skip
    assert outcome.diverged is not None and outcome.diverged.startswith("the retain NLL is ")
    assert outcome.diverged.endswith("at the start, 0.1)") and 1 <= outcome.num_steps < max(steps, 2)
    assert torch.isfinite(weights(lm)).all()


def killed_run(lm: LanguageModel, folder: Path, make: Callable[..., Any], objective: str = "npo_kl") -> None:
    """`run` of npo_kl for 9 steps with a checkpoint every 4, killed after step 7."""

    class Killed(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 7:
                raise Killed

    with pytest.raises(Killed):
        train(
            lm.model, lm.reader, parts(lm), objective=OBJECTIVES[objective], make_optimizer=make,
            schedule=Schedule(1, 4, max_steps=9, warmup_ratio=0.0, logging_steps=1, save_steps=4), seed=0,
            pad_id=lm.pad_id, folder=folder / "checkpoints", label="unlearn", records=folder / "train.jsonl",
            callbacks=[Kill()],
        )  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_run_resumes_to_the_same_weights(
    name: str, lm: LanguageModel, start: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    make, dtype = RESUMED[name]
    lm.model.to(dtype)
    run(fresh(lm, start), tmp_path / "full", OBJECTIVES["npo_kl"], make, max_steps=9, save_steps=4)
    full = weights(lm)

    killed_run(fresh(lm, start), tmp_path / "killed", make)
    half = tmp_path / "killed" / "checkpoints" / "checkpoint-6"  # cut off while it was written: no COMPLETE in it
    half.mkdir()
    run(fresh(lm, start), tmp_path / "killed", OBJECTIVES["npo_kl"], make, max_steps=9, save_steps=4)
    assert torch.equal(weights(lm), full)
    assert (tmp_path / "killed" / "train.jsonl").read_text() == (tmp_path / "full" / "train.jsonl").read_text()


def test_a_killed_run_without_a_retain_term_resumes_to_the_same_retain_nll_and_the_same_end(
    lm: LanguageModel, start: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    sgd, names = functools.partial(torch.optim.SGD, lr=3.0), ("forget", "retain")
    settings = {"max_steps": 9, "save_steps": 4, "diverged_at": None}
    run(fresh(lm, start), tmp_path / "full", OBJECTIVES["grad_ascent"], sgd, names, **settings)
    full = weights(lm)
    killed_run(fresh(lm, start), tmp_path / "killed", sgd, "grad_ascent")
    run(fresh(lm, start), tmp_path / "killed", OBJECTIVES["grad_ascent"], sgd, names, **settings)
    assert torch.equal(weights(lm), full)
    assert (tmp_path / "killed" / "train.jsonl").read_text() == (tmp_path / "full" / "train.jsonl").read_text()


def test_batch_sizes_that_do_not_divide_are_errors() -> None:
    with pytest.raises(UsageError, match="not a multiple of 2 process"):
        Schedule(1, 8, micro_batch_size=3).accumulation(2)
    assert Schedule(1, 8, micro_batch_size=2).accumulation(2) == 2
    assert Schedule(1, 8).accumulation(2) == 1


def test_the_reference_is_the_start_model_also_after_training(lm: LanguageModel, tmp_path: Path) -> None:
    made = one_trainer(lm, tmp_path, OBJECTIVES["npo_kl"], ("forget", "retain"))
    reference = compute_reference(
        lm.model, lm.reader, made.stream, ["reference_nll", "reference_logits"], ["forget", "retain"], lm.pad_id
    )
    batch = made._cut_to(made.data_collator([made.train_dataset[i] for i in range(4)]), ["retain"])
    with torch.no_grad():
        before = lm.reader(lm.model.eval(), batch)
        for p in lm.model.parameters():
            p.add_(0.1)
    rows = {"retain": batch["rows"]}
    mask = batch["labels"] != -100
    torch.testing.assert_close(reference.outputs(rows, mask.shape[1])["reference_logits"]["retain"][mask], before[mask])
    torch.testing.assert_close(
        reference.outputs(rows, mask.shape[1])["reference_nll"]["retain"], Scored(before, batch["labels"]).nll
    )


def test_a_layers_frozen_output_and_the_logits_of_a_part_are_computed_when_they_are_read(
    lm: LanguageModel, tmp_path: Path
) -> None:
    made = one_trainer(lm, tmp_path, OBJECTIVES["rmu"], ("forget", "retain"))
    wanted = ["reference_logits", "reference_hidden"]
    reference = compute_reference(lm.model, lm.reader, made.stream, wanted, ["forget", "retain"], lm.pad_id, layer=1)
    batch = made._cut_to(made.data_collator([made.train_dataset[i] for i in range(4)]), ["retain"])
    with torch.no_grad():
        _, before = lm.reader.with_layer(lm.model.eval(), batch, 1)
        for p in lm.model.parameters():
            p.add_(0.1)
    rows, mask = {"retain": batch["rows"]}, batch["labels"] != -100
    torch.testing.assert_close(reference.outputs(rows, mask.shape[1])["reference_hidden"]["retain"][mask], before[mask])
    assert list(reference.outputs(rows, mask.shape[1])["reference_hidden"]) == ["retain"]
    assert reference.head is not None
    calls: list[int] = []
    reference.head.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    both = {"retain": batch["rows"], "forget": batch["rows"]}
    logits = reference.outputs(both, mask.shape[1])["reference_logits"]
    assert set(logits) == {"retain", "forget"} and calls == []
    assert logits["retain"].shape[:2] == mask.shape and calls == [4]


def test_rmu_moves_the_weights_up_to_its_layer_and_gives_the_others_a_gradient_of_0(
    lm: LanguageModel, tmp_path: Path
) -> None:
    """None would keep an engine waiting for it."""
    made = one_trainer(lm, tmp_path, OBJECTIVES["rmu"], ("forget", "retain"))
    made.create_optimizer()
    batch = made.data_collator([made.train_dataset[i] for i in range(4)])
    made.compute_loss(lm.model, batch).backward()
    moved = {name for name, p in lm.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert all(p.grad is not None for p in lm.model.parameters())
    assert moved == {name for name, _ in lm.model.named_parameters() if "layers.0" in name or "embed_tokens" in name}


def test_a_layer_is_read_of_layers_that_are_computed_again(
    lm: LanguageModel, start: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    ends = []
    for again in (False, True):
        run(fresh(lm, start), tmp_path / str(again), OBJECTIVES["rmu"], max_steps=2, gradient_checkpointing=again)
        ends.append(weights(lm))
    assert torch.equal(*ends) and not torch.equal(ends[0], torch.cat([v.flatten() for v in start.values()]))


@pytest.mark.parametrize("name", ["wga", "satimp", "ce_u", "undial", "dpo", "altpo", "rmu"])
def test_a_forget_term_makes_answers_less_likely_that_were_learnt(name: str, lm: LanguageModel, tmp_path: Path) -> None:
    learn = Objective(functools.partial(losses.po), None)
    learnt = {"refusal": parts(lm)["forget"]}  # po learns what stands in this part
    train(
        lm.model, lm.reader, learnt, objective=learn, make_optimizer=functools.partial(AdamW, lr=1e-2), seed=0,
        schedule=Schedule(1, 12, max_steps=12, warmup_ratio=0.0), pad_id=lm.pad_id, folder=tmp_path / "learn",
        label="learn",
    )  # fmt: skip
    rows = pad(parts(lm)["forget"][1], lm.pad_id)

    def nll() -> float:
        with torch.no_grad():
            return float(Scored(lm.reader(lm.model.eval(), rows), rows["labels"]).mean_nll.mean())

    before = nll()
    forget = Objective(OBJECTIVES[name].forget_term, None, layer=0)
    outcome = run(lm, tmp_path / "forget", forget, functools.partial(AdamW, lr=3e-3), max_steps=12)
    assert before < 4.5  # 5.8 is a guess
    assert outcome.diverged is None and nll() > before + 0.05
