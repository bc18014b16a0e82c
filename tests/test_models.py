"""Models: logits at answer positions, tokenizers, what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import items
from transformers import PreTrainedModel

from soul_exp import models
from soul_exp.adapters import Lora
from soul_exp.data import pad
from soul_exp.errors import UsageError
from soul_exp.layers import AnswerReader, layer_of
from soul_exp.models import LanguageModel


def test_logits_at_answer_positions_are_those_of_the_whole_sequence(lm: LanguageModel) -> None:
    rows = lm.encode(items(5))
    batch = pad(rows, lm.pad_id)
    lm.model.eval()
    with torch.no_grad():
        picked = lm.reader(lm.model, batch)
        whole = lm.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert picked.shape == (5, batch["labels"].shape[1], len(lm.tokenizer))
    for i, row in enumerate(rows):
        for j, position in enumerate(range(row.num_prompt - 1, len(row.ids) - 1)):
            torch.testing.assert_close(picked[i, j], whole[i, position])


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
    models.save(lm.model, lm.tokenizer, tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    tokenizer = models.load_tokenizer(str(tmp_path))
    again = LanguageModel.of(
        models.load_model(str(tmp_path)), tokenizer, {"prompt": "{question}:", "answer": " {answer}"}, 64
    )
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
    """The library's own save_pretrained refuses all of them but the last; only the pad and the end tokens are ours."""
    models.save(lm.model, lm.tokenizer, tmp_path / "given")
    (tmp_path / "given" / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, **settings}))
    models.check_folder(tmp_path / "given", "model.path")
    template = {"prompt": "{question}:", "answer": " {answer}"}
    given = LanguageModel.of(models.load_model(str(tmp_path / "given")), lm.tokenizer, template, 64)
    models.check_saving(given.model, given.tokenizer)
    for save in (models.save, lambda model, _, folder: models.save_weights(model, folder, first=True)):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        save(given.model, given.tokenizer, folder)
        saved = json.loads((folder / "generation_config.json").read_text())
        saved.pop("transformers_version")
        ends = [lm.tokenizer.eos_token_id, 5]
        assert saved == {**settings, "eos_token_id": ends, "pad_token_id": lm.tokenizer.pad_token_id}
        assert (
            models.load_model(str(folder)).generation_config.to_diff_dict()
            == given.model.generation_config.to_diff_dict()
        )


@pytest.mark.parametrize("text", ['{"early_stopping": "x"}', '{"num_return_sequences": 3}', "no json"])
def test_generation_settings_that_the_library_cannot_read_are_refused(
    text: str, lm: LanguageModel, tmp_path: Path
) -> None:
    models.save(lm.model, lm.tokenizer, tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UsageError, match=r"generation_config.json is not valid \(.*\): correct or remove it"):
        models.check_folder(tmp_path, "model.path")


def test_settings_that_could_not_be_saved_are_known_before_training(lm: LanguageModel) -> None:
    model: Any = lm.model
    model.config.something = {1, 2}  # no JSON
    with pytest.raises(UsageError, match=r"LlamaForCausalLM could not be saved after training \(.*set.*\): correct"):
        models.check_saving(model, lm.tokenizer)


MIXTURE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
           "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize("architecture", ["mixtral", "olmoe", "gpt_neox", "apertus", "cohere"])
def test_the_weights_of_a_checkpoint_are_read_back_whatever_the_library_renames(
    architecture: str, lm: LanguageModel, tmp_path: Path
) -> None:
    """Fused experts, a renamed head, numbers that are no parameters, tied embeddings; and other programs' names."""
    model = models.from_scratch({"model_type": architecture, **MIXTURE}, lm.tokenizer, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    models.save_weights(model, tmp_path / "checkpoint", first=True)
    models.save(model, lm.tokenizer, tmp_path / "exported")
    for value in model.state_dict().values():
        value.zero_()
    models.read_weights(model, tmp_path / "checkpoint")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for folder in ("checkpoint", "exported"):
        again = models.load_model(str(tmp_path / folder)).state_dict()
        assert all(torch.equal(value, before[name]) for name, value in again.items())


def test_a_tokenizer_whose_pad_is_its_end_gets_another_pad(lm: LanguageModel, tmp_path: Path) -> None:
    lm.tokenizer.pad_token = lm.tokenizer.eos_token
    models.save(lm.model, lm.tokenizer, tmp_path)
    tokenizer = models.load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no config.json"):
        models.check_folder(tmp_path, "model.path")


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"only pickled weights \(pytorch_model.bin\)"):
        models.check_folder(tmp_path, "model.path")


def hidden_states(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """What transformers itself calls the hidden states, at answer positions: the embeddings', then each layer's."""
    whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    return [
        torch.stack([line[where] for line, where in zip(states, batch["positions"], strict=True)])
        for states in whole.hidden_states
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
    model = models.from_scratch({"model_type": architecture, **small}, lm.tokenizer, seed=0).eval()
    reader = AnswerReader(model)
    batch = pad(lm.encode(items(4)), lm.pad_id)
    with torch.no_grad():
        expected = hidden_states(model, batch)
        hooks = [len(layer._forward_hooks) for layer in reader.layers]  # the library's own
        for layer in (0, 1):  # the last one's is told after the final norm
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
    with pytest.raises(UsageError, match=r"loss.layer=2: the model has 2 layers, counted from 0: name one of them"):
        layer_of(layers[:2], 2)
    with pytest.raises(UsageError, match=r"the model tells none: choose another loss"):
        layer_of([], None)


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
    model = models.from_scratch({"model_type": architecture, **small}, lm.tokenizer, seed=0).eval()
    reader = AnswerReader(model)
    batch = pad(lm.encode(items(4)), lm.pad_id)
    with torch.no_grad():
        picked = reader(model, batch)
        whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.stack([line[where] for line, where in zip(whole, batch["positions"], strict=True)])
    torch.testing.assert_close(picked, expected)
