#!/usr/bin/env bash
# Everything that needs one CUDA GPU, in under nine minutes: checks, speed, memory (python -m benchmarks.gpu --help).
# Writes runs/gpu/CARD.json and the section "On a GPU" of docs/benchmarks.md. Repeated, it measures what is missing.
#
#   bash benchmarks/gpu.sh
#   bash benchmarks/gpu.sh --device cpu        # a try without a GPU, tiny sizes; writes no page
set -euo pipefail
cd "$(dirname "$0")/.."
case " $* " in
    *" cpu "* | *" --write "*) ;;
    *) set -- --write docs/benchmarks.md "$@" ;;
esac
"${PYTHON:-python}" -m benchmarks.gpu "$@"
