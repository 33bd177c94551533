#!/usr/bin/env bash
# A stage as a job on a running Ray cluster: bash launch/ray_job.sh [--address http://HEAD:8265] [--dry-run] STAGE [overrides]
#   bash launch/ray_job.sh run data=mall run_dir=/shared/runs/mall
#   bash launch/ray_job.sh --dry-run pretrain run_dir=/shared/runs/mall     what would be uploaded, and what the overrides would miss
# The checkout is uploaded and the stage joins the cluster. The log is followed to the end, and the job's exit status is this command's.
# The address is else RAY_API_SERVER_ADDRESS, else this machine's; the token RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

address="${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}"
dry_run=
while [ $# -gt 0 ]; do
  case "$1" in
    --address) [ $# -ge 2 ] || fail "--address: expected http://HEAD:8265 after it"; address="$2"; shift 2 ;;
    --address=*) address="${1#*=}"; shift ;;
    --dry-run) dry_run=yes; shift ;;
    *) break ;;
  esac
done
[ $# -ge 1 ] && [[ "$1" != -* ]] || fail "expected a stage: bash launch/ray_job.sh [--address URL] [--dry-run] STAGE [overrides]"
[[ "$address" == *://* ]] || address="http://$address"
[ -x "$VENV/bin/ray" ] || set_up  # what is there stays as it is: it may be running on a cluster
cd "$ROOT"

joins=(cluster.address=auto)
[ "$1" != recommend ] || joins=()  # it uses the configuration of the run
for word in "$@"; do
  case "$word" in cluster=* | cluster.address=*) joins=() ;; esac
done

asked="$address"
[ -z "$dry_run" ] || asked=
found="$("$VENV/bin/python" -m oxyray.cluster.upload check "$asked" "$@")" || exit $?
mode="${found%%$'\n'*}"
environment="${found#*$'\n'}"
# Ray sets OMP_NUM_THREADS=1 for a job's command, as for every process that reserves no cores, and its own work would keep to one core.
command=(sh -c '[ "$OMP_NUM_THREADS" != 1 ] || unset OMP_NUM_THREADS; exec python -m oxyray "$@"' oxyray "$@" "${joins[@]}")
if [ -n "$dry_run" ]; then
  say "would run on the cluster: python -m oxyray $* ${joins[*]}"
  exit 0
fi

job="oxyray-$1-$(date +%Y%m%d-%H%M%S)-$$"
export RAY_API_SERVER_ADDRESS="$address" RAY_AUTH_MODE="$mode"
unset RAY_ADDRESS  # Ray would take it before any --address
how="RAY_API_SERVER_ADDRESS=$address RAY_AUTH_MODE=$mode $VENV/bin/ray job"
interrupted() {
  say
  say "no longer following; the job itself goes on, if it was submitted:"
  say "  follow it again:  $how logs --follow $job"
  say "  stop it:          $how stop $job"
  exit 130
}
trap interrupted INT
say "job $job on $address (Ctrl-C leaves it running)"
"$VENV/bin/ray" job submit --submission-id "$job" --runtime-env-json "$environment" -- "${command[@]}" || true  # how it ended is asked next
"$VENV/bin/python" -m oxyray.cluster.upload end "$address" "$job"
