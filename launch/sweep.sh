#!/usr/bin/env bash
# A sweep on Ray, its jobs side by side: bash launch/sweep.sh STAGE key=a,b [more overrides]
#   bash launch/sweep.sh pretrain model.width=64,128 train.optim.lr=1e-3,2e-3
# On a running cluster add cluster=running. Jobs take what run_dir already holds and fits; each writes its own folder under multirun/.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
[ $# -ge 2 ] || fail "expected a stage and what to sweep: bash launch/sweep.sh pretrain model.width=64,128"
set_up
cd "$ROOT"
stage="$1"
shift
"$VENV/bin/oxyray" "$stage" -m hydra/launcher=ray "$@"
