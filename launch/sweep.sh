#!/usr/bin/env bash
# A sweep on Ray, its jobs side by side: bash launch/sweep.sh STAGE key=a,b [more overrides]
#   bash launch/sweep.sh pretrain model.width=64,128 train.optim.lr=1e-3,2e-3
#   bash launch/sweep.sh tau [overrides]     the paper's Table 11: SA-GCPO's temperature of the negatives around that of the positives
# On a running cluster add cluster=running. Jobs take what run_dir already holds and fits; each writes its own folder under multirun/.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if [ "${1:-}" = tau ]; then
  shift
  set -- align align.objective.name=sa_gcpo align.objective.tau_positive=1.0 align.objective.tau_negative=1.05,1.0,0.95 "$@"
fi
[ $# -ge 2 ] || fail "expected a stage and what to sweep: bash launch/sweep.sh pretrain model.width=64,128"
set_up
cd "$ROOT"
stage="$1"
shift
"$VENV/bin/oxyray" "$stage" -m hydra/launcher=ray "$@"
