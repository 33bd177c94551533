# Sourced by the other scripts: makes .venv with the pinned set that works together, once. `set_up` for running, `set_up test` for the tests too.
# A second call finds everything as it was and returns at once, without asking pip or the network.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }

find_python() {
  local name
  for name in ${OXYRAY_PYTHON:-} python3.11 python3.12 python3 python; do
    if "$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; then
      command -v "$name"
      return
    fi
  done
  fail "Python 3.11 or 3.12 with venv is needed, and none was found (on Debian or Ubuntu: apt install python3.11-venv); OXYRAY_PYTHON=/path names one"
}

pip_install() {  # quiet, as pip warns of what is meant (torchrec's own list); what it said is shown when it fails
  if ! "$VENV/bin/pip" install --no-compile "$@" >"$VENV/setup.log" 2>&1; then
    tail -n 20 "$VENV/setup.log" >&2
    fail "pip install $* failed, see above and $VENV/setup.log"
  fi
}

# A whole list by uv, which does pip's work in a fifth of the time; by pip where uv cannot be had or cannot reach what pip can.
install_list() {
  if [ ! -x "$VENV/bin/uv" ]; then
    "$VENV/bin/pip" install --retries 0 --timeout 10 --no-deps --require-hashes -r "$ROOT/launch/requirements-uv.txt" >"$VENV/setup.log" 2>&1 || true
  fi
  "$VENV/bin/uv" pip install --python "$VENV/bin/python" --no-deps --require-hashes -r "$1" >"$VENV/setup.log" 2>&1 ||
    pip_install --no-deps --require-hashes -r "$1"
}

device() {
  if nvidia-smi -L 2>/dev/null | grep -q GPU; then echo cuda; else echo cpu; fi
}

install_torch_cpu() {  # the CPU build's own index where it answers, else whatever pip is configured with
  local version index=https://download.pytorch.org/whl/cpu
  version="$(sed -n 's/^ *"torch==\([^"]*\)",$/\1/p' "$ROOT/pyproject.toml")"
  if curl -sfI -m 5 "$index/torch/" >/dev/null 2>&1; then
    pip_install --index-url "$index" "torch==$version"
  else
    pip_install "torch==$version"
  fi
}

set_up() {
  local device python
  device="$(device)"
  mkdir -p "$VENV"
  exec 9>"$ROOT/.venv.lock"
  flock 9 || fail "could not lock $ROOT/.venv.lock"
  layer run "$device" "$ROOT/launch/requirements-$device.txt"
  [ "${1:-run}" = test ] && layer test "$device" "$ROOT/launch/requirements-test.txt"
  exec 9>&-
}

# layer NAME DEVICE LIST: install LIST unless the mark of this layer says that it is there already.
layer() {
  local name="$1" device="$2" list="$3" mark="$VENV/.ready-$1" want
  want="$device $(cat "$list" "$ROOT/pyproject.toml" "$ROOT/launch/setup.sh" | sha256sum | cut -d' ' -f1) $ROOT"
  [ "$(cat "$mark" 2>/dev/null)" = "$want" ] && return
  if [ ! -x "$VENV/bin/pip" ] || { [ -f "$mark" ] && [ "$(cut -d' ' -f1 "$mark")" != "$device" ]; }; then
    python="$(find_python)" || exit 1
    say "making .venv for $device with $("$python" --version); the first set-up downloads some 2 GB at most and takes minutes"
    "$python" -m venv --clear "$VENV" || fail "could not make $VENV: is there space on the disk?"
  fi
  say "installing launch/$(basename "$list"): $(grep -c '^[a-z]' "$list") packages"
  DS_BUILD_OPS=0 install_list "$list"
  if [ "$name" = run ]; then
    if [ "$device" = cpu ]; then install_torch_cpu; fi
    pip_install --no-deps --no-build-isolation --editable "$ROOT"
  fi
  # Compiled here, on all cores; what is hardly ever imported is left out. Some files are templates, or of another Python, and do not compile.
  "$VENV/bin/python" -m compileall -qq -j 0 -x '/tests?/|/transformers/models/(?!auto|bert|clip|__init__)|/sympy/(physics|plotting)/' "$VENV/lib" >>"$VENV/setup.log" 2>&1 || true
  printf '%s\n' "$want" >"$mark"
}
