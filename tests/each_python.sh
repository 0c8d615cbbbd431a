#!/usr/bin/env bash
# Runs the fast tests on each of Python 3.11, 3.12 and 3.13 that this machine has, each in its own
# .venv-VERSION. Exit 0 if all of them pass and there are at least two.
set -euo pipefail
cd "$(dirname "$0")/.."

find_python() { # a python of version $1 that really runs, on PATH or under pyenv
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python3; do
        if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

passed=() failed=() absent=()
for version in 3.11 3.12 3.13; do
    python=$(find_python "$version")
    if [ -z "$python" ]; then
        absent+=("$version")
        continue
    fi
    echo "== Python $version: $python"
    [ -d ".venv-$version" ] || "$python" -m venv ".venv-$version"
    if ".venv-$version/bin/pip" install -q -e '.[dev]' &&
        ".venv-$version/bin/python" -m pytest -q -n 2 &&
        ".venv-$version/bin/python" -m pytest -q -n 2 --devices 8 tests/eight_devices; then
        passed+=("$version")
    else
        failed+=("$version")
    fi
done
echo "passed: ${passed[*]:-none}; failed: ${failed[*]:-none}; not on this machine: ${absent[*]:-none}"
[ ${#failed[@]} -eq 0 ] && [ ${#passed[@]} -ge 2 ]
