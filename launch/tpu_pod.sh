#!/usr/bin/env bash
# Trains on a Cloud TPU slice, and goes on after preemptions, lost hosts and lost connections:
#
#   launch/tpu_pod.sh --name=NAME --zone=ZONE --workdir=FOLDER [FLAGS] -- \
#       --config=configs/mirai_e.py:imagenet_b --config.data.path=FOLDER [--config.FIELD=VALUE ...]
#
#   --name=NAME          the TPU VM
#   --zone=ZONE          where it is
#   --project=PROJECT    default: gcloud's
#   --workdir=FOLDER     the run's folder, absolute, on storage that all hosts see
#   --mount=BUCKET:FOLDER  mounts the Cloud Storage bucket at FOLDER on every host (gcsfuse)
#   --create             creates the TPU VM where there is none, and again where it was preempted
#   --spot               creates it as a Spot VM
#   --type=TYPE          of what is created; default: v5litepod-16
#   --version=VERSION    its software; default: what Cloud TPU's manual names for the type
#   --max_restarts=N     ends after N restarts in a row that got no further; default: 100
#   --dry_run            prints the commands, in order, and runs none
#
# It needs gcloud, logged in, and for slices of several hosts the key in the agent:
# ssh-add ~/.ssh/google_compute_engine. What is copied to the hosts is the last commit; what the
# program prints is kept in runs/launch/NAME/, a file an attempt.
#
# The program runs detached from the connection: it goes on when this computer sleeps, and the same
# command takes it over. Ctrl-C (or SIGTERM) makes it save and end on all hosts. The TPU VM stays,
# and costs, until it is deleted.
#
# Exit status: the program's (0 finished, 75 stopped and saved, 1 an error to mend); 1 also where the
# launcher gave up; 2 wrong flags; 130 stopped while no program ran.
set -uo pipefail

fail() {
  printf 'error: %s\n' "$2" >&2
  exit "$1"
}

say() { printf '[%s] %s\n' "$(date +%H:%M:%S)" "$1"; }

# On the workers -----------------------------------------------------------------------------------
# They get a copy of this file, for these functions. State lies in ~/mirai-jax/run:
#   owner      which launcher the program is of
#   command    what that one runs
#   current    its newest attempt: a folder with log, boot, group, pid and, at the end, status

worker_is_running() (
  cd ~/mirai-jax/run 2>/dev/null && cd "$(cat current 2>/dev/null || echo none)" 2>/dev/null &&
    [ ! -e status ] && [ "$(cat boot)" = "$(cat /proc/sys/kernel/random/boot_id)" ] &&
    kill -0 "$(cat group)" 2>/dev/null
)

# SECONDS: ends what runs; so long it has to save.
worker_stop() {
  worker_is_running || return 0
  local at
  at=~/mirai-jax/run/$(cat ~/mirai-jax/run/current)
  kill -TERM "$(cat "$at/pid")" # the program alone: what reads data for it must live until it ends
  for ((i = 0; i < $1; i++)); do
    worker_is_running || return 0
    sleep 1
  done
  kill -KILL -- "-$(cat "$at/group")"
}

# LAUNCH COMMAND: what runs here is this launcher's from now on; the same command is stopped, to be
# started again, and another one refused.
worker_claim() {
  mkdir -p ~/mirai-jax/run && cd ~/mirai-jax/run || return
  if worker_is_running && [ "$(cat command)" != "$2" ]; then
    echo "error: $(hostname) runs another command; end that first (Ctrl-C in its launcher):"
    cat command
    return 78
  fi
  echo "$1" >owner
  echo "$2" >"command"
  worker_stop 300
}

# LAUNCH: ends what an attempt of this launcher left; what hangs has nothing to save.
worker_clear() {
  mkdir -p ~/mirai-jax/run && cd ~/mirai-jax/run || return
  [ "$(cat owner 2>/dev/null || echo "$1")" = "$1" ] || return 77
  echo "$1" >owner
  worker_stop 30
}

# ARCHIVE: unpacks the repository's files and makes a virtual environment for them.
worker_install() {
  set -e
  cd ~/mirai-jax
  rm -rf code
  mkdir code
  tar -xzf ~/"$1" -C code
  rm ~/"$1"
  PATH=$HOME/.local/bin:$PATH
  # The images' Python can be too old (3.10); uv fetches one where need be.
  command -v uv >/dev/null ||
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  [ -x venv/bin/python ] || uv venv --quiet --python '>=3.11' venv
  uv pip install --quiet --python venv/bin/python --editable './code[tpu]'
}

# BUCKET FOLDER
worker_mount() {
  set -e
  if mountpoint --quiet "$2"; then return; fi
  fusermount -uz "$2" 2>/dev/null || true # one that died
  if ! command -v gcsfuse >/dev/null; then
    curl -fsSL -o /tmp/gcsfuse.deb \
      https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v3.4.4/gcsfuse_3.4.4_amd64.deb
    # A new VM updates itself first, and holds the lock.
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq -y install /tmp/gcsfuse.deb
  fi
  sudo mkdir -p "$2"
  sudo chown "$(id -u)" "$2"
  # A checkpoint is made whole by renaming its folder, and is to be seen by all hosts at once.
  gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 "$1" "$2"
}

# FOLDER COMMAND...: the program, its log and its end; in a process group of its own.
worker_attend() {
  local at=$1 pid status
  shift
  cd ~/mirai-jax/code || return
  trap : TERM # of a machine that shuts down: the program gets it too, and its status counts
  "$@" >>"$at/log" 2>&1 </dev/null &
  pid=$!
  echo "$pid" >"$at/pid"
  while
    wait "$pid"
    status=$?
    kill -0 "$pid" 2>/dev/null
  do :; done
  echo "$status" >"$at/status"
  kill -KILL 0 # what the program left behind, and this shell
}

# LAUNCH ATTEMPT COMMAND...: starts the attempt, unless it was: gcloud repeats a command whose
# connection broke. Shows the log from there on, and ends with the program's status.
worker_run() {
  local launch=$1 attempt=$2 lines=50 status=76 # 76: its machine went down with it
  shift 2
  if cd ~/mirai-jax/run && [ "$(cat owner)" = "$launch" ]; then
    if mkdir "$attempt" 2>/dev/null; then
      lines=+1
      : >"$attempt/log"
      cat /proc/sys/kernel/random/boot_id >"$attempt/boot"
      setsid bash ~/"$0" worker_attend "$PWD/$attempt" "$@" >/dev/null 2>&1 </dev/null &
      echo "$!" >"$attempt/group"
      disown # its end is told below
      echo "$attempt" >current
    fi
    if worker_is_running; then
      tail -n "$lines" -f -s 0.2 --pid="$(cat "$attempt/group")" "$attempt/log"
    else
      tail -n "$lines" "$attempt/log"
    fi
    [ ! -s "$attempt/status" ] || status=$(cat "$attempt/status")
  fi
  [ "$(cat owner)" = "$launch" ] || status=77
  echo "worker $(hostname) ended with status $status"
  exit "$status"
}

case ${1-} in worker_*)
  "$@"
  exit
  ;;
esac

# Here ---------------------------------------------------------------------------------------------

# The words as a line that any POSIX shell reads as these words.
quoted() {
  local line="" word apostrophe="'\\''"
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      line+=" $word"
    else
      line+=" '${word//\'/$apostrophe}'"
    fi
  done
  printf '%s' "${line# }"
}

run() {
  if $dry_run; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# FUNCTION ARGUMENT...: on every worker, all at once.
on_workers() {
  # gcloud takes the command apart at spaces and ssh joins it again: the login shell of a worker gets
  # this very text.
  run "${tpu[@]}" ssh "$name" "${where[@]}" --worker=all --ssh-flag='-o ServerAliveInterval=30' \
    --command="bash $(quoted "$copy.sh" "$@")" </dev/null
}

# The TPU VM's state; MISSING if there is none, SILENT if Cloud TPU does not answer.
state() {
  local answer
  if answer=$("${tpu[@]}" describe "$name" "${where[@]}" '--format=value(state)' 2>"$scratch/errors"); then
    echo "$answer"
  elif grep -q NOT_FOUND "$scratch/errors"; then
    echo MISSING
  else
    cat "$scratch/errors" >&2
    echo SILENT
  fi
}

create() {
  local flags=(--accelerator-type="$type" --version="$version")
  $spot && flags+=(--spot)
  run "${tpu[@]}" create "$name" "${where[@]}" "${flags[@]}"
}

delete() { run "${tpu[@]}" delete "$name" "${where[@]}"; }

# All that the program needs on the workers, whether they are new, rebooted or as they were.
prepare() {
  run "${tpu[@]}" scp "$scratch/$copy.tar.gz" "$scratch/$copy.sh" "$name:" "${where[@]}" \
    --worker=all || return
  if $claimed; then
    on_workers worker_clear "$launch" || return
  else
    on_workers worker_claim "$launch" "$(quoted "${command[@]}")" || return
  fi
  claimed=true
  on_workers worker_install "$copy.tar.gz" || return
  [ -z "$mount" ] || on_workers worker_mount "${mount%%:*}" "${mount#*:}"
}

# Follows the attempt, starting it if need be; its status is gcloud's, and what the workers say of
# theirs is in the log.
follow() {
  local told=false left=600 status
  set -m # a process group of its own: Ctrl-C is this launcher's to handle
  (on_workers worker_run "$launch" "$launch.$attempt" "${command[@]}" 2>&1 | tee -a "$log") &
  follower=$!
  set +m
  while kill -0 "$follower" 2>/dev/null; do
    nap 5
    if $stopping && ! $told; then
      told=true
      say "stopping: the program saves and ends (Ctrl-C again leaves it alone with that)"
      on_workers worker_stop 300
    fi
    # When one worker has ended, so must the others; a host that hangs would be followed for ever.
    [ -z "$(ended)" ] || left=$((left - 5))
    if [ "$left" -eq 0 ]; then
      say "10 minutes after the first workers, others have not ended"
      kill -- "-$follower"
    fi
  done
  wait "$follower"
  status=$?
  follower=""
  return "$status"
}

# The statuses with which workers ended; gcloud tells one of them, and ends with 1 for reasons of its
# own.
ended() {
  grep -o 'worker [^ ]* ended with status [0-9]*' "$log" | awk '{print $NF}' | sort -nu
}

# SECONDS, or until a signal comes.
nap() {
  sleep "$1" &
  wait $!
}

# WHY: waits, longer each time, until it is time to try again.
again() {
  $stopping && exit 130
  restarts=$((restarts + 1))
  [ "$restarts" -le "$max_restarts" ] ||
    fail 1 "$1; that was it, after $max_restarts restarts that got no further than step $reached"
  local seconds=$((restarts > 6 ? 600 : 5 * 2 ** restarts))
  say "$1: trying again in $seconds s (restart $restarts of $max_restarts)"
  nap "$seconds"
  $stopping && exit 130
}

# WHAT: until the program has run once, what goes wrong is for the user, who is there, to see.
mishap() {
  $stopping && exit 130
  [ "$attempt" -gt 0 ] || fail 1 "$1; see above"
  again "$1"
}

# Returns when there is one that is READY.
have_slice() {
  local now output=$scratch/create
  while now=$(state); [ "$now" != READY ]; do
    $stopping && exit 130
    case $now in
      MISSING | PREEMPTED | TERMINATED)
        $create || fail 1 "the TPU VM $name in $zone is $now; with --create it is made (again)"
        prepared=false
        if [ "$now" != MISSING ]; then
          say "$name is $now: deleting it, to make another"
          delete || {
            mishap "$name cannot be deleted"
            continue
          }
        fi
        say "creating $name: $type in $zone"
        if create 2>&1 | tee "$output"; then
          continue
        elif grep -Eqi 'capacity|exhausted|unavailable|already exists' "$output"; then
          again "no $type to be had"
        else
          mishap "$name cannot be created"
        fi
        ;;
      SILENT) mishap "Cloud TPU does not tell the state of $name" ;;
      *) again "$name is $now" ;;
    esac
  done
}

pack() {
  run git -C "$root" archive --format=tar.gz --output="$scratch/$copy.tar.gz" HEAD ||
    fail 1 "$root is no git repository with a commit: that is what is copied to the workers"
  run cp "${BASH_SOURCE[0]}" "$scratch/$copy.sh"
}

# Flags --------------------------------------------------------------------------------------------

name="" zone="" project="" workdir="" mount="" type="" version="" max_restarts=100
create=false spot=false dry_run=false
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --mount=*) mount=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --max_restarts=*) max_restarts=${1#*=} ;;
    --create) create=true ;;
    --spot) spot=true ;;
    --dry_run) dry_run=true ;;
    --help | -h)
      sed -n '2,/^set /s/^#[ ]\{0,1\}//p' "${BASH_SOURCE[0]}"
      exit
      ;;
    --) break ;;
    *) fail 2 "argument '$1' is not understood; the program's own go after --, and --help tells all" ;;
  esac
  shift
done
[ $# -eq 0 ] || shift

arguments=() config=""
for word; do
  case $word in
    --workdir=*)
      [ -z "$workdir" ] || fail 2 "--workdir is given twice: '$workdir' and '${word#*=}'"
      workdir=${word#*=}
      ;;
    *)
      [[ $word != --config=* ]] || config=${word#*=}
      arguments+=("$word")
      ;;
  esac
done
[ -n "$config" ] || fail 2 "--config is missing; after -- goes --config=configs/mirai_e.py:imagenet_b"
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
  fail 2 "--name is '$name'; it must be a TPU VM's: small letters, digits and hyphens"
[ -n "$zone" ] || fail 2 "--zone is missing; it must be a zone with TPUs, such as us-west4-a"
[[ $workdir == /* ]] ||
  fail 2 "--workdir is '$workdir'; it must be an absolute folder on storage that all hosts see"
[[ -z $mount || $mount =~ ^[a-z0-9][-._a-z0-9]*:/. ]] ||
  fail 2 "--mount is '$mount'; it must be BUCKET:FOLDER, the folder absolute"
[[ $max_restarts =~ ^[0-9]+$ ]] || fail 2 "--max_restarts is '$max_restarts'; it must be a number"
if ! $create && { $spot || [ -n "$type$version" ]; }; then
  fail 2 "--type, --version and --spot have no meaning without --create"
fi
type=${type:-v5litepod-16}
case $type in
  v5litepod-*) version=${version:-v2-alpha-tpuv5-lite} ;;
  v5p-*) version=${version:-v2-alpha-tpuv5} ;;
  v6e-*) version=${version:-v2-alpha-tpuv6e} ;;
  *) version=${version:-tpu-ubuntu2204-base} ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tpu=(gcloud compute tpus tpu-vm)
where=(--zone="$zone" --quiet)
[ -z "$project" ] || where+=(--project="$project")
# A slice says that it has several hosts only when asked: 'on'.
command=(../venv/bin/python -m mirai_jax.main --distributed=on --workdir="$workdir" "${arguments[@]}")
launch=$(date +%Y%m%d-%H%M%S)-$$
copy=mirai-jax-$launch # what is copied to the workers: under a new name, since the old may be in use
attempt=0 restarts=0 reached=0 claimed=false prepared=false stopping=false follower=""

if $dry_run; then
  scratch=/tmp/mirai
  run "${tpu[@]}" describe "$name" "${where[@]}" '--format=value(state)'
  if $create; then
    echo "# where there is none:"
    create
  fi
  pack
  prepare
  on_workers worker_run "$launch" "$launch.1" "${command[@]}"
  echo "# to stop it:"
  on_workers worker_stop 300
  if $create; then
    echo "# where it was preempted, before all of this again:"
    delete
  fi
  exit
fi

command -v gcloud >/dev/null || fail 1 "gcloud is not installed; see cloud.google.com/sdk"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"; [ -z "$follower" ] || kill -- "-$follower" 2>/dev/null' EXIT
trap '$stopping && exit 130; stopping=true' INT TERM
pack
[ -z "$(git -C "$root" status --porcelain --untracked-files=no)" ] ||
  say "uncommitted changes are not copied: the workers get $(git -C "$root" rev-parse --short HEAD)"
mkdir -p "$root/runs/launch/$name" || exit 1

while :; do
  have_slice
  if ! $prepared; then
    say "preparing the workers of $name"
    prepare
    case $? in
      0) prepared=true attempt=$((attempt + 1)) ;;
      77) fail 1 "another launcher has taken $name over" ;;
      78) fail 1 "$name is busy with another command; see above" ;;
      *)
        mishap "the workers of $name cannot be prepared"
        continue
        ;;
    esac
  fi
  $stopping && exit 130
  log=$root/runs/launch/$name/$launch.$attempt.log
  : >>"$log"
  say "attempt $attempt; log: $log"
  follow
  status=$?
  step=$(grep -o 'step *[0-9]*/' "$log" | tr -dc '0-9\n' | sort -n | tail -n 1)
  if [ "${step:-0}" -gt "$reached" ]; then
    restarts=0 reached=$step
  fi

  told=$(ended)
  for one in $told; do
    case $one in
      0 | 75 | 76 | 134 | 137 | 139 | 143) ;; # finished, saved, lost, or killed by a signal
      77) fail 1 "another launcher has taken $name over" ;;
      *) fail "$one" "the program ended with status $one; see above, or $log" ;;
    esac
  done
  if [ "$status" -eq 0 ]; then
    say "finished"
    exit
  elif $stopping; then
    say "stopped; the same command goes on"
    [ "$told" = 75 ] || exit 130
    exit 75
  elif [ -z "$told" ] && [ "$status" -eq 255 ]; then
    again "the connection to $name broke" # the attempt may still run: then it is followed again
  elif [ -z "$told" ]; then
    prepared=false
    again "gcloud ended with status $status"
  else
    prepared=false
    again "the program ended with status ${told//$'\n'/ and }"
  fi
done
