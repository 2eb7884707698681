#!/usr/bin/env bash
# Runs a command, and starts it again when it ends with a status that asks for it.
#
#     scripts/restart.sh [--dry-run] COMMAND [ARGUMENT ...]
#
# jtune goes on from its last checkpoint when the same command is started again; JTUNE_RESTARTED, which is set then, says
# that it does so also if the command says to start from the beginning, or from a checkpoint. It ends with
#     75  when it was asked to stop, by whoever takes the machine away, and has saved
#     70  when another process of the run was lost
# Any other status is passed on: 0 is done, and an error would only happen again.
#
# A signal to this script (TERM, INT, HUP) goes on to the command, which saves; then nothing is started again, as it is
# this machine that is being taken away, or a person who wants it to end.
#
# RESTARTS       how often it is started again at most (default 20); after that, its status is passed on
# RESTART_PAUSE  seconds in between (default 10)
# RESTART_ON     the statuses (default "70 75")
# DRY_RUN        not empty: print the command, and run nothing
#
# Other scripts source this file, and call `run_with_restarts` or `quote`.

# Settings that the launchers make, shown with the command.
JTUNE_SHOWN="CUDA_VISIBLE_DEVICES XLA_FLAGS LIBTPU_INIT_ARGS XLA_PYTHON_CLIENT_MEM_FRACTION
JTUNE_COORDINATOR JTUNE_NUM_PROCESSES JTUNE_PROCESS_ID"

# The arguments as words of any shell, with spaces between.
quote() {
  local word out="" tick="'\\''"
  for word in "$@"; do
    case "$word" in
      "" | *[!A-Za-z0-9_@%+=:,./-]*) word="'${word//\'/$tick}'" ;;
    esac
    out="$out${out:+ }$word"
  done
  printf '%s\n' "$out"
}

# What is printed, without secrets: values of arguments and variables such as hf_hub_token and WANDB_API_KEY, tokens of
# the hub, users and keys in URLs. (sed of BSD has no flag for upper and lower case.)
hide() {
  local any='[Tt][Oo][Kk][Ee][Nn]|[Ss][Ee][Cc][Rr][Ee][Tt]|[Pp][Aa][Ss][Ss][Ww][A-Za-z]*|[Aa][Pp][Ii][_-]?[Kk][Ee][Yy]'
  local word='[Kk][Ee][Yy]|[Pp][Ww][Dd]|[Aa][Uu][Tt][Hh]'
  any="$any|[Cc][Rr][Ee][Dd][Ee][Nn][Tt][Ii][Aa][Ll][Ss]?|[Ww][Ee][Bb][Hh][Oo][Oo][Kk]"
  local name="([A-Za-z0-9_.-]*($any)([_.-][A-Za-z_-]*)?|([A-Za-z0-9_.-]*[_.-])?($word))"
  sed -E -e "s#'($name=)[^']*'#'\1***'#g" -e "s#(^|[ ?\&])($name=)[^ '\"&]+#\1\2***#g" \
    -e "s#(--$name +)('[^']*'|[^- '\"][^ '\"]*)#\1***#g" \
    -e "s#://[^/@ '\"]+@#://***@#g" -e "s#hf_[A-Za-z0-9]{16,}#***#g"
}

# The command with the settings it is run under, as a line that can be pasted.
show_command() {
  local name settings=()
  for name in $JTUNE_SHOWN; do
    if [ -n "${!name-}" ]; then settings+=("$name=${!name}"); fi
  done
  if [ ${#settings[@]} -gt 0 ]; then
    echo "+ env $(quote "${settings[@]}" "$@" | hide)"
  else
    echo "+ $(quote "$@" | hide)"
  fi
}

say() { echo "$(basename "$0"): $*" >&2; }

forward() {
  asked_to_stop=1 interrupted=1
  if [ -n "$child" ]; then kill -s "$1" "$child" 2>/dev/null || true; fi
}

# Starts a command as $child. With job control it has a process group of its own: a Ctrl-C reaches it once, by us, and
# it is not started with SIGINT ignored, as background commands of scripts otherwise are.
start_child() {
  set -m
  "$@" &
  child=$!
  set +m
}

# Waits for $child, and leaves its status in $status. A signal ends `wait` early, so it is called until there is nothing
# left to wait for (127).
wait_for_child() {
  local code
  status=127
  while :; do
    interrupted="" code=0
    wait "$child" || code=$?
    if [ "$code" != 127 ]; then status=$code; fi
    if [ -z "$interrupted" ] || [ "$code" = 127 ]; then break; fi
  done
  child=""
}

run_with_restarts() {
  local restarts=${RESTARTS:-20} pause=${RESTART_PAUSE:-10} done_restarts=0 last
  case "$restarts" in
    "" | *[!0-9]*)
      say "RESTARTS=$restarts: expected a whole number"
      return 2
      ;;
  esac
  show_command "$@"
  if [ -n "${DRY_RUN-}" ]; then return 0; fi
  child="" asked_to_stop="" interrupted=""
  trap 'forward TERM' TERM HUP
  trap 'forward INT' INT
  while :; do
    start_child "$@"
    wait_for_child
    case " ${RESTART_ON:-70 75} " in
      *" $status "*) ;;
      *) break ;;
    esac
    if [ -z "$asked_to_stop" ] && [ "$done_restarts" -ge "$restarts" ]; then
      say "exit status $status; it has been started again $restarts times (RESTARTS), and is not any more"
      break
    fi
    if [ -z "$asked_to_stop" ]; then
      done_restarts=$((done_restarts + 1))
      say "exit status $status: starting it again in $pause s ($done_restarts of $restarts)"
      last=$status
      start_child sleep "$pause"
      wait_for_child
      status=$last
      export JTUNE_RESTARTED=$done_restarts
    fi
    if [ -n "$asked_to_stop" ]; then
      say "stopped as asked (exit status $status); the same command goes on from there"
      break
    fi
  done
  trap - TERM INT HUP
  return "$status"
}

# jtune on the PATH, or that of this checkout; JTUNE names another.
find_jtune() {
  local beside
  beside="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/jtune"
  if [ -n "${JTUNE-}" ]; then
    echo "$JTUNE"
  elif ! command -v jtune >/dev/null && [ -x "$beside" ]; then
    echo "$beside"
  else
    echo jtune
  fi
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail
  if [ "${1-}" = --dry-run ]; then
    DRY_RUN=1
    shift
  fi
  if [ $# -eq 0 ]; then
    say "no command given; see the head of $0"
    exit 2
  fi
  run_with_restarts "$@"
fi
