#!/bin/sh
# Makes .venv with the locked development environment, by whatever is there: uv, or a Python 3.12 to 3.14 with pip or venv.
# Does nothing when .venv was made in this folder from this pyproject.toml and uv.lock.
set -eu
cd "$(dirname "$0")/.."

stamp=.venv/.made-from
here=$(pwd -P)
wanted="$(cat pyproject.toml uv.lock | cksum)
$here"
if [ -x .venv/bin/python ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

# A name on PATH proves nothing (an old default, a pyenv shim with no version behind it): ask each to run.
# The lock holds no wheels for a CPython newer than 3.14, for its free-threaded builds, or for other Pythons.
fits() {
    "$1" -c '
import importlib.util, sys
known = sys.implementation.name == "cpython" and (3, 12) <= sys.version_info[:2] <= (3, 14) and "t" not in sys.abiflags
sys.exit(not (known and any(map(importlib.util.find_spec, sys.argv[1].split()))))' "$2" >/dev/null 2>&1
}

# Of those that have one of the modules named: first by name on PATH, then where version managers keep theirs.
find_python() {
    for name in python3.12 python3.13 python3.14 python3 python; do
        path=$(command -v "$name" 2>/dev/null) || continue
        if fits "$path" "$1"; then
            echo "$path"
            return
        fi
    done
    for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python "$HOME"/.local/share/uv/python/*/bin/python \
        "$HOME"/.local/share/mise/installs/python/*/bin/python "$HOME"/.asdf/installs/python/*/bin/python; do
        if fits "$path" "$1"; then
            echo "$path"
            return
        fi
    done
    return 1
}

# Its installer writes to ~/.local/bin, which a shell that was open by then has not on its PATH.
find_uv() {
    for uv in "$(command -v uv 2>/dev/null)" "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv" .venv-uv/bin/uv; do
        if "$uv" --version >/dev/null 2>&1; then
            echo "$uv"
            return
        fi
    done
    return 1
}

if uv=$(find_uv); then
    # uv fetches a Python where none is found.
    python=$(find_python sys) || python=3.12
    echo "setting up .venv with $uv (once; some 1.5 GB)"
elif python=$(find_python "ensurepip pip"); then
    echo "setting up .venv with $python (once; some 1.5 GB)"
    # uv by pip, in a place of its own, so that the lock file is obeyed here too.
    rm -rf .venv-uv
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv .venv-uv
        .venv-uv/bin/python -m pip install --quiet --disable-pip-version-check uv
    else
        # Debian and its kin split venv off Python; a target folder is nobody's environment, so pip may write there.
        PIP_USER=0 "$python" -m pip install --quiet --disable-pip-version-check --target .venv-uv uv
    fi
    uv=.venv-uv/bin/uv
else
    found=$(python3 --version 2>&1) || found="not there"
    echo "setup: needs uv, or Python 3.12 to 3.14 with pip, and found neither (python3 is: $found); get uv by \`curl -LsSf https://astral.sh/uv/install.sh | sh\` (https://docs.astral.sh/uv/) or Python from https://www.python.org/downloads/, then run this again" >&2
    exit 1
fi
# A copied or moved .venv still runs, but its package and its commands are the other folder's.
if [ -f "$stamp" ] && { read -r _ && read -r folder; } <"$stamp" && [ "$folder" != "$here" ]; then
    rm -rf .venv
fi
# Before, not after: were this run cut short, the old stamp would call a half-changed .venv complete once the lock is put back.
rm -f "$stamp"
if ! UV_PROJECT_ENVIRONMENT=.venv "$uv" sync --quiet --frozen --extra dev --python "$python"; then
    if [ "$python" = 3.12 ]; then
        echo "setup: no Python 3.12 to 3.14 found, so uv had to fetch one; where it cannot, get one from https://www.python.org/downloads/, then run this again" >&2
    fi
    exit 1
fi
echo "$wanted" >"$stamp"
