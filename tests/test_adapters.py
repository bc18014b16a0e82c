"""Adapters, layers that are computed again, and the choice of attention: what is trained, what stays, errors."""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import items
from safetensors.torch import load_file, save_file
from test_trainer import OBJECTIVES, SGD, killed_run, one_trainer, run, weights
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from soul_exp import compose
from soul_exp.artifacts import prepared_models
from soul_exp.data import Template, pad
from soul_exp.errors import UsageError
from soul_exp.models import attention, loading, lora, saving
from soul_exp.models.checkpoint import Checkpoint
from soul_exp.models.language_model import LanguageModel, fit_vocabulary
from soul_exp.models.layers import recomputing
from soul_exp.models.lora import WEIGHTS, Lora
from soul_exp.optim import SAM, AdamW, Influence, MeZO, Muon, Sophia
from soul_exp.run import ModelSettings

LORA = Lora(r=4, alpha=8, dropout=0.0, target_modules="all-linear", merge=False)
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sophia, gnb": functools.partial(Sophia, lr=1e-2),
    "sophia, hutchinson": functools.partial(Sophia, lr=1e-2, estimator="hutchinson"),
    "sam": functools.partial(SAM, lr=1e-2, base=AdamW),
    "mezo": functools.partial(MeZO, lr=1e-3),
    "muon": functools.partial(Muon, lr=1e-2),
    "influence": functools.partial(Influence, lr=1e-2, damping=0.1, num_samples=4),
}
Given = Callable[..., LanguageModel]


@pytest.fixture
def given(lm: LanguageModel, tmp_path: Path) -> Given:
    """`given()` is the model of `lm` read from a folder; with an adapter on, it is wrapped."""
    saving.save(lm.model, lm.tokenizer, tmp_path / "base")

    def made(
        adapter: Lora | None = None, dtype: str = "float32", attention: str = "sdpa", rows: int | None = None
    ) -> LanguageModel:
        loaded = loading.load_model(str(tmp_path / "base"), dtype=dtype, attention=attention)
        if rows is not None:
            loaded.resize_token_embeddings(rows)
            setattr(loaded, lora.GROWN, True)
        subject = LanguageModel.of(loaded, lm.tokenizer, Template("{question}:"), 128)
        return subject.with_model(adapter.wrapped(loaded, seed=0)) if adapter else subject

    return made


def state(lm: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in lm.model.named_parameters()}


def logits(lm: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return lm.reader(lm.model.eval(), pad(lm.encode(items(6)), lm.pad_id))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_loss_starts_from_the_target_and_moves_the_adapter_only(name: str, given: Given, tmp_path: Path) -> None:
    full = run(given(), tmp_path / "full", OBJECTIVES[name], max_steps=1)
    subject = given(LORA)
    before = state(subject)
    outcome = run(subject, tmp_path / "adapter", OBJECTIVES[name], max_steps=1)
    moved = {key for key, value in state(subject).items() if not torch.equal(value, before[key])}
    reached = "layers.0." if name == "rmu" else ""  # the layer that it reads is the first
    assert moved == {key for key in before if "lora_B" in key and reached in key}  # at B = 0 the gradient of A is 0
    assert all(outcome.last[key] == full.last[key] for key in ("loss", "forget_loss"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_the_adapter_only(name: str, given: Given, tmp_path: Path) -> None:
    subject = given(LORA)
    before = state(subject)
    outcome = run(subject, tmp_path, OBJECTIVES["grad_diff"], OPTIMIZERS[name], ("forget", "retain"), max_steps=2)
    moved = {key for key, value in state(subject).items() if not torch.equal(value, before[key])}
    assert moved and all("lora_" in key for key in moved) and {key for key in before if "lora_B" in key} <= moved
    assert outcome.diverged is None


def test_dropout_is_on_where_a_gradient_is_taken_and_off_where_losses_are_compared(
    given: Given, tmp_path: Path
) -> None:
    """MeZO compares the loss at two points: with an adapter's dropout it would compare two functions."""
    subject = given(Lora(4, 8, 0.5, "all-linear", False))
    with torch.no_grad():
        for name, p in subject.model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    made = one_trainer(subject, tmp_path, OBJECTIVES["grad_diff"], ("forget", "retain"), OPTIMIZERS["mezo"])
    made.create_optimizer()
    batch = made.data_collator([made.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        assert made.compute_loss(subject.model, batch) == made.compute_loss(subject.model, batch)
    assert made.compute_loss(subject.model, batch) != made.compute_loss(subject.model, batch)
    assert not subject.model.training  # but the adapter's dropout
    made.schedule = replace(made.schedule, dropout=True)
    made.compute_loss(subject.model.eval(), batch)  # as SAM's ascent does before the step itself
    assert subject.model.training


def test_the_adapter_is_drawn_by_the_seed_alone_in_the_dtype_of_the_weights(given: Given) -> None:
    torch.manual_seed(1)
    first = given(LORA, "bfloat16")
    drawn = torch.rand(3)
    torch.manual_seed(1)
    given(None, "bfloat16")
    assert torch.equal(drawn, torch.rand(3))  # and leaves the run's random numbers alone
    torch.manual_seed(2)
    assert torch.equal(weights(first), weights(given(LORA, "bfloat16")))
    assert {p.dtype for p in first.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("merge", [False, True])
def test_a_head_and_an_embedding_with_adapters_are_read_and_grouped_as_such(
    merge: bool, given: Given, tmp_path: Path
) -> None:
    lora = Lora(4, 8, 0.0, ["q_proj", "lm_head", "embed_tokens"], merge)
    subject = given(lora)
    seen: list[tuple[int, ...]] = []
    subject.reader.head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    before = logits(subject)
    assert seen == [tuple(before.shape)] and torch.equal(before, logits(given()))
    made = one_trainer(subject, tmp_path, OBJECTIVES["grad_diff"], ("forget", "retain"))
    groups = made.create_optimizer().param_groups
    assert {group["role"]: len(group["params"]) for group in groups} == {"hidden": 4, "embedding": 4}
    run(subject, tmp_path / "kl", OBJECTIVES["npo_kl"])
    after = logits(subject)
    saving.save(subject.model, subject.tokenizer, tmp_path / "saved")
    read = loading.load_model(str(tmp_path / "saved"))
    assert torch.equal(after, logits(subject.with_model(read))) and not torch.equal(after, before)
    measured = LanguageModel.of(read, subject.tokenizer, Template("{question}:"), 128)
    assert torch.equal(after, logits(measured))  # as a run's own model is read to be measured


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_a_merged_model_is_an_ordinary_checkpoint_with_the_same_answers(
    architecture: str, lm: LanguageModel, tmp_path: Path
) -> None:
    small = {
        "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
        "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
        "opt": {
            "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            "word_embed_proj_dim": 32,
        },
    }[architecture]  # fmt: skip
    made = loading.from_scratch({"model_type": architecture, **small}, lm.tokenizer, seed=0)
    subject = lm.with_model(LORA.wrapped(made, seed=0))
    start = logits(subject)
    with torch.no_grad():
        for name, p in subject.model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    before = logits(subject)
    merged = subject.with_model(lora.merged(subject.model))
    saving.save(merged.model, merged.tokenizer, tmp_path / "merged")
    loading.check_folder(tmp_path / "merged", "model.path")
    assert isinstance(merged.model, PreTrainedModel) and not (tmp_path / "merged" / lora.SETTINGS).exists()
    after = logits(merged.with_model(loading.load_model(str(tmp_path / "merged"))))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert (before - start).abs().max() > 1e-2


@pytest.mark.parametrize(("grown", "dtype"), [(False, "float32"), (False, "bfloat16"), (True, "float32")])
def test_a_saved_adapter_is_read_onto_its_base_to_the_same_bits(
    grown: bool, dtype: str, given: Given, lm: LanguageModel, tmp_path: Path
) -> None:
    """Also where it was trained with more embedding rows than its base has, here 384 for 321 tokens: it brings them."""
    if grown:
        lm.tokenizer.add_tokens(["<|more|>"])
    rows = 384 if grown else None
    subject = given(LORA, dtype, rows=rows)
    run(subject, tmp_path, OBJECTIVES["grad_diff"])
    saving.save(subject.model, subject.tokenizer, tmp_path / "saved")
    names = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "saved").iterdir()} == names
    assert any("embed_tokens" in key for key in load_file(tmp_path / "saved" / lora.WEIGHTS)) == grown
    loading.check_folder(tmp_path / "saved", "model.path")
    model = ModelSettings(subject.template, max_length=128, dtype=dtype)
    read = prepared_models.load(model, Checkpoint(str(tmp_path / "saved")))  # as an evaluation does
    assert torch.equal(logits(read), logits(subject)) and not torch.equal(
        logits(read), logits(given(None, dtype, rows=rows))
    )
    assert {p.dtype for p in read.model.parameters()} == {getattr(torch, dtype)}
    before = Checkpoint(str(tmp_path / "saved")).identity()
    (tmp_path / "base" / "config.json").touch()
    assert Checkpoint(str(tmp_path / "saved")).identity() != before  # its answers are not those of another base


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda settings: {**settings, "base_model_name_or_path": "/nowhere"},
            "adapter of /nowhere, which does not exist",
        ),
        (lambda settings: {**settings, "base_model_name_or_path": "wide"}, "lora_A.weight is .* in the adapter, .* in"),
        (lambda settings: {**settings, "target_modules": ["Wqkv"]}, "does not fit its base .*Wqkv"),
        (lambda settings: {**settings, "r": 3}, r"is \[4, 32\] in the adapter, \[3, 32\] in the base"),
        (lambda settings: {**settings, "peft_type": "IA3"}, "peft_type IA3: expected LORA"),
        (lambda settings: {**settings, "modules_to_save": ["lm_head"]}, "lm_head.weight is absent in the adapter"),
        (
            lambda settings: {**settings, "base_model_name_or_path": "saved"},
            "names as its base saved, which is an adapter",
        ),
        (lambda settings: {**settings, "r": "x"}, "does not fit its base .*'str' and 'int'"),
        (lambda settings: {**settings, "bias": "some"}, "does not fit its base .*bias"),
    ],
)
def test_an_adapter_that_cannot_be_used_stops_with_one_line(
    spoil: Callable[[dict[str, Any]], dict[str, Any]],
    sentence: str,
    given: Given,
    lm: LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    wide = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    saving.save(loading.from_scratch(wide, lm.tokenizer, seed=0), lm.tokenizer, tmp_path / "wide")
    subject = given(LORA)
    saving.save(subject.model, subject.tokenizer, tmp_path / "saved")
    file = tmp_path / "saved" / lora.SETTINGS
    file.write_text(json.dumps(spoil(json.loads(file.read_text()))))
    with pytest.raises(UsageError, match=sentence) as error:
        loading.check_folder(tmp_path / "saved", "model.path")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda held: {**held, "base_model.model.extra": torch.zeros(2)}, r"extra is \[2\] in the adapter, absent in"),
        (lambda held: {f"_orig_mod.{key}": held[key] for key in held}, "absent in the adapter"),
        (lambda held: {key: held[key].to(torch.int8) for key in held}, "holds I8 numbers for base_model.model.*lora_A"),
        (lambda held: {key: held[key] for key in held if "layers.1" not in key}, "layers.1.* is absent in the adapter"),
    ],
)
def test_weights_of_an_adapter_that_its_base_does_not_use_or_have_are_named(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    sentence: str,
    given: Given,
    tmp_path: Path,
) -> None:
    subject = given(LORA)
    saving.save(subject.model, subject.tokenizer, tmp_path / "saved")
    loading.check_folder(tmp_path / "saved", "model.path")
    file = tmp_path / "saved" / lora.WEIGHTS
    save_file(change(load_file(file)), file)
    with pytest.raises(UsageError, match=sentence):
        loading.check_folder(tmp_path / "saved", "model.path")


FOREIGN: dict[str, dict[str, Any]] = {
    "saved modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "a saved norm": {"modules_to_save": ["norm"]},
    "a saved head of a grown embedding": {"rows": 384, "modules_to_save": ["lm_head"]},
    "a grown embedding": {"rows": 384},
    "trained tokens": {"trainable_token_indices": [3, 5]},
    "DoRA of ranks by layer, scaled by their roots": {
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
    },
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_an_adapter_that_another_program_saved_gives_peft_s_own_logits(
    name: str, tied: bool, lm: LanguageModel, tmp_path: Path
) -> None:
    """Its own embedding, output head or other modules included; a new embedding row for a pad does not disturb it."""
    import peft

    config = {**lm.model.config.to_dict(), "tie_word_embeddings": tied}
    lm.tokenizer.save_pretrained(tmp_path / "adapter")
    given = {**FOREIGN[name]}
    rows = given.pop("rows", None)

    def base() -> Any:
        made = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        if rows:
            made.resize_token_embeddings(rows)
        return made

    saving.save(AutoModelForCausalLM.from_config(LlamaConfig(**config)), lm.tokenizer, tmp_path / "base")
    wrapped = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **given))
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    wrapped.save_pretrained(str(tmp_path / "adapter"))  # peft decides whether the embedding goes with it
    ids = torch.arange(40)[None]
    loading.check_folder(tmp_path / "adapter", "model.path")
    model = ModelSettings(Template("{question}:"), max_length=128)
    ours = prepared_models.load(model, Checkpoint(str(tmp_path / "adapter")))
    with torch.no_grad():
        own = peft.PeftModel.from_pretrained(base(), str(tmp_path / "adapter")).eval()(input_ids=ids).logits
        assert torch.equal(ours.model.eval()(input_ids=ids).logits, own)
        assert not torch.allclose(own, base().eval()(input_ids=ids).logits, atol=1e-3)
    assert lora.embedding_of(ours.model).num_embeddings == (rows or 320)


def test_an_adapter_that_changed_the_head_has_no_room_for_a_new_pad(given: Given) -> None:
    subject = given(Lora(4, 8, 0.0, ["lm_head"], False))
    words = {"<end>": 0, "a": 1} | {f"w{i}": i for i in range(2, 320)}
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)), eos_token="<end>", pad_token="<new>")
    with pytest.raises(UsageError, match="cannot get a row for a new one: merge the adapter into its base with peft's"):
        fit_vocabulary(subject.model, plain)


def test_an_adapter_of_pickled_weights_is_an_error(given: Given, tmp_path: Path) -> None:
    subject = given(LORA)
    saving.save(subject.model, subject.tokenizer, tmp_path / "saved")
    (tmp_path / "saved" / lora.WEIGHTS).rename(tmp_path / "saved" / "adapter_model.bin")
    with pytest.raises(UsageError, match=r"has no adapter_model\.safetensors"):
        loading.check_folder(tmp_path / "saved", "model.path")


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (functools.partial(Sophia, lr=1e-2, interval=3), "float32"),
        (functools.partial(AdamW, lr=1e-3, rounding="master"), "bfloat16"),
    ],
)
def test_a_killed_run_of_an_adapter_resumes_to_the_same_bits(
    make: Callable[..., Any], dtype: str, given: Given, tmp_path: Path
) -> None:
    adapter = Lora(4, 8, 0.1, "all-linear", False)  # with dropout, whose random numbers have to go on as well
    full = given(adapter, dtype)
    run(full, tmp_path / "full", OBJECTIVES["npo_kl"], make, max_steps=9, save_steps=4)

    killed_run(given(adapter, dtype), tmp_path / "killed", make)
    checkpoint = tmp_path / "killed" / "checkpoints" / "checkpoint-4"
    assert (checkpoint / WEIGHTS).is_file() and not (checkpoint / "model.safetensors").exists()
    again = given(adapter, dtype)
    run(again, tmp_path / "killed", OBJECTIVES["npo_kl"], make, max_steps=9, save_steps=4)
    assert torch.equal(weights(again), weights(full)) and not torch.equal(
        weights(again), weights(given(adapter, dtype))
    )
    assert {p.dtype for p in again.model.parameters()} == {getattr(torch, dtype)}
    assert (tmp_path / "killed" / "train.jsonl").read_text() == (tmp_path / "full" / "train.jsonl").read_text()


def test_rates_tuned_for_all_weights_do_not_count_for_an_adapter(caplog: pytest.LogCaptureFixture) -> None:
    config: dict[str, Any] = {"tuned": "embedded TOFU", "adapter": None}
    assert compose.tuned_on(config, ["seed=1", "train.gradient_checkpointing=true"]) == "embedded TOFU"
    assert compose.tuned_on(config, ["optimizer.lr=1"]) is None and not caplog.records
    with caplog.at_level("INFO"):
        assert compose.tuned_on({**config, "adapter": vars(LORA)}, ["adapter=lora"]) is None
    assert [record.message for record in caplog.records] == [
        "untuned: the numbers of conf/tuned/ are for unlearning every weight, not for an adapter"
    ]


# --- layers that are computed again ---------------------------------------------------------------------------------

CURVATURES: dict[str, Callable[..., Any]] = {
    "none": SGD,
    "gnb": functools.partial(Sophia, lr=1e-2, rho=300.0, eps=1e-8, interval=2),
    "hutchinson": functools.partial(Sophia, lr=1e-2, rho=300.0, eps=1e-8, interval=2, estimator="hutchinson"),
    "influence": OPTIMIZERS["influence"],
    "sam": OPTIMIZERS["sam"],
}


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("none", None), ("gnb", None), ("hutchinson", None),
        ("gnb", Lora(4, 8, 0.1, "all-linear", False)), ("sam", LORA), ("influence", LORA),
    ],
)  # fmt: skip
def test_computing_layers_again_changes_no_bit(name: str, adapter: Lora | None, given: Given, tmp_path: Path) -> None:
    ends, records = [], []
    for again in (False, True):
        subject = given(adapter)
        for layer in subject.model.get_decoder().layers:  # random numbers that the second time have to be the first's
            layer.self_attn.attention_dropout = 0.1
        folder = tmp_path / str(again)
        run(
            subject, folder, OBJECTIVES["npo_kl"], CURVATURES[name], gradient_checkpointing=again,
            micro_batch_size=2, log_gradients=True, max_steps=3, dropout=True,
        )  # fmt: skip
        ends.append(weights(subject))
        records.append((folder / "train.jsonl").read_text())
        assert not any("forward" in vars(module) for module in subject.model.modules())  # and it is over afterwards
    assert torch.equal(*ends) and records[0] == records[1]
    assert not torch.equal(ends[0], weights(given(adapter)))


@pytest.mark.parametrize("estimator", ["gnb", "hutchinson"])
def test_a_curvature_pass_computes_its_layers_again(estimator: str, given: Given, tmp_path: Path) -> None:
    """In evaluation mode, where transformers' own checkpointing is off: a layer runs forward once more a backward."""
    counts = []
    for again in (False, True):
        subject = given()
        make = functools.partial(Sophia, lr=1e-3, estimator=estimator)
        made = one_trainer(subject, tmp_path / str(again), OBJECTIVES["grad_diff"], ("forget", "retain"), make)
        made.create_optimizer()
        made.model_wrapped = subject.model
        seen: list[bool] = []
        subject.model.get_decoder().layers[0].mlp.register_forward_pre_hook(
            lambda m, *_, seen=seen: seen.append(m.training)
        )
        batch = made.data_collator([made.train_dataset[i] for i in range(4)])
        if again:
            with recomputing(subject.model):
                made._before_step([batch])
        else:
            made._before_step([batch])
        assert not any(seen)
        counts.append(len(seen))
    assert counts == [1, 2 if estimator == "gnb" else 3]  # hutchinson goes backward twice


def test_without_a_graph_nothing_is_computed_again(given: Given) -> None:
    subject = given()
    with recomputing(subject.model):
        again = logits(subject)
    assert torch.equal(again, logits(subject))


def test_a_model_without_such_layers_is_an_error() -> None:
    with (
        pytest.raises(UsageError, match="Linear has no layers that can be recomputed"),
        recomputing(torch.nn.Linear(1, 1)),
    ):
        pass


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.fixture
def kernels() -> Iterator[None]:
    """Whatever a test chooses for the process, as it was."""
    cuda = torch.backends.cuda
    names = list(attention.KERNELS.values())
    before = [getattr(cuda, f"{name}_sdp_enabled")() for name in names]
    yield
    for name, enabled in zip(names, before, strict=True):
        getattr(cuda, f"enable_{name}_sdp")(enabled)


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"


def test_attention_uses_the_kernel_that_was_chosen(given: Given, kernels: None) -> None:
    found, seen = {}, {}
    for name in ("sdpa", "sdpa_flash", "sdpa_math", "eager"):
        attention.choose_kernel(name)
        subject = given(attention=name)
        with Operators() as operators:
            found[name] = logits(subject)
        seen[name] = FLASH in operators.names
    assert seen == {"sdpa": True, "sdpa_flash": True, "sdpa_math": False, "eager": False}
    for other in found.values():
        torch.testing.assert_close(other, found["sdpa"], rtol=1e-4, atol=1e-5)


def test_curvature_is_differentiated_twice_whatever_kernel_was_chosen(
    given: Given, kernels: None, tmp_path: Path
) -> None:
    ends = []
    for name in ("sdpa_math", "sdpa_flash"):
        attention.choose_kernel(name)
        subject = given(attention=name)
        run(subject, tmp_path / name, OBJECTIVES["grad_diff"], CURVATURES["hutchinson"])
        ends.append(weights(subject))
        assert torch.backends.cuda.flash_sdp_enabled() == (name == "sdpa_flash")  # as chosen, after the passes
    torch.testing.assert_close(*ends, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "sentence"),
    [
        ("kernels-community/flash-attn", "cuda", "bfloat16", "is unknown: choose one of sdpa, sdpa_math"),
        ("flex", "cpu", "float32", "is unknown"),
        (None, "cpu", "float32", "is unknown"),
        ("sdpa_cudnn", "cpu", "float32", "is a kernel for GPUs: choose sdpa, sdpa_math or sdpa_flash"),
        ("flash_attention_2", "cpu", "bfloat16", "on a GPU only"),
        ("flash_attention_2", "cuda", "float32", "precision=bf16_master"),
        ("flash_attention_3", "cuda", "bfloat16", "needs the package flash-attn-3, which is not installed"),
    ],
)
def test_an_unavailable_attention_is_an_error(
    requested: Any, device: str, dtype: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attention.PACKAGES, "flash_attention_3", ("flash-attn-3", lambda: False))
    with pytest.raises(UsageError, match=sentence):
        attention.check(requested, device, dtype)
    for name in ("sdpa", "sdpa_math", "sdpa_flash", "eager"):
        attention.check(name, "cpu", "float32")
