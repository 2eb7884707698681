#!/usr/bin/env bash
# jtune on one TPU host, with all its chips. On each host of a pod it is tpu_pod.sh that runs this.
#
#     scripts/tpu.sh [--dry-run] train CASE.yaml [key=value ...]
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=restart.sh
source "$here/restart.sh"
# shellcheck source-path=SCRIPTDIR source=xla_flags.sh
source "$here/xla_flags.sh"

if [ "${1-}" = --dry-run ]; then
  DRY_RUN=1
  shift
fi
if [ $# -eq 0 ]; then
  say "no jtune command given, such as: train CASE.yaml"
  exit 2
fi
xla_flags tpu
run_with_restarts "$(find_jtune)" "$@"
