"""Whether this process is one of several that somebody else has started: torchrun, or SLURM as the tasks of a step."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

OUTER = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+|PMI_\w+")
PORTS = range(15_000, 32_000)  # below those that Linux hands out by itself


@dataclass(frozen=True)
class World:
    """The place of this process among those started together, and where all of them meet."""

    rank: int
    size: int
    local_rank: int  # on its machine
    host: str
    port: int
    prefix: str  # of the store's keys: a restarted torchrun meets in the same store again
    serves: bool  # whether this process holds the store
    devices: (
        int  # how many of them this process must see: torchrun's ranks share what they see, SLURM gives each its own
    )
    by: str  # who started them


def found(environment: Mapping[str, str] = os.environ) -> World | None:
    """The world of this process, or None if it is on its own.

    Of a SLURM job only a step counts: its batch script runs once, whatever SLURM_NTASKS says. MASTER_ADDR and
    MASTER_PORT win over the address that follows from the step.
    """
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(environment):
        elastic = "TORCHELASTIC_RUN_ID" in environment
        if environment["WORLD_SIZE"] == "1" and not elastic:
            return None
        rank = int(environment["RANK"])
        return World(
            rank=rank,
            size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", rank)),
            host=environment["MASTER_ADDR"],
            port=int(environment["MASTER_PORT"]),
            prefix=f"attempt_{environment.get('TORCHELASTIC_RESTART_COUNT', 0)}",
            serves=rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            devices=int(environment.get("LOCAL_WORLD_SIZE", 1)),
            by="torchrun" if elastic else "the environment (WORLD_SIZE)",
        )
    size = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if size == 1:
        return None
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    one_machine = environment.get("SLURM_STEP_NUM_NODES") == "1"
    rank = int(environment["SLURM_PROCID"])
    return World(
        rank=rank,
        size=size,
        local_rank=int(environment["SLURM_LOCALID"]),
        host=environment.get("MASTER_ADDR")
        or ("127.0.0.1" if one_machine else first_host(environment["SLURM_STEP_NODELIST"])),
        port=int(environment.get("MASTER_PORT", PORTS[(31 * job + step) % len(PORTS)])),
        prefix=f"attempt_{environment.get('SLURM_RESTART_COUNT', 0)}",
        serves=rank == 0,
        devices=1,
        by="srun",
    )


def first_host(nodes: str) -> str:
    """The first name in SLURM's list of nodes: `a[07-09,12],b3` begins with a07."""
    entry = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    assert entry is not None, nodes
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", entry[0])


def outer_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The names by which a library would take a fresh worker for one of this world."""
    return [name for name in environment if OUTER.fullmatch(name)]
