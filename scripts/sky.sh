#!/usr/bin/env bash
# jtune as a managed job of SkyPilot; what it runs on is said in skypilot.yaml, or by options of sky.
#
#     scripts/sky.sh [--dry-run] [option of sky ...] -- train CASE.yaml [key=value ...]
#     scripts/sky.sh --num-nodes 2 --gpus H100:8 -- train CASE.yaml output_dir=/checkpoints/run
#
# RESTARTS is passed on if it is set here (see restart.sh, which each machine runs).
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=restart.sh
source "$here/restart.sh"

options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  if [ "$1" = --dry-run ]; then DRY_RUN=1; else options+=("$1"); fi
  shift
done
if [ $# -lt 2 ]; then
  say "no jtune command given after --, such as: -- train CASE.yaml"
  exit 2
fi
shift
command=(sky jobs launch ${options[@]+"${options[@]}"} --env "JTUNE_ARGS=$(quote "$@")")
if [ -n "${RESTARTS-}" ]; then command+=(--env "RESTARTS=$RESTARTS"); fi
command+=("$here/skypilot.yaml")
echo "+ $(quote "${command[@]}" | hide)"
if [ -z "${DRY_RUN-}" ]; then exec "${command[@]}"; fi
