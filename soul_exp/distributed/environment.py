"""Whether this process is one of several that a launcher has started: torchrun, or SLURM as the tasks of a step."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from soul_exp.errors import explained

LAUNCH_VARIABLE = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+|PMI_\w+"
)
PORTS = range(15_000, 32_000)  # below those that Linux hands out by itself


@dataclass(frozen=True)
class LaunchEnvironment:
    """The rank of this process among those that a launcher has started together, and the address where all meet."""

    rank: int
    num_processes: int
    local_rank: int  # on its machine
    host: str
    port: int
    store_prefix: str  # of the store's keys: a restarted torchrun uses the same store again
    serves_store: bool  # whether this process holds the store
    num_devices: int  # that this process must see: torchrun's ranks share what they see, SLURM gives each its own
    launcher: str  # its name, for messages


def launch_environment(variables: Mapping[str, str] = os.environ) -> LaunchEnvironment | None:
    """The launch environment that `variables` describe; None if no launcher has started several processes.

    Of a SLURM job only a step counts: its batch script runs once, whatever SLURM_NTASKS is. MASTER_ADDR and
    MASTER_PORT replace the address that follows from the step. Raises UsageError if a variable is missing or no number.
    """
    found = "the variables of a launcher cannot be read"
    with explained((KeyError, ValueError), found, "start the program by torchrun or srun, or unset them"):
        return _described(variables)


def _described(variables: Mapping[str, str]) -> LaunchEnvironment | None:
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(variables):
        elastic = "TORCHELASTIC_RUN_ID" in variables
        if variables["WORLD_SIZE"] == "1" and not elastic:
            return None
        rank = int(variables["RANK"])
        return LaunchEnvironment(
            rank=rank,
            num_processes=int(variables["WORLD_SIZE"]),
            local_rank=int(variables.get("LOCAL_RANK", rank)),
            host=variables["MASTER_ADDR"],
            port=int(variables["MASTER_PORT"]),
            store_prefix=f"attempt_{variables.get('TORCHELASTIC_RESTART_COUNT', 0)}",
            serves_store=rank == 0 and variables.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            num_devices=int(variables.get("LOCAL_WORLD_SIZE", 1)),
            launcher="torchrun" if elastic else "the environment (WORLD_SIZE)",
        )
    num_processes = int(variables.get("SLURM_STEP_NUM_TASKS", 1))
    if num_processes == 1:
        return None
    job, step, rank = (int(variables[f"SLURM_{name}"]) for name in ("JOB_ID", "STEP_ID", "PROCID"))
    one_machine = variables.get("SLURM_STEP_NUM_NODES") == "1"
    host = variables.get("MASTER_ADDR")
    if not host:
        host = "127.0.0.1" if one_machine else first_host(variables["SLURM_STEP_NODELIST"])
    return LaunchEnvironment(
        rank=rank,
        num_processes=num_processes,
        local_rank=int(variables["SLURM_LOCALID"]),
        host=host,
        port=int(variables.get("MASTER_PORT", PORTS[(31 * job + step) % len(PORTS)])),
        store_prefix=f"attempt_{variables.get('SLURM_RESTART_COUNT', 0)}",
        serves_store=rank == 0,
        num_devices=1,
        launcher="srun",
    )


def first_host(nodes: str) -> str:
    """The first name in SLURM's list of nodes: `a[07-09,12],b3` begins with a07."""
    entry = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    assert entry is not None, nodes
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", entry[0])


def launch_variables(variables: Mapping[str, str] = os.environ) -> list[str]:
    """The names of the variables that make a library take a new process for one that the launcher has started."""
    return [name for name in variables if LAUNCH_VARIABLE.fullmatch(name)]
