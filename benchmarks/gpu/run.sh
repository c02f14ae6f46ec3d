#!/usr/bin/env bash
# Everything there is to learn on a machine with a GPU, in at most 8 minutes: see run.py. Runs from the source tree with
# whatever python3 has (PYTHON=... chooses another one); nothing is installed and no network is needed.
#
#   benchmarks/gpu/run.sh [--out FOLDER] [--shapes real|tiny] [--seconds 480] [--only PART,PART]
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
export PYTHONPATH="$root/src:$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" "$root/benchmarks/gpu/run.py" "$@"
