"""Sweeps through SLURM: on a private cluster of this machine, and what can be seen of them without one."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from submitit.slurm.slurm import SlurmInfoWatcher

from soul_exp import sweep as sweeps
from soul_exp.errors import UsageError, WorkerError

ROOT = Path(__file__).parents[1]
LAUNCHERS = ROOT / "launchers"
TINY = (
    "task.num_authors=8", "task.train_varied=false", "prepare.epochs=1", "evaluate.max_new_tokens=8", "save=none",
    "wandb.mode=disabled", "hydra.launcher.mem_gb=1",
)  # fmt: skip

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire: a requeued job waits so long
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=5
MinJobAge=3600
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1800 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of commands on a SLURM of one node, this machine; its prepared models are kept between tests."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if _found(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install --no-install-recommends slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("a private SLURM needs root")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(64))
    (folder / "munge.key").chmod(0o600)
    settings = {"host": socket.gethostname().split(".")[0], "folder": folder, "cpus": min(2, os.cpu_count() or 1)}
    (folder / "slurm.conf").write_text(CONF.format(ports=_free_ports(2), **settings))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SUBMITIT_"))}
    env |= {"SLURM_CONF": str(folder / "slurm.conf"), "SOUL_EXP_CACHE": str(folder / "cache")}
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = [f"--{option}={folder}/munge.{file}" for option, file in files.items()]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for name, options in (
            ("munged", ["--foreground", "--force", *munge]),
            ("slurmctld", ["-D"]),
            ("slurmd", ["-D"]),
        ):
            with (folder / f"{name}.out").open("wb") as log:
                daemons.append(subprocess.Popen([str(_found(name)), *options], env=env, stdout=log, stderr=log))
            if name == "munged":
                _wait_for((folder / "munge.socket").exists, "munged")
        _wait_for(lambda: _said(env, "sinfo", "--noheader", "--format=%T") == "idle", f"SLURM, see {folder}/*.out")
        yield env
    finally:
        if len(daemons) == 3:
            subprocess.run(["scancel", "--user=root"], env=env, capture_output=True, timeout=20)
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and _said(env, "squeue", "--noheader"):
                time.sleep(0.2)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _found(daemon: str) -> str | None:
    return shutil.which(daemon, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _said(env: Mapping[str, str], *command: str) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=20)
    return done.stdout.strip()


def _wait_for(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)


def submit(cwd: Path, env: Mapping[str, str], *overrides: str) -> subprocess.Popen[str]:
    command = [str(LAUNCHERS / "slurm.sh"), *TINY, *overrides]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_sweep_leaves_results_and_names_what_failed(cluster: dict[str, str], tmp_path: Path) -> None:
    sweep = submit(tmp_path, cluster, "name=sweep", "train.max_steps=2", "train.batch_size=8,4,0")
    printed, _ = sweep.communicate(timeout=240)
    assert sweep.returncode == 1, printed
    folders = {}
    for job in (tmp_path / "runs/sweep").glob("*train.batch_size-*"):
        folders[job.name.split("train.batch_size-")[1].split("+")[0]] = job
    for size in ("8", "4"):
        assert json.loads((folders[size] / "results.json").read_text())["num_steps"] == 2, printed
    assert not (folders["0"] / "results.json").exists()
    reason = (folders["0"] / "error.txt").read_text()
    assert reason.startswith("train.batch_size=0: expected a whole number")
    assert f"soul_exp: failed: {folders['0'].name}: {reason}" in printed
    assert re.search(r"\n3 jobs in \S+ (s|min): 1 failed\ntable: python -m soul_exp.tables runs/sweep\n$", printed), (
        printed
    )
    logged = (folders["8"] / "soul_exp.log").read_text()
    assert logged.startswith("--- job 1: ") and logged.count("\nunlearn: 2 steps") == 1 and "\nresults: " in logged


@pytest.mark.slow
@pytest.mark.parametrize(
    "interrupt", [["scontrol", "requeue"], ["scancel", "--signal=USR2"]], ids=["requeue", "time-out"]
)
def test_an_interrupted_job_resumes(cluster: dict[str, str], tmp_path: Path, interrupt: list[str]) -> None:
    sweep = submit(tmp_path, cluster, "name=again", "train.epochs=50", "train.max_steps=150", "train.save_steps=20")
    folder = tmp_path / "runs/again"
    _wait_for(lambda: bool(list(folder.glob("*/checkpoints/*/checkpoint-*/trainer_state.json"))), "a checkpoint", 120)
    subprocess.run([*interrupt, _said(cluster, "squeue", "--noheader", "--format=%A")], env=cluster, check=True)
    printed, _ = sweep.communicate(timeout=180)
    assert sweep.returncode == 0, printed
    log = "".join(path.read_text() for path in folder.glob(".slurm/*/*_log.out"))
    assert log.count("Starting with JobEnvironment") == 2 and "unlearn: resuming from checkpoint-" in log
    assert json.loads(next(folder.glob("*/results.json")).read_text())["num_steps"] == 150


@pytest.mark.slow
def test_a_killed_job_ends_the_waiting(cluster: dict[str, str], tmp_path: Path) -> None:
    sweep = submit(tmp_path, cluster, "name=killed", "train.epochs=50", "train.max_steps=5000")
    _wait_for(lambda: bool(list((tmp_path / "runs/killed").glob("*/train.jsonl"))), "training", 120)
    subprocess.run(["scancel", _said(cluster, "squeue", "--noheader", "--format=%A")], env=cluster, check=True)
    printed, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 1 and "soul_exp: failed: SLURM: Job" in printed and "CANCELLED" in printed, printed


@pytest.mark.slow
def test_the_tasks_of_a_step_are_joined(cluster: dict[str, str], tmp_path: Path) -> None:
    """`srun --ntasks=2`: rank 0 leads, and both are heard."""
    line = ["compute=zero2", "train.max_steps=2", "name=step", *(each for each in TINY if "hydra" not in each)]
    command = ["srun", "--ntasks=2", "--cpus-per-task=1", "--mem=1500", sys.executable, "-m", "soul_exp", *line]
    env = cluster | {"PYTHONPATH": str(ROOT)}
    step = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert step.returncode == 0, step.stdout + step.stderr
    folder = next((tmp_path / "runs/step").glob("*/results.json")).parent
    assert json.loads((folder / "results.json").read_text())["config"]["compute"]["processes"] == 2
    assert step.stdout.count("results: ") == 1
    for rank in (0, 1):
        assert "unlearn: 2 steps" in (folder / f"ranks/unlearn/rank{rank}.log").read_text()
    failed = subprocess.run(
        [*command, "compute.processes=3"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100
    )
    assert failed.returncode != 0 and failed.stderr.count("compute.processes=3, but srun has started 2") == 1


@pytest.mark.parametrize("error", [UsageError("a"), WorkerError("b\nc"), sweeps.JobError("d")])
def test_errors_reach_the_submitting_process(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "FAILED", [])
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error) and str(arrived) == str(error)
    assert [str(error)] * isinstance(error, sweeps.JobError) == sweeps.FAILED


def test_a_signalled_launch_returns_nothing() -> None:
    script = """
import os, signal
from soul_exp.distributed import processes
processes.SIGNAL_SECONDS = 0
signal.signal(signal.SIGTERM, lambda *_: print("bypassed", flush=True))
try:
    with processes.waiting_for_slurm():
        raise ValueError("no signal, so an error is one")
except ValueError as error:
    print(error, flush=True)
with processes.waiting_for_slurm():
    os.kill(os.getpid(), signal.SIGTERM)
    raise ValueError("SLURM killed the workers")
"""
    env = os.environ | {"SUBMITIT_EXECUTOR": "slurm", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline().strip() for _ in range(2)] == ["no signal, so an error is one", "bypassed"]
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)
        process.kill()
        assert process.wait() == -signal.SIGKILL


SCONTROL = """#!/bin/sh
case $* in
*7) echo "JobId=7 ArrayJobId=7 ArrayTaskId=3,5-6%4 JobName=x JobState=PENDING Reason=None NodeList="
    echo "JobId=9 ArrayJobId=7 ArrayTaskId=1 JobName=x JobState=COMPLETING Reason=None NodeList=n1"
    echo "JobId=8 ArrayJobId=7 ArrayTaskId=0 JobName=x JobState=OUT_OF_MEMORY Reason=None NodeList=n2";;
*10) echo "JobId=10 JobName=x JobState=RUNNING Reason=None NodeList=n1";;
*11) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1;;
*) echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1;;
esac
"""


def test_sacct_prints_the_fields_that_submitit_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(LAUNCHERS), prepend=":")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    watcher = SlurmInfoWatcher()
    known = {"7_0": "OUT_OF_MEMORY", "7_1": "RUNNING", "7_3": "PENDING", "7_5": "PENDING", "7_6": "PENDING"}
    known |= {
        "10": "RUNNING",
        "7_2": "COMPLETED",
        "11": "COMPLETED",
        "11_4": "COMPLETED",
    }  # the last: forgotten, so ended
    for job in known:
        watcher.register_job(job)
    assert {job: watcher.get_state(job) for job in known} == known
    assert [job for job in known if not watcher.is_done(job)] == ["7_1", "7_3", "7_5", "7_6", "10"]
    unreachable = SlurmInfoWatcher()
    assert unreachable.get_state("12") == "UNKNOWN"  # queried again later


def test_slurm_sh_without_slurm(tmp_path: Path) -> None:
    for tool in ("bash", "dirname", "cat"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    command, env = [str(tmp_path / "bash"), str(LAUNCHERS / "slurm.sh")], {"PATH": str(tmp_path)}
    done = subprocess.run([*command, "loss=po"], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("slurm.sh: sbatch is not on PATH") and not done.stdout
    done = subprocess.run([*command, "--help"], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: launchers/slurm.sh")


def test_resources_follow_compute() -> None:
    script = """
import sys
from hydra import compose, initialize_config_dir
from soul_exp.compose import conf_dir
with initialize_config_dir(str(conf_dir()), version_base="1.3"):
    launcher = compose("config", ["hydra/launcher=slurm", *sys.argv[1:]], return_hydra_config=True).hydra.launcher
print(launcher.cpus_per_task, launcher.gpus_per_node)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    for overrides, expected in ((["compute=cpu"], "1 None"), (["compute=gpu", "compute.processes=3"], "24 3")):
        assert _said(env, sys.executable, "-c", script, *overrides) == expected
