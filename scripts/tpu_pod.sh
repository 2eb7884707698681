#!/usr/bin/env bash
# jtune on all hosts of a Cloud TPU VM slice, started from anywhere that has gcloud.
#
#     scripts/tpu_pod.sh [--dry-run] --tpu NAME --zone ZONE [--project P] [--dir DIR] train CASE.yaml [key=value ...]
#     scripts/tpu_pod.sh [--dry-run] --tpu NAME --zone ZONE [--project P] [--dir DIR] --stop
#
# DIR is the checkout on each host (default: jtune in the home folder). To put it there and install it, once:
#     gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command \
#       'git clone URL jtune && cd jtune && python3 -m venv .venv && .venv/bin/pip install -q -e ".[tpu]"'
# CASE.yaml is a path on the hosts, and output_dir a folder that all of them see, such as a mounted disk or bucket.
#
# Training does not depend on this connection. If it breaks, or after Ctrl-C, start this again with the same arguments
# to see the log go on; --stop makes jtune save and end. Each host starts jtune again by itself (see restart.sh);
# RESTARTS, RESTART_PAUSE and JTUNE are passed on if they are set here. Tokens are not: `hf auth login` on the hosts.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=restart.sh
source "$here/restart.sh"

tpu="" zone="" project="" dir=jtune stop=""
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) DRY_RUN=1 && shift ;;
    --tpu) tpu=${2-} && shift 2 ;;
    --zone) zone=${2-} && shift 2 ;;
    --project) project=${2-} && shift 2 ;;
    --dir) dir=${2-} && shift 2 ;;
    --stop) stop=1 && shift ;;
    *) break ;;
  esac
done
if [ -z "$tpu" ] || [ -z "$zone" ] || { [ $# -eq 0 ] && [ -z "$stop" ]; }; then
  say "--tpu, --zone and a jtune command (or --stop) are needed; see the head of $0"
  exit 2
fi

# What each host runs, in any POSIX shell. The launcher lives on without this connection, and writes to a file; `tail`
# shows it, and ends with it. A launcher that is running is not started a second time, only shown.
if [ -n "$stop" ]; then
  remote="cd $(quote "$dir") && kill \"\$(cat out/pod.pid)\""
else
  passed=()
  for name in RESTARTS RESTART_PAUSE JTUNE; do
    if [ -n "${!name-}" ]; then passed+=("$name=${!name}"); fi
  done
  launcher=$(quote env ${passed[@]+"${passed[@]}"} scripts/tpu.sh "$@")
  kept="$launcher & echo \$! >out/pod.pid; wait \$!; echo \$? >out/pod.status"
  remote="cd $(quote "$dir") && mkdir -p out || exit 1
if [ -s out/pod.status ] || ! kill -0 \"\$(cat out/pod.pid 2>/dev/null)\" 2>/dev/null; then
  rm -f out/pod.status out/pod.pid
  nohup setsid sh -c $(quote "$kept") >out/pod.log 2>&1 </dev/null &
fi
until [ -s out/pod.pid ]; do sleep 0.1; done
tail -n +1 -f --pid=\"\$(cat out/pod.pid)\" out/pod.log
until [ -s out/pod.status ]; do sleep 0.1; done
exit \"\$(cat out/pod.status)\""
fi

connect=(gcloud compute tpus tpu-vm ssh "$tpu" "--zone=$zone" --worker=all)
if [ -n "$project" ]; then connect+=("--project=$project"); fi
connect+=(--command "$remote")
echo "+ $(quote "${connect[@]}" | hide)"
if [ -z "${DRY_RUN-}" ]; then exec "${connect[@]}"; fi
