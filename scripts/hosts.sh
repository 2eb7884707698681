#!/usr/bin/env bash
# jtune on several hosts that nothing manages: run this on each of them, with its own --index.
#
#     scripts/hosts.sh [--dry-run] --coordinator HOST:PORT --hosts N --index I [--platform gpus|tpu|cpu] \
#         train CASE.yaml [key=value ...]
#
# HOST is the host of index 0, and PORT a free port of it that the others can reach; N the number of hosts, I from 0 to
# N-1. All need the same YAML, and see the same output_dir. They wait for each other to come (JTUNE_INIT_TIMEOUT seconds).
# Nobody asks who connects to PORT: it must not be reachable from outside.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=restart.sh
source "$here/restart.sh"
# shellcheck source-path=SCRIPTDIR source=xla_flags.sh
source "$here/xla_flags.sh"

coordinator="" hosts="" index="" platform=gpus
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) DRY_RUN=1 && shift ;;
    --coordinator) coordinator=${2-} && shift 2 ;;
    --hosts) hosts=${2-} && shift 2 ;;
    --index) index=${2-} && shift 2 ;;
    --platform) platform=${2-} && shift 2 ;;
    *) break ;;
  esac
done

wrong() {
  say "$*; see the head of $0"
  exit 2
}
is_number() { case "$1" in "" | *[!0-9]*) return 1 ;; esac }
case "$coordinator" in
  ?*:[0-9]*) ;;
  *) wrong "--coordinator '$coordinator': expected HOST:PORT of the host of index 0" ;;
esac
is_number "$hosts" || wrong "--hosts '$hosts': expected the number of hosts"
if ! is_number "$index" || [ "$index" -ge "$hosts" ]; then
  wrong "--index '$index': expected a number from 0 to $((hosts - 1))"
fi
[ $# -gt 0 ] || wrong "no jtune command given, such as: train CASE.yaml"

export JTUNE_COORDINATOR=$coordinator JTUNE_NUM_PROCESSES=$hosts JTUNE_PROCESS_ID=$index
[ "$platform" = cpu ] || xla_flags "$platform"
run_with_restarts "$(find_jtune)" "$@"
