#!/usr/bin/env bash
# jtune on several GPUs of one host: one process uses them all, so there is nothing like torchrun here.
#
#     scripts/gpus.sh [--dry-run] [--gpus 0,1,2,3] train CASE.yaml [key=value ...]
#
# Default: all GPUs, or those of CUDA_VISIBLE_DEVICES. How work is split over them: mesh_data, mesh_fsdp, mesh_tensor.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=restart.sh
source "$here/restart.sh"
# shellcheck source-path=SCRIPTDIR source=xla_flags.sh
source "$here/xla_flags.sh"

while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) DRY_RUN=1 && shift ;;
    --gpus) export CUDA_VISIBLE_DEVICES=${2:?"--gpus needs numbers, such as 0,1"} && shift 2 ;;
    *) break ;;
  esac
done
if [ $# -eq 0 ]; then
  say "no jtune command given, such as: train CASE.yaml"
  exit 2
fi
xla_flags gpus
run_with_restarts "$(find_jtune)" "$@"
