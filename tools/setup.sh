#!/bin/sh
# Makes .venv with the locked development environment, by whatever is there: uv, or any Python >= 3.12 with pip.
# Does nothing when pyproject.toml and uv.lock are those that .venv was made from.
set -eu
cd "$(dirname "$0")/.."

stamp=.venv/.made-from
wanted=$(cat pyproject.toml uv.lock | cksum)
if [ -x .venv/bin/python ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

# A name on PATH proves nothing (an old default, a pyenv shim with no version behind it): ask each to run.
recent() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    for name in python3.14 python3.13 python3.12 python3 python; do
        path=$(command -v "$name" 2>/dev/null) || continue
        if recent "$path"; then
            echo "$path"
            return
        fi
    done
    for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python; do
        if recent "$path"; then
            echo "$path"
            return
        fi
    done
    return 1
}

echo "setting up .venv (once; some 1.5 GB)"
if command -v uv >/dev/null 2>&1; then
    # uv takes a Python it finds, and fetches one where there is none.
    uv=uv
    python=$(find_python) || python=3.12
else
    if ! python=$(find_python); then
        echo "setup: no Python >= 3.12 and no uv found; get uv (https://docs.astral.sh/uv/getting-started/installation/) or Python 3.12+ (https://www.python.org/downloads/), then run this again" >&2
        exit 1
    fi
    # uv by pip, in a place of its own, so that the lock file is obeyed here too.
    if ! [ -x .venv-uv/bin/uv ]; then
        rm -rf .venv-uv
        "$python" -m venv .venv-uv
        .venv-uv/bin/python -m pip install --quiet --disable-pip-version-check uv
    fi
    uv=.venv-uv/bin/uv
fi
UV_PROJECT_ENVIRONMENT=.venv "$uv" sync --quiet --frozen --extra dev --python "$python"
echo "$wanted" >"$stamp"
