# Flags of XLA that the launchers set; sourced by them. What each is for, and others to try: docs/xla_flags.md
# shellcheck shell=bash
#
#     xla_flags gpu | gpus | tpu
#
# A flag that you have set yourself is left as it is. An unknown flag ends the process at its start, so there are few.

# add_flag VARIABLE --name=value
add_flag() {
  local name=${2%%=*}
  case " ${!1-} " in
    *" $name="* | *" $name "*) ;;
    *) export "$1=${!1-}${!1:+ }$2" ;;
  esac
}

xla_flags() {
  case "$1" in
    gpu | gpus)
      export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
      ;;
  esac
  case "$1" in
    gpus)
      add_flag XLA_FLAGS --xla_gpu_enable_latency_hiding_scheduler=true
      ;;
    gpu | tpu) ;; # nothing to overlap on one GPU; on TPUs the defaults already are what is recommended
    *)
      echo "xla_flags: $1 is none of gpu, gpus, tpu" >&2
      return 2
      ;;
  esac
}
