# Finds a Python, makes .venv beside this folder and installs the project into it; sourced by `llmos` and `test`.
# Afterwards $ROOT/.venv/bin/python is ready. Nothing is done again while what decides it stays the same.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${LLMOS_VENV:-$ROOT/.venv}

fail() {
  echo "llmos: $*" >&2
  exit 78
}

# Prints the first Python >= 3.11 that has venv: the tested versions first. LLMOS_PYTHON overrides the search.
find_python() {
  local candidate without_venv=""
  for candidate in ${LLMOS_PYTHON:-python3.11 python3.12 "$HOME"/.pyenv/versions/3.1[12].*/bin/python python3.13 python3}; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
      echo "$candidate"
      return
    fi
    without_venv=$candidate
  done
  if [ -n "$without_venv" ]; then
    fail "$without_venv lacks the venv module: install it (on Debian and Ubuntu: apt-get install python3-venv)."
  fi
  fail "no Python >= 3.11 was found${LLMOS_PYTHON:+ at LLMOS_PYTHON=$LLMOS_PYTHON}: install one (apt-get install python3.11-venv) or set LLMOS_PYTHON."
}

# Whether TPU chips are attached as newer hosts have them: devices of Google's that are handed to user space.
has_google_vfio() {
  local device
  for device in /sys/bus/pci/drivers/vfio-pci/*/vendor; do
    [ -r "$device" ] && [ "$(cat "$device")" = 0x1ae0 ] && return
  done
  return 1
}

# Prints the extra that the attached hardware needs; LLMOS_EXTRAS (gpu, tpu, or nothing) overrides the look, for a node that
# has none and shares the environment with those that do.
hardware_extra() {
  if [ -n "${LLMOS_EXTRAS+set}" ]; then
    echo "$LLMOS_EXTRAS"
  elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
    echo gpu
  elif compgen -G '/dev/accel[0-9]*' >/dev/null || [ -n "${TPU_ACCELERATOR_TYPE:-}" ] || has_google_vfio; then
    echo tpu
  fi
}

# What an installation depends on; the environment's stamp holds it.
stamp() {
  cat "$ROOT/setup.cfg" "$ROOT"/constraints/*.txt | cksum
  echo "$ROOT $1"
}

# prepare_environment EXTRAS: makes or completes the environment with these extras ("" or "test").
prepare_environment() {
  local wanted="$1" python extras version constraint started=$SECONDS
  extras=$(echo "$wanted $(hardware_extra)" | xargs | tr ' ' ,)
  # An environment for tests serves plain runs too.
  for file in "$VENV/.stamp-$extras" "$VENV/.stamp-test${extras:+,$extras}"; do
    [ -x "$VENV/bin/python" ] && [ -f "$file" ] && [ "$(cat "$file")" = "$(stamp "${file##*.stamp-}")" ] && return
  done
  mkdir -p "$(dirname "$VENV")" && exec 9>"$VENV.lock" || fail "can't write beside $VENV."
  if command -v flock >/dev/null 2>&1; then flock 9; fi
  if [ ! -x "$VENV/bin/python" ] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python) || exit 78
    echo "llmos: making $VENV with $("$python" --version)" >&2
    "$python" -m venv --clear "$VENV" || fail "$python -m venv $VENV failed."
  fi
  version=$("$VENV/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  constraint=$ROOT/constraints/python$version.txt
  [ -f "$constraint" ] || constraint=/dev/null
  echo "llmos: installing ${extras:+extras $extras, }Python $version (log: $VENV/install.log)" >&2
  if ! "$VENV/bin/python" -m pip install --quiet --constraint "$constraint" --editable "$ROOT${extras:+[$extras]}" >"$VENV/install.log" 2>&1; then
    tail -n 5 "$VENV/install.log" >&2
    fail "the installation failed (network? disk?): see $VENV/install.log and run the same command again."
  fi
  stamp "$extras" >"$VENV/.stamp-$extras"
  exec 9>&-
  echo "llmos: ready after $((SECONDS - started)) s" >&2
}
