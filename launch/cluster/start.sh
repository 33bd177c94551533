#!/usr/bin/env bash
# Ray by hand on plain machines, with token authentication: on the head first, then on every other machine.
#   bash launch/cluster/start.sh               the head
#   bash launch/cluster/start.sh HEAD[:6379]   another machine joins it
# Words that begin with a dash go to `ray start` as they are (--num-gpus=8, --node-ip-address=10.0.0.5, --block, ...). Every machine needs this
# checkout with the same pins. OXYRAY_SHM_GB=64 asks for that much free shared memory (default 2). `.venv/bin/ray stop` ends it on a machine.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"

head=
case "${1:-}" in "" | -*) ;; *) head="$1"; shift ;; esac
[[ -z "$head" || "$head" == *:* ]] || head="$head:6379"
[ -x "$VENV/bin/ray" ] || set_up  # what is there stays as it is: it may be in use

# Ray's objects, NCCL's rings and the published tables lie in shared memory. What is missing there goes to a disk, or ends a worker.
check_shared_memory() {
  local free least="${OXYRAY_SHM_GB:-2}"
  free="$(df -k --output=avail /dev/shm 2>/dev/null | tail -n 1)" || free=0
  if [ "${free:-0}" -lt $((least * 1024 * 1024)) ]; then
    fail "/dev/shm has $((${free:-0} / 1024)) MiB free of the $((least * 1024)) asked for: mount -o remount,size=${least}G /dev/shm (docker: --shm-size), or lower OXYRAY_SHM_GB"
  fi
  say "shared memory: $((free / 1024)) MiB free in /dev/shm"
}

# The head makes a token unless it has one; another machine copies the head's over ssh unless it has one.
bring_token() (  # in a shell of its own, for the umask
  to="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" from="${head%:*}"
  if [ -n "${RAY_AUTH_TOKEN:-}" ] || [ -s "$to" ]; then exit 0; fi
  umask 077
  mkdir -p "$(dirname "$to")"
  if [ -z "$head" ]; then
    "$VENV/bin/python" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$to.part"
    say "made a token in $to"
  elif ! ssh -o BatchMode=yes -o ConnectTimeout=10 "$from" cat .ray/auth_token >"$to.part" || ! [ -s "$to.part" ]; then
    rm -f "$to.part"
    fail "the head's token could not be copied: run \`scp $from:.ray/auth_token $to\`, or set RAY_AUTH_TOKEN to the head's"
  fi
  mv "$to.part" "$to"
)

check_shared_memory
bring_token
export RAY_AUTH_MODE=token
export PATH="$VENV/bin:$PATH"  # jobs say `python`
unset RAY_ADDRESS
if [ -n "$head" ]; then
  exec "$VENV/bin/ray" start --address="$head" --disable-usage-stats "$@"
fi
say "other machines:  bash launch/cluster/start.sh HEAD   (HEAD: this machine's name or address as they reach it; the token comes over ssh)"
say "a job from here: bash launch/ray_job.sh run run_dir=/shared/runs/mall   (from elsewhere first: ssh -N -L 8265:127.0.0.1:8265 HEAD)"
exec "$VENV/bin/ray" start --head --disable-usage-stats "$@"
