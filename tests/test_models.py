"""Models: logits at answer positions, tokenizers, errors."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import items
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from soul_exp.artifacts import prepared_models
from soul_exp.checks import check
from soul_exp.data import Template, pad
from soul_exp.errors import UsageError
from soul_exp.models import checkpoint, loading, saving
from soul_exp.models.checkpoint import DONE, UNLEARNED, Checkpoint
from soul_exp.models.language_model import LanguageModel, fit_vocabulary, load_tokenizer
from soul_exp.models.layers import AnswerReader, layer_of, max_positions
from soul_exp.models.lora import Lora
from soul_exp.run import ModelSettings


def test_logits_at_answer_positions_are_those_of_the_complete_sequence(lm: LanguageModel) -> None:
    rows = lm.encode(items(5))
    batch = pad(rows, lm.pad_id)
    lm.model.eval()
    with torch.no_grad():
        picked = lm.reader(lm.model, batch)
        full = lm.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert picked.shape == (5, batch["labels"].shape[1], len(lm.tokenizer))
    for i, row in enumerate(rows):
        for j, position in enumerate(range(row.num_prompt - 1, len(row.ids) - 1)):
            torch.testing.assert_close(picked[i, j], full[i, position])


def test_the_output_head_sees_answer_positions_only(lm: LanguageModel) -> None:
    seen: list[tuple[int, ...]] = []
    lm.reader.head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    batch = pad(lm.encode(items(5)), lm.pad_id)
    lm.reader(lm.model, batch)
    assert seen == [(5, batch["labels"].shape[1], len(lm.tokenizer))]


def test_any_string_survives_the_tokenizer_and_pad_is_not_the_end(lm: LanguageModel) -> None:
    for text in ("Tärä — 日本語 {x}\n\t", "amber birch"):
        assert lm.tokenizer.decode(lm.tokenizer(text)["input_ids"]) == text
    assert lm.tokenizer.pad_token_id != lm.tokenizer.eos_token_id


def test_a_saved_model_reads_back_to_the_same_logits(lm: LanguageModel, tmp_path: Path) -> None:
    saving.save(lm.model, lm.tokenizer, tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    tokenizer = load_tokenizer(str(tmp_path))
    again = LanguageModel.of(loading.load_model(str(tmp_path)), tokenizer, Template("{question}:"), 64)
    batch = pad(lm.encode(items(3)), lm.pad_id)
    torch.testing.assert_close(lm.reader(lm.model.eval(), batch), again.reader(again.model.eval(), batch))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.9, "top_p": 0.6},  # of Llama-2's mirrors and Vicuna: without do_sample
        {"top_k": 7, "min_p": 0.1, "typical_p": 0.3, "epsilon_cutoff": 1e-4, "eta_cutoff": 1e-4},
        {"num_beams": 1, "length_penalty": 2.0, "early_stopping": True},
        {"output_scores": True},
        {"use_cache": False, "cache_implementation": "static"},
        {"pad_token_id": -1, "do_sample": True, "temperature": 0.6},
    ],
)
def test_a_model_is_saved_with_the_generation_settings_that_it_came_with(
    settings: dict[str, Any], lm: LanguageModel, tmp_path: Path
) -> None:
    """The library's own save_pretrained rejects all of them but the last; only the pad and the end tokens are ours."""
    saving.save(lm.model, lm.tokenizer, tmp_path / "given")
    (tmp_path / "given" / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, **settings}))
    loading.check_folder(tmp_path / "given", "model.path")
    template = Template("{question}:")
    given = LanguageModel.of(loading.load_model(str(tmp_path / "given")), lm.tokenizer, template, 64)
    saving.check_saving(given.model, given.tokenizer)
    for save in (saving.save, lambda model, _, folder: saving.save_weights(model, folder, first=True)):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        save(given.model, given.tokenizer, folder)
        saved = json.loads((folder / "generation_config.json").read_text())
        saved.pop("transformers_version")
        ends = [lm.tokenizer.eos_token_id, 5]
        assert saved == {**settings, "eos_token_id": ends, "pad_token_id": lm.tokenizer.pad_token_id}
        assert (
            loading.load_model(str(folder)).generation_config.to_diff_dict()
            == given.model.generation_config.to_diff_dict()
        )


@pytest.mark.parametrize(
    "text",
    [
        '{"early_stopping": "x"}',
        '{"num_return_sequences": 3}',
        '{"eos_token_id": "x"}',
        '{"eos_token_id": [[1]]}',
        "no",
    ],
)
def test_generation_settings_that_the_library_cannot_read_are_errors(
    text: str, lm: LanguageModel, tmp_path: Path
) -> None:
    saving.save(lm.model, lm.tokenizer, tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UsageError, match=r"generation_config.json is not valid \(.*\): correct or remove it"):
        loading.check_folder(tmp_path, "model.path")


def test_settings_that_could_not_be_saved_are_known_before_training(lm: LanguageModel) -> None:
    model: Any = lm.model
    model.config.something = {1, 2}  # no JSON
    with pytest.raises(UsageError, match=r"LlamaForCausalLM could not be saved after training \(.*set.*\): correct"):
        saving.check_saving(model, lm.tokenizer)


MIXTURE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
           "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize("architecture", ["mixtral", "olmoe", "gpt_neox", "apertus", "cohere"])
def test_the_weights_of_a_checkpoint_are_read_back_whatever_the_library_renames(
    architecture: str, lm: LanguageModel, tmp_path: Path
) -> None:
    """Fused experts, a renamed head, numbers that are no parameters, tied embeddings; and other programs' names."""
    model = loading.from_scratch({"model_type": architecture, **MIXTURE}, lm.tokenizer, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    saving.save_weights(model, tmp_path / "checkpoint", first=True)
    saving.save(model, lm.tokenizer, tmp_path / "exported")
    for value in model.state_dict().values():
        value.zero_()
    saving.read_weights(model, tmp_path / "checkpoint")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for folder in ("checkpoint", "exported"):
        again = loading.load_model(str(tmp_path / folder)).state_dict()
        assert all(torch.equal(value, before[name]) for name, value in again.items())


def test_a_tokenizer_whose_pad_is_its_end_gets_another_pad(lm: LanguageModel, tmp_path: Path) -> None:
    lm.tokenizer.pad_token = lm.tokenizer.eos_token
    saving.save(lm.model, lm.tokenizer, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_folder_without_a_configuration_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no config.json"):
        loading.check_folder(tmp_path, "model.path")


def test_pickled_weights_are_errors_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"only pickled weights \(pytorch_model.bin\)"):
        loading.check_folder(tmp_path, "model.path")


def hidden_states(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """What transformers itself calls the hidden states, at answer positions: the embeddings', then each layer's."""
    full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    return [
        torch.stack([line[where] for line, where in zip(states, batch["positions"], strict=True)])
        for states in full.hidden_states
    ]


@pytest.mark.parametrize("architecture", ["llama", "opt", "phi", "qwen2", "gpt2"])
def test_a_layers_output_is_the_hidden_state_that_the_library_tells(architecture: str, lm: LanguageModel) -> None:
    small = {
        "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2},
        "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
                "word_embed_proj_dim": 32},
        "phi": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2},
        "qwen2": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
                  "num_key_value_heads": 2},
        "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 2},
    }[architecture]  # fmt: skip
    model = loading.from_scratch({"model_type": architecture, **small}, lm.tokenizer, seed=0).eval()
    reader = AnswerReader(model)
    batch = pad(lm.encode(items(4)), lm.pad_id)
    with torch.no_grad():
        expected = hidden_states(model, batch)
        hooks = [len(layer._forward_hooks) for layer in reader.layers]  # the library's own
        for layer in (0, 1):  # the last one's is given after the final norm
            logits, found = reader.with_layer(model, batch, layer)
            torch.testing.assert_close(found, expected[layer + 1])
            assert torch.equal(logits, reader(model, batch))
    assert [len(layer._forward_hooks) for layer in reader.layers] == hooks  # whoever asks for no layer pays nothing


def test_a_layers_output_is_part_of_the_graph_up_to_its_layer(lm: LanguageModel) -> None:
    batch = pad(lm.encode(items(4)), lm.pad_id)
    _, states = lm.reader.with_layer(lm.model, batch, 0)
    states.square().mean().backward()
    reached = {name for name, p in lm.model.named_parameters() if p.grad is not None}
    assert reached == {name for name, _ in lm.model.named_parameters() if "layers.0" in name or "embed_tokens" in name}


def test_no_number_means_a_layer_as_deep_as_the_seventh_of_32() -> None:
    layers = [torch.nn.Identity() for _ in range(32)]
    assert layer_of(layers, None) is layers[7] and layer_of(layers[:16], None) is layers[3]
    assert layer_of(layers[:2], None) is layers[0] and layer_of(layers, 31) is layers[31]
    with pytest.raises(UsageError, match=r"loss.layer=2: the model has 2 layers, counted from 0: choose one of them"):
        layer_of(layers[:2], 2)
    with pytest.raises(UsageError, match=r"this architecture marks none: choose another loss"):
        layer_of([], None)


TINY = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}
POSITIONS = {"gpt2": "n_positions", "gptj": "n_positions", "gpt_neo": "max_position_embeddings",
             "opt": "max_position_embeddings", "mpt": "max_seq_len", "roberta": "max_position_embeddings",
             "llama": "max_position_embeddings"}  # fmt: skip


@pytest.mark.parametrize("architecture", POSITIONS)
def test_a_model_with_a_table_of_positions_reads_as_many_tokens_and_no_more(
    architecture: str, lm: LanguageModel
) -> None:
    """The vocabulary has 320 tokens too, and RoBERTa's row of the pad, here the first, is nobody's."""
    small = {
        "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
        "gptj": {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 4},
        "gpt_neo": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]},
        "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
                "word_embed_proj_dim": 32},
        "mpt": {"d_model": 32, "n_layers": 1, "n_heads": 2, "expansion_ratio": 1},
        "roberta": {**TINY, "is_decoder": True},
        "llama": TINY,
    }[architecture]  # fmt: skip
    config = {"model_type": architecture, **small, POSITIONS[architecture]: 320}
    model = loading.from_scratch(config, lm.tokenizer, seed=0).eval()
    positions = max_positions(model)
    assert positions == {"roberta": 319, "llama": None}.get(architecture, 320)
    wrapped = Lora(4, 8, 0.0, "all-linear", False).wrapped(model, seed=0)
    assert max_positions(wrapped) == positions
    with torch.no_grad():
        wrapped(input_ids=torch.full((1, positions or 400), 5))
        if positions is not None:
            with pytest.raises((IndexError, RuntimeError)):
                wrapped(input_ids=torch.full((1, positions + 1), 5))


def test_an_adapter_leaves_the_layers_where_they_are(lm: LanguageModel) -> None:
    batch = pad(lm.encode(items(4)), lm.pad_id)
    with torch.no_grad():
        _, before = lm.reader.with_layer(lm.model.eval(), batch, 0)
        wrapped = Lora(4, 8, 0.0, "all-linear", False).wrapped(lm.model, seed=0).eval()
        reader = AnswerReader(wrapped)
        _, after = reader.with_layer(wrapped, batch, 0)
    assert len(reader.layers) == 2
    torch.testing.assert_close(after, before)  # a new adapter adds 0


@pytest.mark.parametrize("architecture", ["opt", "phi", "qwen2", "gpt2"])
def test_other_architectures_give_the_same_logits_at_answer_positions(architecture: str, lm: LanguageModel) -> None:
    small = {
        "opt": {
            "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            "word_embed_proj_dim": 32,
        },
        "phi": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
        "qwen2": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
        "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
    }[architecture]  # fmt: skip
    model = loading.from_scratch({"model_type": architecture, **small}, lm.tokenizer, seed=0).eval()
    reader = AnswerReader(model)
    batch = pad(lm.encode(items(4)), lm.pad_id)
    with torch.no_grad():
        picked = reader(model, batch)
        full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.stack([line[where] for line, where in zip(full, batch["positions"], strict=True)])
    torch.testing.assert_close(picked, expected)


# --- a checkpoint is what its files say ---------------------------------------------------------------------------

Tensors = dict[str, Tensor]


@pytest.fixture
def saved(lm: LanguageModel, tmp_path: Path) -> Path:
    """The folder of the small model: 2 layers of 9 weights, embedding, final norm and output head, 21 in all."""
    saving.save(lm.model, lm.tokenizer, tmp_path / "saved")
    return tmp_path / "saved"


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def logits_of(path: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = loading.load_model(str(path)).eval()(input_ids=torch.arange(20)[None]).logits
    return found


def settings(path: Path, **fields: Any) -> ModelSettings:
    return ModelSettings(Template("{question}:"), max_length=64, path=str(path), **fields)


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a wrapper's prefix": (
        lambda folder: rewrite(folder, lambda held: {f"_orig_mod.{key}": held[key] for key in held}),
        r"21 missing \(lm_head.weight, .*21 unexpected \(_orig_mod.lm_head.weight",
    ),
    "no output head": (
        lambda folder: rewrite(folder, lambda held: {key: held[key] for key in held if key != "lm_head.weight"}),
        r"1 missing \(lm_head.weight\)",
    ),
    "a layer fewer than config.json has": (
        lambda folder: configure(folder, num_hidden_layers=3),
        r"9 missing \(model.layers.2.input_layernorm.weight, ",
    ),
    "a layer more than config.json has": (
        lambda folder: configure(folder, num_hidden_layers=1),
        r"9 unexpected \(model.layers.1.input_layernorm.weight, ",
    ),
    "a weight that nothing uses": (
        lambda folder: rewrite(folder, lambda held: {**held, "model.extra": torch.zeros(3)}),
        r"1 unexpected \(model.extra\)",
    ),
    "another shape": (
        lambda folder: rewrite(folder, lambda held: {**held, "model.norm.weight": torch.ones(31)}),
        r"1 of another shape \(model.norm.weight \(\[31\] in the file, \[32\] in the model\)\)",
    ),
    "int8 weights": (
        lambda folder: rewrite(folder, lambda held: {**held, "model.norm.weight": torch.ones(32, dtype=torch.int8)}),
        "holds I8 numbers for model.norm.weight: quantised weights cannot be trained",
    ),
    "fp8 weights": (
        lambda folder: rewrite(
            folder, lambda held: {**held, "model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}
        ),
        "holds F8_E4M3 numbers for model.norm.weight",
    ),
    "a field of the wrong type": (
        lambda folder: configure(folder, num_hidden_layers="two"),
        r"config.json cannot be read \(Validation error for field 'num_hidden_layers': .*'two'",
    ),
    "no key heads": (lambda folder: configure(folder, num_key_value_heads=0), "no llama model can be built from it"),
    "quantised, of no known kind": (lambda folder: configure(folder, quantization_config=5), "config.json cannot be"),
    "quantised": (lambda folder: configure(folder, quantization_config={"quant_method": "gptq"}), "quantised weights"),
    "two sets of weights": (
        lambda folder: (folder / "model-00001-of-00002.safetensors").touch(),
        "has model.safetensors beside model-00001-of-00002.safetensors",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_weights_that_are_not_the_model_s_are_named_by_the_check_and_at_loading(name: str, saved: Path) -> None:
    damage, message = WRONG[name]
    loading.check_folder(saved, "model.path")
    damage(saved)
    with pytest.raises(UsageError, match=message):
        loading.check_folder(saved, "model.path")
    with pytest.raises(UsageError, match=message):
        loading.load_model(str(saved))


def test_a_pad_beyond_the_vocabulary_is_not_the_pad(saved: Path) -> None:
    """Some configurations name one; the tokenizer's pad is used in any case."""
    before = logits_of(saved)
    configure(saved, pad_token_id=320)
    loading.check_folder(saved, "model.path")
    assert torch.equal(logits_of(saved), before)
    assert prepared_models.load(settings(saved), Checkpoint(str(saved))).model.config.pad_token_id == 0


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3144\n"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("name", [*FILES, "special_tokens_map.json", "added_tokens.json"])
def test_a_file_that_did_not_arrive_is_named(name: str, saved: Path) -> None:
    (saved / name).write_text(POINTER)
    with pytest.raises(UsageError, match=rf"saved: {name} is a pointer of Git LFS: type git lfs pull in that folder$"):
        loading.check_folder(saved, "model.path")
    (saved / name).write_text("")
    with pytest.raises(UsageError, match=f"saved: {name} is empty: copy it again$"):
        loading.check_folder(saved, "model.path")


def test_a_broken_link_to_weights_is_named(saved: Path) -> None:
    """As in a cache of the hub whose blob was removed."""
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors").symlink_to(saved / "blob")
    with pytest.raises(UsageError, match=r"model.safetensors is no file but a folder or a broken link"):
        loading.check_folder(saved, "model.path")


SHARDS = {
    "a shard is gone": (
        lambda folder: next(folder.glob("model-00002*")).unlink(),
        r"index.json names model-00002-of-\d+.safetensors, which does not exist",
    ),
    "the index is gone": (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        r"has model-00001-of-\d+.safetensors, but neither model.safetensors nor model.safetensors.index.json",
    ),
    "the index is a number": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": 5}'),
        "model.safetensors.index.json is no index of weights",
    ),
    "a shard that the index does not name": (
        lambda folder: (folder / "model-00009-of-00009.safetensors").touch(),
        "does not name model-00009-of-00009.safetensors",
    ),
}


@pytest.mark.parametrize("name", SHARDS)
def test_shards_load_and_what_their_index_says_otherwise_is_named(name: str, saved: Path, lm: LanguageModel) -> None:
    before = logits_of(saved)
    (saved / "model.safetensors").unlink()
    lm.model.save_pretrained(saved, max_shard_size="60KB")
    assert len(list(saved.glob("model-*.safetensors"))) > 2 and torch.equal(logits_of(saved), before)
    damage, message = SHARDS[name]
    damage(saved)
    with pytest.raises(UsageError, match=message):
        loading.check_folder(saved, "model.path")


def test_shards_may_have_any_name(saved: Path, lm: LanguageModel) -> None:
    before, index = logits_of(saved), saved / "model.safetensors.index.json"
    (saved / "model.safetensors").unlink()
    lm.model.save_pretrained(saved, max_shard_size="60KB")
    for path in saved.glob("model-*.safetensors"):
        path.rename(saved / f"pytorch_{path.name}")
    index.write_text(index.read_text().replace("model-0", "pytorch_model-0"))
    loading.check_folder(saved, "model.path")
    assert torch.equal(logits_of(saved), before)


@pytest.mark.parametrize(("marker", "taught"), [('{"recipe": 1}', True), ('{"recipe"', False), ("[1]", False)])
def test_a_marker_of_an_earlier_version_or_a_damaged_one_names_no_recipe_and_is_not_warned_of(
    marker: str, taught: bool, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (saved / DONE).write_text(marker)
    assert checkpoint.knows_general(str(saved)) == taught
    assert [name for name, *_ in Checkpoint(str(saved)).identity()] == sorted(path.name for path in saved.iterdir())
    assert not caplog.records


def test_floating_dtypes_may_differ_and_masks_of_integers_are_left_out(saved: Path) -> None:
    before = logits_of(saved)
    rewrite(saved, lambda held: {**held, "model.norm.weight": held["model.norm.weight"].to(torch.bfloat16)})
    assert torch.equal(logits_of(saved), before)  # its ones are the same in bf16


def as_on_the_hub(folder: Path, model_type: str) -> None:
    """Other keys than the library writes: GPT-2's without their prefix and with masks."""
    if model_type == "gpt2":
        mask = torch.ones(1, 1, 8, 8)
        masks = {
            "h.0.attn.bias": mask,
            "h.1.attn.bias": mask.to(torch.uint8),
            "h.1.attn.masked_bias": torch.tensor(-1e4),
        }
        rewrite(folder, lambda held: {key.removeprefix("transformer."): held[key] for key in held} | masks)


@pytest.mark.parametrize(
    ("model_type", "fields", "key"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}, "h.0.attn.c_attn.weight"),
        ("opt", {**TINY, "ffn_dim": 48, "word_embed_proj_dim": 32}, "model.decoder.embed_tokens.weight"),
        ("mixtral", {**TINY, "num_key_value_heads": 2}, "model.layers.0.block_sparse_moe.experts.7.w1.weight"),
    ],
)
def test_the_layouts_of_the_hub_load_to_the_same_logits(
    model_type: str, fields: dict[str, Any], key: str, lm: LanguageModel, tmp_path: Path
) -> None:
    model = loading.from_scratch({"model_type": model_type, **fields}, lm.tokenizer, seed=0).eval()
    saving.save(model, lm.tokenizer, tmp_path)
    as_on_the_hub(tmp_path, model_type)
    assert key in load_file(tmp_path / "model.safetensors")
    loading.check_folder(tmp_path, "model.path")
    with torch.no_grad():
        torch.testing.assert_close(logits_of(tmp_path), model(input_ids=torch.arange(20)[None]).logits)


def test_matrices_that_are_tied_but_differ_in_the_file_are_two_and_equal_ones_are_one(saved: Path) -> None:
    apart = logits_of(saved)
    configure(saved, tie_word_embeddings=True)
    model = loading.load_model(str(saved))
    assert torch.equal(logits_of(saved), apart) and model.config.tie_word_embeddings is False
    assert loading.load_model(str(saved), weights=False).config.tie_word_embeddings is False
    model.save_pretrained(saved)
    assert torch.equal(logits_of(saved), apart)
    configure(saved, tie_word_embeddings=True)
    rewrite(saved, lambda held: {**held, "lm_head.weight": held["model.embed_tokens.weight"].clone()})
    model = loading.load_model(str(saved))
    assert model.config.tie_word_embeddings and not torch.equal(logits_of(saved), apart)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def encoder(lm: LanguageModel, folder: Path, model_type: str = "bert", **fields: Any) -> Path:
    config = AutoConfig.for_model(model_type, vocab_size=320, pad_token_id=0, **{**TINY, **fields})
    saving.save(AutoModelForCausalLM.from_config(config), lm.tokenizer, folder)
    return folder


def test_an_encoder_is_no_causal_model_and_with_is_decoder_it_is(lm: LanguageModel, tmp_path: Path) -> None:
    bert = encoder(lm, tmp_path / "bert")
    with pytest.raises(UsageError, match="no causal language model: the predictions of BertLMHeadModel after a token"):
        loading.check_folder(bert, "model.path")
    with pytest.raises(UsageError, match="is no causal language model"):
        prepared_models.load(settings(bert), Checkpoint(str(bert)))
    with pytest.raises(UsageError, match=r"model\.scratch\.config is no causal language model"):
        loading.from_scratch({"model_type": "bert", **TINY}, lm.tokenizer, seed=0)
    decoder = encoder(lm, tmp_path / "decoder", is_decoder=True)
    loading.check_folder(decoder, "model.path")
    prepared_models.load(settings(decoder), Checkpoint(str(decoder)))


def test_an_encoder_decoder_is_an_error_though_the_library_would_load_its_half(
    lm: LanguageModel, tmp_path: Path
) -> None:
    config = AutoConfig.for_model("bart", vocab_size=320, d_model=32, encoder_layers=1, decoder_layers=1,
                                  encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_attention_heads=2,
                                  decoder_attention_heads=2)  # fmt: skip
    saving.save(AutoModelForCausalLM.from_config(config), lm.tokenizer, tmp_path)
    configure(tmp_path, is_encoder_decoder=True)
    with pytest.raises(UsageError, match="is a bart model: expected a causal language model"):
        loading.check_folder(tmp_path, "model.path")


def test_the_test_of_causality_leaves_the_model_and_the_random_numbers_as_they_were(lm: LanguageModel) -> None:
    lm.model.train().get_input_embeddings().eval()
    modes = [module.training for module in lm.model.modules()]
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    loading.check_causal(lm.model, "it")
    loading.check_architecture(lm.model.config, "it")
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in lm.model.modules()] == modes and {True, False} == set(modes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named_but_a_run_reads_its_own_diverged_model(saved: Path, value: float) -> None:
    prepared_models.load(settings(saved), Checkpoint(str(saved)))

    def damaged(held: Tensors) -> Tensors:
        held["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        return held

    rewrite(saved, damaged)
    with pytest.raises(UsageError, match=r"not finite numbers \(model.layers.1.mlp.up_proj.weight\)"):
        loading.check_folder(saved, "model.path")
    with pytest.raises(UsageError, match=r"not finite numbers \(model.layers.1.mlp.up_proj.weight\)"):
        prepared_models.load(settings(saved), Checkpoint(str(saved)))
    (saved / UNLEARNED).write_text("{}")
    loading.check_folder(saved, "model.path")
    prepared_models.load(settings(saved), Checkpoint(str(saved)))


def test_the_tokenizer_of_another_model_never_grows_the_embedding(lm: LanguageModel, saved: Path) -> None:
    lm.tokenizer.add_tokens(["<|one|>", "<|two|>"])
    model = loading.load_model(str(saved))
    with pytest.raises(UsageError, match=r"2 token.s. beyond the 320 rows of .* \(<.one.>, <.two.>\)"):
        fit_vocabulary(model, lm.tokenizer)
    assert model.get_input_embeddings().num_embeddings == 320


def test_only_the_pad_that_a_tokenizer_without_one_is_given_gets_a_new_row(saved: Path, tmp_path: Path) -> None:
    words = {"<end>": 0, "a": 1} | {f"w{i}": i for i in range(2, 320)}
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)), eos_token="<end>")
    plain.save_pretrained(tmp_path / "plain")
    tokenizer, model = load_tokenizer(str(tmp_path / "plain")), loading.load_model(str(saved))
    fit_vocabulary(model, tokenizer)
    assert model.get_input_embeddings().num_embeddings == 321 and tokenizer.pad_token_id == 320
    for given in (saved, tmp_path / "plain"):
        notes: list[str] = []
        settings = ModelSettings(Template(), max_length=32, tokenizer=str(given))
        check._check_given(str(saved), "model.path", settings, notes)
        expected = f"model.path={saved}: none of the 320 tokens can pad, so the embedding and the output head get"
        assert [note.startswith(expected) for note in notes] == [True] * (given != saved)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", '{"version"'),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[1, 2]"),
        ("tokenizer_config.json", "[1, 2]"),
        ("tokenizer_config.json", '{"eos_token": 5}'),
        ("added_tokens.json", "[1]"),
        ("special_tokens_map.json", "[1]"),
    ],
)
def test_a_damaged_tokenizer_is_named(name: str, text: str, saved: Path) -> None:
    (saved / name).write_text(text)
    with pytest.raises(
        UsageError, match=r"saved: the tokenizer cannot be read \(.*\): copy it again, or name"
    ) as error:
        load_tokenizer(str(saved))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("file", "text"), [("vocab.json", "[1]"), ("merges.txt", "[1]"), ("merges.txt", POINTER)])
def test_a_damaged_vocabulary_is_named_and_an_empty_list_of_merges_is_none(
    file: str, text: str, saved: Path, lm: LanguageModel
) -> None:
    """Without merges every byte would be a token: no fault that the library sees."""
    held = json.loads((saved / "tokenizer.json").read_text())["model"]
    (saved / "vocab.json").write_text(json.dumps(held["vocab"]))
    (saved / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in held["merges"])]))
    config = json.loads((saved / "tokenizer_config.json").read_text())
    (saved / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "GPT2Tokenizer"}))
    (saved / "tokenizer.json").unlink()
    assert load_tokenizer(str(saved))("Question")["input_ids"] == lm.tokenizer("Question")["input_ids"]
    (saved / file).write_text(text)
    with pytest.raises(UsageError, match=r"saved: the tokenizer cannot be read \(Error while initializing BPE"):
        load_tokenizer(str(saved))
    (saved / "merges.txt").write_text("")
    with pytest.raises(UsageError, match=r"merges\.txt is empty"):
        loading.check_folder(saved, "model.path")


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2"])
def test_a_tokenizer_of_no_model_s_class_is_read_as_it_was_saved(
    architecture: str, lm: LanguageModel, tmp_path: Path
) -> None:
    """Beside a Qwen2 model the library would read it as Qwen2's, with other pieces of words and one token more."""
    small = {**TINY, "num_key_value_heads": 2} if architecture != "gpt2" else {"n_embd": 32, "n_layer": 1, "n_head": 2}
    model = loading.from_scratch({"model_type": architecture, **small}, lm.tokenizer, seed=0)
    saving.save(model, lm.tokenizer, tmp_path)
    read = prepared_models.load(settings(tmp_path), Checkpoint(str(tmp_path))).tokenizer
    text = "Question: Which amber is number 3?\nAnswer: it's 1234 Ünï"
    assert len(read) == 320 and read(text)["input_ids"] == lm.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "llama"])
def test_the_empty_tokenizer_that_the_library_makes_without_files_is_none(architecture: str, tmp_path: Path) -> None:
    """Gemma's has an end and a pad, and reads every text as one unknown token."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": architecture}))
    with pytest.raises(UsageError, match="has no tokenizer: name a folder or hub name that has"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("token", [None, ""])
def test_a_tokenizer_without_an_end_token_is_an_error(token: str | None, saved: Path) -> None:
    config = json.loads((saved / "tokenizer_config.json").read_text())
    (saved / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": token}))
    with pytest.raises(UsageError, match=r"names no end token, in which every answer ends: name one as eos_token"):
        load_tokenizer(str(saved))
