#!/usr/bin/env bash
# Submit a sweep of soul_exp to SLURM and wait for it; --help shows the usage.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: launchers/slurm.sh OVERRIDE...

Submits one SLURM job per combination of the values, waits for all of them, and exits with 1 and the names of those that
failed. Results: runs/NAME/*/results.json; logs: runs/NAME/.slurm/JOB/. The same command again skips what has finished.

  launchers/slurm.sh task=tofu loss=npo,po optimizer=adam,sophia
  launchers/slurm.sh loss=npo,po compute=gpu hydra.launcher.partition=gpu hydra.launcher.account=lab
  launchers/slurm.sh loss=npo,po hydra.launcher.timeout_min=600 hydra.launcher.mem_gb=64

OVERRIDE is what `python -m soul_exp` takes; hydra.launcher.KEY is an option of conf/hydra/launcher/slurm.yaml.
HELP
}

fail() {
    echo "slurm.sh: $1" >&2
    exit 2
}

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
root=${here%/*}

for argument in "$@"; do
    case $argument in -h | --help)
        usage
        exit 0
        ;;
    esac
done

command -v sbatch >/dev/null ||
    fail "sbatch is not on PATH: run this on a login node of the cluster, or without SLURM: python -m soul_exp ... -m"

python=$root/.venv/bin/python
[ -x "$python" ] || python=$(command -v python || command -v python3) ||
    fail "no python found: make the environment in $root/.venv (make .venv/.installed), or activate yours"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # SLURM passes the environment on to the jobs
"$python" -c 'import hydra, submitit, torch' 2>/dev/null ||
    fail "$python cannot import hydra, submitit and torch: make the environment in $root/.venv (make .venv/.installed), or activate yours"

# Without accounting Hydra would not notice that a job was killed, and would wait for ever.
sacct >/dev/null 2>&1 || export PATH=$here:$PATH

exec "$python" -m soul_exp hydra/launcher=slurm hydra.hydra_logging.root.level=INFO "$@" --multirun
