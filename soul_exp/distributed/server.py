"""The fork server: a process that imports everything once, and from which this launcher's workers are then forked.

It serves all jobs of a launcher. Where it cannot, workers are started one by one ("spawn"), and each imports everything
itself. SOUL_EXP_START_METHOD chooses: forkserver (the default on Linux), spawn, or fork, which tests use.
SOUL_EXP_PRELOAD names the modules to import, with commas between them, instead of MODULES.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import soul_exp
from soul_exp import compat
from soul_exp.distributed import interrupts
from soul_exp.distributed.environment import launch_variables
from soul_exp.distributed.output import QUIET
from soul_exp.errors import UsageError

log = logging.getLogger(__name__)

PRELOADED = "soul_exp.preload"
# What the workers of an ordinary run have imported at their end. What is missing here they import themselves.
MODULES = (
    "soul_exp.experiment", "soul_exp.evaluation.lm_eval_suite", "soul_exp.metrics.general", "soul_exp.metrics.tofu",
    "soul_exp.optim.kernels.cpu", "soul_exp.tasks.tofu", "deepspeed.runtime.engine", "omegaconf._impl",
    "peft.utils.transformers_weight_conversion", "pyarrow.parquet", "requests", "rouge_score.rouge_scorer", "sacrebleu",
    "sklearn.feature_extraction.text", "sklearn.linear_model", "torch.profiler._cupti_monitor",
    "torch.utils.serialization.config", "transformers.integrations.deepspeed",
    "transformers.models.llama.modeling_llama", "wandb.sdk.launch.inputs.internal", "wandb.sdk.lib.gitlib",
)  # fmt: skip
ZERO = "deepspeed.runtime.zero.muon.muon_optimizer"  # which imports what compiles: a second for each ZeRO engine
PRELOAD = "SOUL_EXP_PRELOAD"
METHOD = "SOUL_EXP_START_METHOD"
# variables of the server alone; its one thread starts no pool of threads, and CUDA stays untouched until after the fork
OWN = {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "PYTHONSAFEPATH": "1"}
LAUNCHER = "SOUL_EXP_LAUNCHER"  # of the server alone: its launcher's process id, file of soul_exp, and sys.path
# variables that nothing reads as it is imported, or that differ in the server on purpose
READ_AT_USE = re.compile(r"OMP_NUM_THREADS|PYTEST_CURRENT_TEST|SOUL_EXP_(?!PRELOAD)\w+")


class Report(NamedTuple):
    """What the server says of itself when it has imported everything."""

    fault: str | None  # why it must not fork workers
    added: Mapping[str, str] = {}  # the variables that libraries have set as they were imported
    temporary_folders: Sequence[str] = ()  # that they have made


@dataclass
class _Server:
    pid: int | None
    environment: Mapping[str, str]  # of the launcher when it started
    report: Report | None = None  # unknown until the first worker


_servers: list[_Server] = []  # of this process: none or one
_faults: list[str] = []  # why this process starts no server any more


def modules() -> list[str]:
    return [name.strip() for name in (os.environ.get(PRELOAD) or ",".join(MODULES)).split(",")]


def start() -> None:
    """Start the server of this process unless it runs; it imports while the caller goes on."""
    if method_wanted() != "forkserver" or _faults:
        return
    if not _servers and compat.fork_server_pid():
        return _do_without("this process has another fork server")
    if not _servers and threading.current_thread() is not threading.main_thread():
        return _do_without("it would end with the thread that starts it, which is not the main one")
    environment = environment_for_workers()
    try:
        paths = [path or os.getcwd() for path in sys.path]
        own = {**OWN, "PYTHONPATH": os.pathsep.join(paths)}
        own[LAUNCHER] = json.dumps([os.getpid(), soul_exp.__file__, paths])
        with environment_of({**environment, **own}), interrupts.blocked_for_workers():
            forkserver.set_forkserver_preload([PRELOADED])
            forkserver.ensure_running()
    except OSError as error:  # a socket's path holds 107 characters, and TMPDIR may be longer
        return _do_without(f"it cannot be started ({error})")
    pid = compat.fork_server_pid()
    if not _servers or _servers[0].pid != pid:
        _servers[:] = [_Server(pid, environment)]


def _do_without(fault: str) -> None:
    """Spawn the workers of this process from now on."""
    _faults.append(fault)
    log.warning("no fork server, so each worker imports everything itself, which takes seconds: %s", fault)


def method_for(environment: Mapping[str, str], threads: int) -> str:
    """The start method of workers that get `environment`; the server is started anew where it began with another."""
    if method_wanted() != "forkserver":
        if method_wanted() == "fork" and threads > 1:
            raise UsageError(f"{METHOD}=fork needs compute.threads=1: a forked pool of threads waits for ever")
        return method_wanted()
    start()
    if _servers and (names := _changed(_servers[0], environment)):
        log.info("workers start from a new process, because libraries may have read %s", ", ".join(names))
        compat.stop_fork_server()
        start()
    if _servers and (fault := _report(_servers[0]).fault):
        compat.stop_fork_server()
        _servers.clear()
        _do_without(fault)
    return "spawn" if _faults else "forkserver"


def method_wanted() -> str:
    chosen, known = os.environ.get(METHOD), multiprocessing.get_all_start_methods()
    if chosen and chosen not in known:
        raise UsageError(f"{METHOD}={chosen} is unknown: choose one of {', '.join(known)}, or unset it")
    return chosen or ("forkserver" if sys.platform == "linux" else "spawn")


def environment_for_workers() -> dict[str, str]:
    """The environment of this process without what belongs to its own launcher, and with quiet libraries."""
    hidden = {METHOD, *launch_variables()}
    return {name: value for name, value in os.environ.items() if name not in hidden} | QUIET


@contextlib.contextmanager
def environment_of(variables: Mapping[str, str]) -> Iterator[None]:
    """In the block, the environment of this process is `variables`."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def preloaded() -> Any:
    """The module that the server has imported first; None in a process that it has not forked."""
    return sys.modules.get(PRELOADED)


def _changed(server: _Server, environment: Mapping[str, str]) -> list[str]:
    """The variables that differ from those that the server began with, other than by what a library sets itself."""
    then = server.environment
    differing = [n for n in {*then, *environment} if then.get(n) != environment.get(n) and not READ_AT_USE.fullmatch(n)]
    added = _report(server).added if differing else {}
    return sorted(n for n in differing if n in then or environment[n] != added.get(n))


def _report(server: _Server) -> Report:
    """What `server` says of itself; waits until it has imported everything."""
    if server.report is None:
        context = multiprocessing.get_context("forkserver")
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_send_report, args=(sending,))
        with contextlib.suppress(EOFError, ConnectionError):  # it has ended meanwhile
            process.start()
            sending.close()
            server.report = receiving.recv()
            interrupts.temporary_folders.extend(server.report.temporary_folders)
            process.join()
    return server.report or Report("it ended while it imported")


def _send_report(sending: Connection) -> None:
    found = preloaded()
    report = Report(f"{PRELOADED} could not be imported")
    if found:
        report = Report(found.FAULT or found.fault_in_worker(), found.ADDED, found.TEMPORARY)
    with contextlib.suppress(BrokenPipeError):  # the launcher has ended meanwhile
        sending.send(report)
