#!/usr/bin/env bash
# The main job on this machine: sets up .venv if need be, then goes from the embedded shop's logs to a report.
#   bash launch/local.sh                                     the shop called mall
#   bash launch/local.sh data=amazon_beauty data.path=DIR    any words of `oxyray run`
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up
cd "$ROOT"
"$VENV/bin/oxyray" run "$@"
