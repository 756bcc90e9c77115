#!/usr/bin/env bash
# Trains on Cloud TPU slices, and resumes after preemptions, lost hosts and broken connections:
#
#   launch/tpu_pod.sh --name=NAME --zone=ZONE --workdir=gs://BUCKET/runs/NAME [FLAGS] -- \
#       --config=configs/mirai_e.py:imagenet_b --config.data.path=gs://BUCKET/codes [--config.FIELD=VALUE ...]
#
#   --name=NAME --zone=ZONE [--project=PROJECT]    the TPU VM, or the queued resource of several slices
#   --slices=N          how many slices, which split mesh.data between them; default: 1
#   --workdir=FOLDER    the run's folder: in a bucket, or absolute, on storage that all hosts see
#   --setup=COMMAND     a shell command for every host before each start, such as a mount, or
#       venv/bin/wandb login KEY
#   --env=NAME=VALUE    a variable of the program on all hosts; may be repeated
#   --create [--spot] [--type=TYPE] [--version=VERSION]    creates the TPU VM where there is none, and
#       again after a preemption; TYPE, of a slice, is v5litepod-16 by default, VERSION what Cloud TPU
#       names for it
#   --max_restarts=N    gives up after N restarts in a row without a new step; default: 100
#   --dry_run           prints the commands, in order, and runs none
#
# It needs gcloud, logged in, and for several hosts the key in the agent: ssh-add
# ~/.ssh/google_compute_engine. The hosts get the last commit; runs/launch/NAME/ keeps the output.
# The TPU VM's service account must be allowed to write to the bucket. The program runs detached
# from the connection. The same command again stops it, which saves, and resumes it. Ctrl-C (or
# SIGTERM) stops all hosts, which save. The TPU VM stays until you delete it.
#
# Exit status: 0 finished, 75 stopped and saved, 130 stopped while no program ran, 2 wrong flags, else
# the program's; 1 also where the launcher gave up.
set -uo pipefail

fail() {
  printf 'error: %s\n' "$2" >&2
  exit "$1"
}

# On every worker, in ~/mirai-jax: `pid` is the program's, `owner` names its launcher ----------------

worker_is_running() { [ -s pid ] && grep -qs mirai_jax.main "/proc/$(cat pid)/cmdline"; }

worker_stop() { # SECONDS to save
  worker_is_running || return 0
  local pid
  pid=$(cat pid)
  kill -TERM "$pid" # the program alone: its data readers must live until it ends
  for ((i = 0; i < $1; i++)); do ! worker_is_running || sleep 1; done
  kill -KILL -- "-$pid" 2>/dev/null
}

worker_setup() { # LAUNCH ATTEMPT COMMAND
  [ "$2" -gt 1 ] || echo "$1" >owner
  [ "$(cat owner 2>/dev/null || echo "$1")" = "$1" ] || return 77
  worker_stop 300
  set -e
  rm -rf code && mkdir code && tar -xzf ~/mirai-jax.tar.gz -C code
  PATH=$HOME/.local/bin:$PATH
  # The images' Python can be too old (3.10); uv fetches one.
  command -v uv >/dev/null || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  [ -x venv/bin/python ] || uv venv --quiet --python '>=3.11' venv
  uv pip install --quiet --python venv/bin/python --editable './code[tpu,gcs,hub,wandb]'
  bash -c "$3"
}

# ATTEMPT COMMAND...: starts the attempt or, where a broken connection makes gcloud repeat this, follows
# it; its status is then 76 (lost).
worker_run() {
  local log=$1.log lines=50 tail=() status=76
  shift
  if (set -o noclobber && : >"$log") 2>/dev/null; then
    lines=+1
    (cd code && exec setsid "$@" >>"../$log" 2>&1 </dev/null) &
    echo "$!" >pid
  fi
  ! worker_is_running || tail=(-f -s 0.2 --pid="$(cat pid)")
  tail -n "$lines" "${tail[@]}" "$log"
  if [ "$lines" = +1 ]; then
    wait "$!"
    status=$?
    kill -KILL -- "-$!" 2>/dev/null # what the program left behind
  fi
  echo "worker $(hostname) ended with status $status"
  exit "$status"
}

case ${1-} in worker_*)
  mkdir -p ~/mirai-jax && cd ~/mirai-jax && "$@"
  exit
  ;;
esac

# Here -----------------------------------------------------------------------------------------------

log() { printf '[%s] %s\n' "$(date +%H:%M:%S)" "$1"; }
run() { if $dry_run; then printf '%q ' "$@" && echo; else "$@"; fi; }
create() { run "${tpu[@]}" create "$name" "${where[@]}" --accelerator-type="$type" "${new[@]}" $spot; }
delete() { run "${tpu[@]}" delete "$name" "${where[@]}" $force; }

on_workers() { # FUNCTION ARGUMENT...
  run "${tpu[@]}" ssh "$name" "${where[@]}" "${all[@]}" --ssh-flag='-o ServerAliveInterval=30' \
    --command="bash mirai-jax.sh$(printf ' %q' "$@")" </dev/null
}

state() { # nothing where gcloud does not give it
  "${tpu[@]}" describe "$name" "${where[@]}" "$format" 2>"$scratch/errors" && return
  if grep -q NOT_FOUND "$scratch/errors"; then echo MISSING; else cat "$scratch/errors" >&2; fi
}

prepare() {
  run git -C "$root" archive --format=tar.gz --output="$scratch/mirai-jax.tar.gz" HEAD &&
    run cp "${BASH_SOURCE[0]}" "$scratch/mirai-jax.sh" &&
    run "${tpu[@]}" scp "$scratch/mirai-jax.tar.gz" "$scratch/mirai-jax.sh" "$name:" "${where[@]}" "${all[@]}" &&
    on_workers worker_setup "$launch" "$attempt" "$setup"
}

follow() { # shows the attempt's output to its end, in a process group that Ctrl-C does not reach
  set -m
  (on_workers worker_run "$launch.$attempt" "${command[@]}" 2>&1 | tee -a "$output") &
  set +m
  follower=$!
  while wait "$follower"; status=$?; kill -0 "$follower" 2>/dev/null; do :; done
  follower=""
}

stop() {
  ! $stopping || exit 130
  stopping=true
  [ -z "$follower" ] || on_workers worker_stop 300 &
}

again() { # WHY: waits, longer each time
  ! $stopping || exit 130
  restarts=$((restarts + 1))
  [ "$restarts" -le "$max_restarts" ] ||
    fail 1 "$1; gave up after $max_restarts restarts without a new step. $name stays until: $(dry_run=true && delete)"
  look_again "$1 (restart $restarts of $max_restarts)" $((restarts > 6 ? 600 : 5 * 2 ** restarts))
}

look_again() { # WHY SECONDS
  ! $stopping || exit 130
  log "$1: trying again in $2 s"
  sleep "$2" &
  wait $!
}

name="" zone="" project="" workdir="" setup=":" type=v5litepod-16 version="" slices=1 max_restarts=100
create=false spot="" dry_run=false env=(env)
while [ $# -gt 0 ]; do
  case $1 in
    --name=* | --zone=* | --project=* | --workdir=* | --setup=* | --type=* | --version=* | --slices=* | \
      --max_restarts=*)
      flag=${1%%=*}
      printf -v "${flag#--}" %s "${1#*=}"
      ;;
    --env=[A-Za-z_]*=*) env+=("${1#--env=}") ;;
    --create) create=true ;;
    --spot) spot=--spot ;;
    --dry_run) dry_run=true ;;
    --help) exec sed -n '2,/^set /s/^#[ ]\{0,1\}//p' "${BASH_SOURCE[0]}" ;;
    --) break ;;
    *) fail 2 "argument '$1' is unknown; the program's follow --, and --help lists all" ;;
  esac
  shift
done
[ $# -eq 0 ] || shift
[[ -n $name && -n $zone && " $*" == *" --config="* ]] || fail 2 "--name, --zone and, after --, --config must be given"
[[ $workdir == /* || $workdir == *://* ]] ||
  fail 2 "--workdir is '$workdir'; it must be in a bucket, or an absolute folder that all hosts see"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail 2 "--slices is '$slices'; it must be 1 or more"
case $type in
  v5litepod-*) default=v2-alpha-tpuv5-lite ;;
  v5p-*) default=v2-alpha-tpuv5 ;;
  v6e-*) default=v2-alpha-tpuv6e ;;
  *) default="tpu-ubuntu2204-base" ;;
esac
version=${version:-$default}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tpu=(gcloud compute tpus tpu-vm) new=(--version="$version") all=(--worker=all) format='--format=value(state)' force=""
if [ "$slices" -gt 1 ]; then # JAX learns of the other slices from the VMs' metadata
  # By default gcloud begins with 64 hosts, and asks the others when these have ended.
  tpu=(gcloud compute tpus queued-resources) all+=(--node=all --batch-size=all) format='--format=value(state.state)' force=--force
  new=(--runtime-version="$version" --node-count="$slices" --node-prefix="$name")
fi
where=(--zone="$zone" --quiet)
[ -z "$project" ] || where+=(--project="$project")
# JAX joins the hosts of a slice only on request.
command=("${env[@]}" ../venv/bin/python -m mirai_jax.main --distributed=on --workdir="$workdir" "$@")
launch=$(date +%Y%m%d-%H%M%S)-$$
attempt=1 restarts=0 reached=0 running=false stopping=false follower=""

if $dry_run; then
  scratch=/tmp
  run "${tpu[@]}" describe "$name" "${where[@]}" "$format"
  ! $create || create
  prepare
  on_workers worker_run "$launch.$attempt" "${command[@]}"
  ! $create || { echo "# after a preemption, before all of this again:" && delete; }
  exit
fi

command -v gcloud >/dev/null || fail 1 "gcloud is not installed; see cloud.google.com/sdk"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"; [ -z "$follower" ] || kill -- "-$follower"' EXIT
trap stop INT TERM
mkdir -p "$root/runs/launch/$name" || exit 1

while :; do
  ! $stopping || exit 130
  now=$(state)
  case $now in
    READY | ACTIVE) ;;
    MISSING | PREEMPTED | TERMINATED | SUSPENDED | FAILED)
      $create || fail 1 "the TPU VM $name in $zone is $now; --create makes it (again)"
      log "$name is $now: creating $type in $zone"
      running=false
      [ "$now" = MISSING ] || delete
      create || look_again "no $type could be created" 60
      continue
      ;;
    *)
      [ -n "$now" ] || $running || fail 1 "gcloud does not give the state of $name; see above"
      look_again "$name is ${now:-in an unknown state}" 60
      continue
      ;;
  esac
  if ! $running; then
    log "preparing the workers of $name"
    prepare || {
      [ $? -ne 77 ] || fail 1 "another launcher has taken $name over"
      [ "$attempt" -gt 1 ] || fail 1 "the workers of $name cannot be prepared; see above"
      again "the workers of $name cannot be prepared"
      continue
    }
    running=true
  fi
  output=$root/runs/launch/$name/$launch.$attempt.log
  log "attempt $attempt; log: $output"
  follow
  step=$(grep -o 'step *[0-9]*/' "$output" | tr -dc '0-9\n' | sort -n | tail -n 1)
  [ "${step:-0}" -le "$reached" ] || restarts=0 reached=$step

  # gcloud's status is that of one worker, or 1 or 255 where the connection broke.
  ended=$(sed -n 's/^.*worker [^ ]* ended with status \([0-9]*\)$/\1/p' "$output" | sort -nu | xargs)
  for one in $ended; do
    case $one in
      0 | 75 | 76 | 134 | 137 | 139 | 143) ;; # finished, saved, lost, or killed by a signal
      *) fail "$one" "the program ended with status $one; see above, or $output" ;;
    esac
  done
  [ "$status" -ne 0 ] || exit 0
  ! $stopping || [ "$ended" != 75 ] || exit 75
  # Where no worker has ended the attempt may still run: the next turn follows it again.
  [ -z "$ended" ] || running=false attempt=$((attempt + 1))
  again "the program ended with status ${ended:-unknown}"
done
