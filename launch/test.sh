#!/usr/bin/env bash
# Sets up .venv with the test tools if need be, then checks format, lint, types, floors and behaviour.
#   bash launch/test.sh                    everything
#   bash launch/test.sh tests/data -k csv  any pytest arguments (the other checks run too)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up test
cd "$ROOT"

# The report is opened in a real browser; where there is none and none can be had, that test is skipped.
if ! command -v chromium >/dev/null && ! command -v google-chrome >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  say "installing chromium"
  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends chromium; } >/dev/null 2>&1 || say "chromium could not be installed: its test is skipped"
fi

export OMP_NUM_THREADS=1 PYTHONHASHSEED=0 WANDB_MODE=offline HF_HUB_OFFLINE=1
unset RAY_ADDRESS
"$VENV/bin/ruff" check
"$VENV/bin/ruff" format --check
"$VENV/bin/lint-imports"
"$VENV/bin/mypy" >"$VENV/mypy.log" 2>&1 & typed=$!  # beside the tests, which mostly wait
# Two files at a time, the slow ones first (tests/conftest.py), so that neither process is left with a long one.
passed=0
"$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10 "$@" || passed=$?
wait "$typed" || { cat "$VENV/mypy.log" >&2; fail "mypy found the above"; }
tail -n 1 "$VENV/mypy.log"
exit "$passed"
