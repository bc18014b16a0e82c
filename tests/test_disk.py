"""What a run and a sweep will write is known before they start, and compared with what is free."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from composing import composed
from conftest import type_
from omegaconf import OmegaConf

from soul_exp import forecast, sequence
from soul_exp.build import build
from soul_exp.checks import disk
from soul_exp.checks.disk import Need
from soul_exp.checks.optimizer import Counted
from soul_exp.errors import UsageError

MIB = 2**20
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`free(n)`: every file system has n bytes left."""
    return lambda size: monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10 * size, 9 * size, size))


def need(prepared: dict[Path, int] | None = None) -> Need:
    return Need(model=10 * MIB, checkpoints=60 * MIB, prepared=prepared or {})


def test_a_run_needs_its_model_its_checkpoints_and_the_prepared_models(
    free: Callable[[int], None], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    needed = need({cache / "target": 10 * MIB, cache / "retrained": 10 * MIB})
    free(90 * MIB)  # the cache is on the same file system
    disk.check_run(needed, tmp_path / "run", cache)
    said = disk.run_sentence(needed, tmp_path / "run", cache)
    assert "about 70 MiB in" in said and "20 MiB of prepared models" in said and said.endswith("90 MiB are free")
    free(90 * MIB - 1)
    with pytest.raises(UsageError, match=r"this run will need about 90 MiB in .*/run and .*/cache, 90 MiB are free"):
        disk.check_run(needed, tmp_path / "run", cache)


def test_what_a_run_has_written_before_is_not_needed_again(free: Callable[[int], None], tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "old").write_bytes(bytes(MIB))
    free(69 * MIB)
    disk.check_run(need(), tmp_path, tmp_path)


@pytest.mark.parametrize(("at_once", "total"), [(1, "330 MiB"), (27, "1.8 GiB")])
def test_a_sweep_keeps_every_model_but_the_checkpoints_of_running_jobs_only(
    at_once: int, total: str, free: Callable[[int], None], tmp_path: Path
) -> None:
    free(52 * 2**30)
    said = disk.check_sweep([need()] * 27, tmp_path / "x", tmp_path, at_once)
    assert said.startswith(f"27 jobs will need about {total} in {tmp_path}/x (27 models, 270 MiB;")
    assert said.endswith("52 GiB are free")
    free(329 * MIB)
    with pytest.raises(UsageError, match=f"27 jobs will need about {total} in .*, 329 MiB are free: .*save=none"):
        disk.check_sweep([need()] * 27, tmp_path / "x", tmp_path, at_once)


def test_jobs_share_prepared_models_and_the_unknown_is_called_so(free: Callable[[int], None], tmp_path: Path) -> None:
    free(2**30)
    shared = need({tmp_path / "target": 5 * MIB})
    said = disk.check_sweep([shared] * 3 + [None] * 3, tmp_path, tmp_path, 1)
    assert (
        "90 MiB in" in said and "5.0 MiB in" in said and "(1 prepared model)" in said and "of 3 more it is un" in said
    )
    assert "unknown before a model is read" in disk.check_sweep([None] * 3, tmp_path, tmp_path, 1)
    assert "is unknown before the model is read" in disk.run_sentence(None, tmp_path, tmp_path)


def test_the_need_follows_weights_precision_engine_and_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "num_weights", lambda _: Counted(1000, 1000))
    monkeypatch.setattr(disk.prepared_models, "recipes", lambda _: {"target": 1, "retrained": 2})

    def needed(*overrides: str) -> disk.Need:
        found = disk.need(build(composed(tmp_path, *overrides)))
        assert found is not None
        return found

    found = needed()
    assert (found.model, found.checkpoints, sorted(found.prepared.values())) == (4000, 2 * 12000, [4000, 4000])
    lean = needed("precision=bf16")
    assert (lean.model, lean.checkpoints) == (2000, 2 * 10000)
    assert needed("compute=zero2").checkpoints == 2 * 16000  # fp32 weights of its own
    none = needed("save=none", "train.save_steps=null", "stages=[unlearn]")
    assert (none.model, none.checkpoints, none.prepared) == (0, 0, {})
    assert needed("save=best").checkpoints == 2 * 12000 + 2 * 4000
    monkeypatch.setattr(disk, "num_weights", lambda _: Counted(1010, 10))
    adapter = needed("adapter=lora")
    assert (adapter.model, adapter.checkpoints) == (40, 2 * 120)
    assert needed("adapter=lora", "adapter.merge=true").model == 4040


def test_only_what_has_finished_of_this_sweep_needs_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of other sweeps in the folder do not count, nor does one whose folder does not say what it is."""
    for name, typed in {"a": ["seed=0", "x=${y}"], "b": ["seed=7", "x=${y}"], "c": None}.items():
        (tmp_path / name / ".hydra").mkdir(parents=True)
        (tmp_path / name / "results.json").touch()
        if typed:
            (tmp_path / name / ".hydra" / "overrides.yaml").write_text("".join(f"- {each}\n" for each in typed))
    given = {"sweep": {"dir": str(tmp_path)}, "launcher": {"_target_": "hydra._internal.BasicLauncher"}}
    config = OmegaConf.create({"hydra": given, "overwrite": False, "cache": str(tmp_path)})
    monkeypatch.setattr(forecast, "composed", lambda *_: {})
    monkeypatch.setattr(sequence, "need", lambda _: disk.Need(1, 0, {}))

    def num_jobs(*jobs: tuple[str, ...]) -> str:
        monkeypatch.setattr(forecast, "combinations", lambda _: list(jobs))
        return forecast.forecast(config).partition(" will")[0]

    first, second, third = ("x=${y}", "seed=0"), ("x=${y}", "seed=1"), ("x=${y}", "seed=2")
    assert num_jobs(first, second, third) == "2 jobs"
    assert num_jobs(second, third) == "2 jobs"
    assert num_jobs(first) == "1 job"  # nothing is left: still a line
    config.overwrite = True
    assert num_jobs(first, second, third) == "3 jobs"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder whose runs/ is a file system of 30 MiB."""
    (tmp_path / "runs").mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(tmp_path / "runs")], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a small file system needs root")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path / "runs")], check=True)


def test_a_sweep_that_will_not_fit_is_an_error_before_its_first_job(small_disk: Path) -> None:
    line = ["task.num_authors=8", "wandb.mode=disabled", "seed=0,1,2,3,4,5,6", "name=big", "-m"]
    refused = type_(small_disk, *line)
    assert refused.returncode == 1 and "--- job" not in refused.stdout and "Traceback" not in refused.stderr
    assert refused.stderr.startswith("soul_exp: 7 jobs will need about 34 MiB in runs/big, 30 MiB are free: free some")
