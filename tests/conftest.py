"""What the tests share: the real data, which may be absent; a small model; the command line."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from soul_exp.data import Item, Template
from soul_exp.distributed import server
from soul_exp.models import loading
from soul_exp.models.language_model import LanguageModel, train_tokenizer

os.environ["TQDM_DISABLE"] = "1"
os.environ[server.PRELOAD] = ",".join([*server.MODULES, server.ZERO])
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, also by what is started
torch.set_num_threads(1)  # as each of the program's processes has: models are small, and on busy cores two are slower


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """`real_data("tofu_logs/x.json")` is that path in the real data folder; without it the test is skipped.

    The folder is SOUL_EXP_DATA (the one that contains tofu/, tofu_logs/, ...), else shared/data beside the checkout.
    """

    def path_of(name: str) -> Path:
        beside = Path(__file__).parents[2] / "shared" / "data"
        path = Path(os.environ.get("SOUL_EXP_DATA", beside)) / name
        if not path.exists():
            pytest.skip(
                f"real data folder not found: set SOUL_EXP_DATA to the folder that contains tofu/, tofu_logs/, ... "
                f"(looked for {path})"
            )
        return path

    return path_of


gc.disable()  # while everything is imported


def pytest_collection_finish(session: pytest.Session) -> None:
    """Every training collects garbage: what was imported is not looked through again."""
    gc.freeze()
    gc.enable()


# The files that take minutes, longest first: processes that take a file at a time end together.
LONG = "engines slurm kill mutations cli tune detox passes sequence suite interrupts run_folder".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


def give_to_another_user(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another user")
    os.chown(path, 4242, 4242)


@pytest.fixture(params=["of another user", "writable by all", "a link"])
def make_suspect(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path], None]:
    """Turns a file into one that another user could have written."""

    def make(path: Path) -> None:
        if request.param == "of another user":
            give_to_another_user(path)
        elif request.param == "writable by all":
            path.chmod(0o777)
        else:
            path.rename(tmp_path / "elsewhere")
            path.symlink_to(tmp_path / "elsewhere")

    return make


WORDS = (
    "amber birch cedar delta ember fjord grove hazel iris jade kelp larch maple north olive pearl quartz reed"
).split()


def items(count: int, start: int = 0) -> list[Item]:
    """Questions whose answers have 1 to 5 words, so that padding has something to do."""
    return [
        Item(
            f"Which {WORDS[(start + i) % 18]} is number {start + i}?",
            " ".join(WORDS[(i * 7 + j) % 18] for j in range(1 + i % 5)),
        )
        for i in range(count)
    ]


def small_model(**changed: Any) -> LanguageModel:
    """A language model of 20,000 weights with its own tokenizer, the same every time; its configuration `changed`."""
    texts = ["".join(Template().texts(item)) for item in items(40)]
    tokenizer = train_tokenizer(texts, 320, 128)
    config = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1,
        **changed,
    }  # fmt: skip
    model = loading.from_scratch(config, tokenizer, seed=0)
    return LanguageModel.of(model, tokenizer, Template(), 128)


@pytest.fixture
def lm() -> LanguageModel:
    return small_model()


# --- the command line, as a person types it -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to type commands in, with a cache that the module's jobs share."""
    return tmp_path_factory.mktemp("place")


def start(place: Path, *arguments: str, under: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """`python -m soul_exp` with these arguments, typed in `place`, in a process group of its own.

    `under` stands between the two: `-m torch.distributed.run`, for one.
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "SOUL_EXP_CACHE": str(place / "cache")}
    return subprocess.Popen(
        [sys.executable, *under, "-m", "soul_exp", *arguments],
        cwd=place, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def type_(place: Path, *arguments: str, under: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """What it printed and returned; a command that hangs is killed with its workers."""
    process = start(place, *arguments, under=under)
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)
