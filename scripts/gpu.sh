#!/usr/bin/env bash
# jtune on one GPU.
#
#     scripts/gpu.sh [--dry-run] [--gpu N] train CASE.yaml [key=value ...]
#
# N: the number of the GPU (default: the first of CUDA_VISIBLE_DEVICES, or 0). What is run is printed first; it is
# started again after a preemption (see restart.sh).
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=restart.sh
source "$here/restart.sh"
# shellcheck source-path=SCRIPTDIR source=xla_flags.sh
source "$here/xla_flags.sh"

gpu=${CUDA_VISIBLE_DEVICES-0}
gpu=${gpu%%,*}
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) DRY_RUN=1 && shift ;;
    --gpu) gpu=${2:?"--gpu needs a number"} && shift 2 ;;
    *) break ;;
  esac
done
if [ $# -eq 0 ]; then
  say "no jtune command given, such as: train CASE.yaml"
  exit 2
fi
export CUDA_VISIBLE_DEVICES=$gpu
xla_flags gpu
run_with_restarts "$(find_jtune)" "$@"
