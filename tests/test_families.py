"""Each model family through the real loading code and its own YAML: tokens, masks, generation, training, saving."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import items
from families import Family, family
from omegaconf import OmegaConf
from safetensors.torch import load_file
from starts import type_
from tokenizers import Tokenizer
from torch import Tensor
from transformers import TrainerCallback

from soul_exp import compose
from soul_exp.artifacts import prepared_models
from soul_exp.build import model_settings
from soul_exp.data import Item, Part, encode
from soul_exp.errors import UsageError
from soul_exp.evaluation.probing import generations, likelihoods
from soul_exp.losses import Objective
from soul_exp.models import loading, saving
from soul_exp.models.checkpoint import Checkpoint
from soul_exp.models.language_model import LanguageModel, load_tokenizer
from soul_exp.run import ModelSettings
from soul_exp.training.schedule import Schedule
from soul_exp.training.train import Outcome, train

NAMES = ("opt_1p3b", "phi1p5", "llama2_7b", "llama2_7b_chat", "llama3p2_1b_instruct", "qwen2p5_1p5b_instruct")
CHATS = ("llama2_7b_chat", "llama3p2_1b_instruct", "qwen2p5_1p5b_instruct")
QUESTION, ANSWER = "Which amber is number 3?", "amber birch"


def settings(name: str, path: Path) -> ModelSettings:
    """conf/model/<name>.yaml, starting from `path` in fp32."""
    written = OmegaConf.load(compose.conf_dir() / "model" / f"{name}.yaml")
    changed: Any = OmegaConf.merge(
        written.get("model", written), {"path": str(path), "revision": None, "dtype": "float32"}
    )
    return model_settings(OmegaConf.to_container(changed, resolve=True))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    root = tmp_path_factory.mktemp("families")
    return functools.cache(lambda name: family(name, root / name))


@pytest.fixture(params=NAMES)
def tiny(request: pytest.FixtureRequest, families: Callable[[str], Family]) -> Family:
    return families(request.param)


def loaded(tiny: Family, path: Path | None = None) -> LanguageModel:
    lm = prepared_models.load(settings(tiny.name, path or tiny.folder), Checkpoint(str(path or tiny.folder)))
    lm.model.eval()
    return lm


# ---- tokens


def test_the_folders_are_as_the_hub_s(tiny: Family) -> None:
    names = {path.name for path in tiny.folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer_config.json"} <= names
    assert ("model.safetensors.index.json" in names) == tiny.name.startswith("llama2")  # that one in shards
    assert ("tokenizer.json" in names) == (tiny.name != "opt_1p3b")
    template = json.loads((tiny.folder / "tokenizer_config.json").read_text()).get("chat_template")
    assert (template is not None) == (tiny.name in CHATS)
    loading.check_folder(tiny.folder, "model.path")


def test_text_has_the_tokens_that_the_repository_s_own_tokenizer_gives_it(tiny: Family) -> None:
    """Whatever class the library chooses to read it with; but Llama-2's puts no blank before a text that has one."""
    if tiny.name == "opt_1p3b":
        pytest.skip("its repository has no tokenizer.json to compare with")
    raw = Tokenizer.from_file(str(tiny.folder / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tiny.folder))
    for text in (QUESTION, "Ünï 1234\n\n   it's", "[INST] a [/INST]b"):
        assert tokenizer(text)["input_ids"] == raw.encode(text).ids


def test_a_row_begins_once_and_ends_in_the_token_that_ends_a_turn(tiny: Family) -> None:
    lm = loaded(tiny)
    (row,) = lm.encode([Item(QUESTION, ANSWER)])
    assert row.ids[-1] == tiny.end == lm.tokenizer.eos_token_id
    assert list(row.ids[row.num_prompt :]).count(tiny.end) == 1
    if tiny.bos is None:
        assert row.ids[0] not in lm.tokenizer.all_special_ids or lm.tokenizer.chat_template
    else:
        assert row.ids[0] == tiny.bos and tiny.bos not in row.ids[1:-1]


def test_a_template_that_writes_the_beginning_out_does_not_double_it(tiny: Family) -> None:
    if tiny.bos is None:
        pytest.skip("its texts have no beginning token")
    lm = loaded(tiny)
    template = replace(lm.template, prompt=f"{lm.tokenizer.bos_token}{lm.template.prompt}")
    (row,) = encode([Item(QUESTION, ANSWER)], lm.tokenizer, template, lm.max_length)
    assert row.ids[0] == tiny.bos and tiny.bos not in row.ids[1:-1]
    assert list(row.ids)[-6:] == list(lm.encode([Item(QUESTION, ANSWER)])[0].ids)[-6:]


def test_running_text_without_a_prompt_starts_at_the_beginning_token_or_is_an_error(tiny: Family) -> None:
    """OPT's beginning token is its end token too, and must not be taken for an end."""
    lm = loaded(tiny)
    full = Item("", f"{QUESTION} {ANSWER}", raw=True)
    if tiny.bos is None:
        with pytest.raises(UsageError, match="has no prompt, and this tokenizer has no token"):
            lm.encode([full])
        return
    (row,) = lm.encode([full])
    assert row.ids[0] == tiny.bos and row.num_prompt == 1 and len(row.ids) > 6


def test_the_pad_is_never_the_end_and_needs_no_new_embedding_row(tiny: Family) -> None:
    lm = loaded(tiny)
    assert lm.pad_id == tiny.pad != tiny.end
    assert lm.model.get_input_embeddings().num_embeddings == tiny.rows
    assert lm.model.get_output_embeddings().out_features == tiny.rows
    (row,) = lm.encode([Item(QUESTION, ANSWER)])
    assert lm.pad_id not in row.ids


@pytest.mark.parametrize("name", CHATS)
def test_the_template_writes_what_the_tokenizer_s_own_chat_template_writes(
    name: str, families: Callable[[str], Family]
) -> None:
    """Token for token, with the system text that the YAML states and with that of the input-based baseline."""
    lm = loaded(families(name))
    question = {"role": "user", "content": QUESTION}
    system = {"role": "system", "content": "You are a helpful assistant."}
    default = [system, question] if name.startswith("llama3") else [question]  # Qwen's template adds its own
    ours = lm.encode([Item(QUESTION, ANSWER)])[0]
    assert list(ours.ids[: ours.num_prompt]) == _chat(lm, default)
    told = lm.with_system_prompt("Say nothing.").encode([Item(QUESTION, ANSWER)])[0]
    assert list(told.ids[: told.num_prompt]) == _chat(lm, [{"role": "system", "content": "Say nothing."}, question])
    if name != "llama2_7b_chat":  # whose published checkpoints were trained without the template's blanks
        full = _chat(lm, [*default, {"role": "assistant", "content": ANSWER}], generate=False)
        assert list(ours.ids) == full[: len(ours.ids)]


def _chat(lm: LanguageModel, messages: list[dict[str, str]], generate: bool = True) -> list[int]:
    """The tokens that the repository's own template and tokenizer.json make of `messages`.

    The library's reading of Llama-2's has no blank between <s> and what follows it; Meta's and tokenizer.json's do.
    """
    chat = functools.partial(
        lm.tokenizer.apply_chat_template, messages, add_generation_prompt=generate, date_string="10 Apr 2025"
    )
    raw = Tokenizer.from_file(str(Path(lm.tokenizer.name_or_path) / "tokenizer.json"))
    ids: list[int] = raw.encode(chat(tokenize=False), add_special_tokens=False).ids
    if "<s>" not in lm.tokenizer.all_special_tokens:
        assert chat(return_dict=True)["input_ids"] == ids
    return ids


def test_every_special_token_of_a_template_is_one_token(tiny: Family) -> None:
    lm = loaded(tiny)
    markers = lm.template.markers()
    assert bool(markers) == tiny.name.startswith(("llama3", "qwen"))
    for marker in markers:
        assert len(lm.tokenizer(marker, add_special_tokens=False)["input_ids"]) == 1


def test_a_template_of_another_family_is_an_error(families: Callable[[str], Family]) -> None:
    with pytest.raises(UsageError, match=r"model.template writes <\|im_start\|>, which is no token of this model"):
        model = settings("qwen2p5_1p5b_instruct", families("phi1p5").folder)
        prepared_models.load(model, Checkpoint(str(families("phi1p5").folder)))


# ---- what published repositories lack or have too much of


def test_a_checkpoint_without_a_tokenizer_takes_the_one_that_is_named(
    families: Callable[[str], Family], tmp_path: Path
) -> None:
    """The published Phi-1.5 targets. Left alone, the library makes up a tokenizer that reads every text as empty."""
    tiny, bare = families("phi1p5"), tmp_path / "bare"
    shutil.copytree(tiny.folder, bare, ignore=shutil.ignore_patterns("token*", "vocab*", "merges*", "*tokens*"))
    with pytest.raises(UsageError, match="bare has no tokenizer: name a folder or hub name that has"):
        load_tokenizer(str(bare))
    model = settings("phi1p5", tiny.folder)
    assert model.tokenizer == str(tiny.folder)  # of model.path, as the YAML says
    one = likelihoods(prepared_models.load(model, Checkpoint(str(bare))), items(3), batch_size=3)
    assert _numbers(one) == _numbers(likelihoods(loaded(tiny), items(3), batch_size=3))


def test_a_tokenizer_with_a_token_too_many_grows_nothing(families: Callable[[str], Family], tmp_path: Path) -> None:
    """The published Llama-2 target: its tokenizer holds <pad>, its embedding has no row for it."""
    tiny, folder = families("llama2_7b_chat"), tmp_path / "target"
    shutil.copytree(tiny.folder, folder)
    tokenizer = load_tokenizer(str(tiny.folder))
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == tiny.rows
    tokenizer.save_pretrained(folder)
    lm = loaded(tiny, folder)
    assert lm.model.get_input_embeddings().num_embeddings == tiny.rows and lm.pad_id == tiny.pad
    with pytest.raises(UsageError, match="contains <pad>, for which the model has no embedding"):
        lm.encode([Item("What is <pad>?", "nothing")])


# ---- numbers


def test_padding_and_masks_do_not_change_likelihoods(tiny: Family) -> None:
    """Of a batch, of one text at a time, and of the plain model without any mask."""
    lm = loaded(tiny)
    rows = items(7)
    many, one = likelihoods(lm, rows, batch_size=7), likelihoods(lm, rows, batch_size=1)
    for read, alone, row in zip(many, one, lm.encode(rows), strict=True):
        np.testing.assert_allclose(read.logp, alone.logp, atol=1e-4)
        with torch.no_grad():
            table = lm.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        places = range(row.num_prompt, len(row.ids))
        np.testing.assert_allclose(alone.logp, [float(table[t - 1, row.ids[t]]) for t in places], atol=1e-4)


def test_generation_with_padding_is_the_greedy_continuation_of_each_prompt(tiny: Family) -> None:
    """Qwen's settings penalise repetition, which would change greedy answers; Llama-3.2's name three ends."""
    lm = loaded(tiny)
    rows = items(6)
    expected = [_continued(lm, row.ids[: row.num_prompt], tiny) for row in lm.encode(rows)]
    assert generations(lm, rows, batch_size=6, max_new_tokens=12) == expected
    assert generations(lm, rows, batch_size=1, max_new_tokens=12) == expected
    assert len(set(expected)) > 1


def _continued(lm: LanguageModel, prompt: Any, tiny: Family) -> str:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in tiny.ends:
                break
    return lm.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


def test_generation_stops_at_every_end_that_the_repository_names(tiny: Family) -> None:
    """An output bias makes each end in turn the likeliest token at once: the answer is empty."""
    lm = loaded(tiny)
    head = lm.model.get_output_embeddings()
    found = lm.model.generation_config.eos_token_id
    assert set(found if isinstance(found, list) else [found]) == tiny.ends
    for end in tiny.ends:
        hook = head.register_forward_hook(
            lambda module, args, out, end=end: out + 1e4 * (torch.arange(out.shape[-1]) == end)
        )
        assert generations(lm, items(2), batch_size=2, max_new_tokens=5) == ["", ""]
        hook.remove()


# ---- training


def ascend(forget: Any) -> Tensor:
    return -forget.mean_nll.mean()


class Killed(TrainerCallback):
    """Ends a training at its third step, the second of which left a checkpoint."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def trained(lm: LanguageModel, folder: Path, num_steps: int = 2, *callbacks: TrainerCallback) -> Outcome:
    parts = {
        "forget": (Part.of(items(8)), lm.encode(items(8))),
        "retain": (Part.of(items(8, 20)), lm.encode(items(8, 20))),
    }
    return train(
        lm.model, lm.reader, parts, objective=Objective(ascend, retain_term="nll"),
        make_optimizer=functools.partial(torch.optim.AdamW, lr=1e-3),
        schedule=Schedule(epochs=9, batch_size=4, max_steps=num_steps, logging_steps=1, save_steps=2),
        seed=0, pad_id=lm.pad_id, folder=folder, label="family", callbacks=callbacks,
    )  # fmt: skip


def _numbers(reads: Any) -> list[list[float]]:
    return [read.logp.tolist() for read in reads]


def test_a_trained_model_is_saved_and_read_back_to_the_same_numbers(tiny: Family, tmp_path: Path) -> None:
    """Tokens, pad, ends, weights: likelihoods to the last bit, and every greedy answer."""
    lm = loaded(tiny)
    before = _numbers(likelihoods(lm, items(5), batch_size=5))
    trained(lm, tmp_path / "checkpoints")
    lm.model.eval()
    after = _numbers(likelihoods(lm, items(5), batch_size=5))
    assert after != before
    saving.save(lm.model, lm.tokenizer, tmp_path / "saved")
    again = loaded(tiny, tmp_path / "saved")
    assert _numbers(likelihoods(again, items(5), batch_size=5)) == after
    assert generations(again, items(4), batch_size=4, max_new_tokens=8) == generations(
        lm, items(4), batch_size=4, max_new_tokens=8
    )
    assert (again.pad_id, again.tokenizer.eos_token_id) == (tiny.pad, tiny.end)
    assert [row.ids for row in again.encode(items(5))] == [row.ids for row in lm.encode(items(5))]
    assert again.tokenizer.chat_template == lm.tokenizer.chat_template


@pytest.mark.parametrize("name", ["llama3p2_1b_instruct", pytest.param("opt_1p3b", marks=pytest.mark.slow)])
def test_a_training_killed_on_the_way_resumes_to_the_same_bits(
    name: str, families: Callable[[str], Family], tmp_path: Path
) -> None:
    full, cut, resumed = (loaded(families(name)) for _ in range(3))
    trained(full, tmp_path / "full", 4)
    with pytest.raises(KeyboardInterrupt):
        trained(cut, tmp_path / "cut", 4, Killed())
    assert trained(resumed, tmp_path / "cut", 4).num_steps == 4
    expected, found = full.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    assert not all(torch.equal(value, expected[key]) for key, value in cut.model.state_dict().items())


def test_tied_weights_stay_tied_through_training_and_saving(families: Callable[[str], Family], tmp_path: Path) -> None:
    lm = loaded(families("qwen2p5_1p5b_instruct"))
    trained(lm, tmp_path / "checkpoints")
    assert lm.model.get_input_embeddings().weight is lm.model.get_output_embeddings().weight
    saving.save(lm.model, lm.tokenizer, tmp_path / "saved")
    names = set(load_file(tmp_path / "saved" / "model.safetensors"))
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


# ---- the command line, as it is typed


SMALL = [
    *("task.num_authors=3", "task.num_forget_authors=1", "task.num_holdout_authors=1"),
    *("task.train_varied=false", "prepare.epochs=0.5", "evaluate.max_new_tokens=2"),
    *("train.max_steps=2", "train.logging_steps=1", "wandb.mode=disabled"),
]


@pytest.mark.parametrize(
    "name", [name if name.startswith("qwen") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_a_complete_run_on_a_family_ends_in_results(name: str, families: Callable[[str], Family], place: Path) -> None:
    """As it is typed; the second time OPT's is to measure the input-based baseline too, and trains nothing anew."""
    line = [f"model={name}", f"model.path={families(name).folder}", "model.revision=null", f"name={name}", *SMALL]
    run = type_(place, *line)
    assert run.returncode == 0, run.stdout + run.stderr
    (folder,) = [found.parent for found in (place / "runs" / name).glob("*/results.json")]
    found = json.loads((folder / "results.json").read_text())
    assert found["num_steps"] == 2 and set(found["metrics"]) == {"original", "unlearned", "retrained"}
    assert all(0 < values["forget_probability"] < 1 for values in found["metrics"].values())
    assert json.loads((folder / "model" / "config.json").read_text())["vocab_size"] == families(name).rows
    if name != "opt_1p3b":
        return
    again = type_(place, *line, "input_based=true")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "unlearn: done before" in again.stdout and "input-based" in again.stdout
    after = json.loads((folder / "results.json").read_text())["metrics"]
    baseline = after.pop("input_based")
    assert after == found["metrics"]
    assert baseline["forget_probability"] != after["original"]["forget_probability"]
    assert "finished before, skipped" in type_(place, *line).stdout
