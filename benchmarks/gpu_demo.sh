#!/usr/bin/env bash
# emoji64 on one CUDA GPU, from the font to the table of 06, in under nine minutes. The two trainings of the preset's
# 20,000 steps are stopped when their time is over; 05 samples from the last save. Repeated in the same folder, the
# trainings go on from their last save, and everything behind them runs again.
#
#   bash benchmarks/gpu_demo.sh                                # in runs/gpu_demo
#   TIME=3000 SAVE=500 bash benchmarks/gpu_demo.sh runs/long   # 50 minutes in all, a save every 500 steps
#   STEPS=4000 bash benchmarks/gpu_demo.sh runs/short          # a schedule that ends sooner; it cannot change later
#   bash benchmarks/gpu_demo.sh runs/try --device cpu          # without a GPU: 120 digits, the network of tests/small.py
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/gpu_demo device=cuda
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2; shift 2 ;;
        *) run=$1; shift ;;
    esac
done
export PYTHONPATH=$PWD
python=${PYTHON:-python}
if [ "$device" = cpu ]; then
    preset=digits16 time=${TIME:-120} ending=40 images=$run/images
    script="$python tests/small.py 0" how="--batch 4 --steps ${STEPS:-40} --save-every ${SAVE:-20}"
else
    preset=emoji64 time=${TIME:-510} ending=100 images=data/openmoji
    script=$python how="--steps ${STEPS:-20000} --save-every ${SAVE:-250} --workers $(($(nproc) > 8 ? 8 : $(nproc) - 1))"
fi

if [ "$device" = cpu ] && [ ! -d "$images" ]; then
    $python -m examples.digits --out "$run/digits"
    mkdir "$images"
    (cd "$images" && ln -s ../digits/train/00* .)                      # 10 pages of 12
elif [ ! -d "$images" ]; then
    $python -m examples.openmoji --out "$images"
fi
if [ ! -f "$run/data.json" ]; then
    $script 01_embed.py --preset $preset --images "$images" --out "$run" --device "$device"
fi
if [ ! -f "$run/pairs.npy" ]; then
    $script 02_filter_pairs.py --data "$run"
fi

# SCRIPT NAME SHARES: trains for one of so many shares of the time that is left
train() {
    local left=$(((time - ending - SECONDS) / $3))
    timeout --foreground $((left > 5 ? left : 5)) $script "$1" --data "$run" --device "$device" $how || [ $? = 124 ]
    local trained=$2.pt
    [ -f "$run/$trained" ] || trained=$2.pt.partial                    # a whole checkpoint, too
    if [ ! -f "$run/$trained" ]; then
        echo "error: $1 was stopped before its first save; repeat with more time (TIME=$((2 * time))) or a smaller SAVE" >&2
        exit 2
    fi
    mkdir -p "$run/last"
    ln -sf "../$trained" "$run/last/$2.pt"
}
train 03_train_recon.py recon 2
train 04_train_pairs.py pairs 1

for model in recon pairs; do
    out=$run/samples/${model}_w1
    beside=$([ $model = recon ] || echo "--beside $run/samples/recon_w1")
    $script 05_sample.py --data "$run" --checkpoint "$run/last/$model.pt" --guidance 1 --out "$out" --device "$device" $beside
    $script 01_embed.py --data "$run" --images "$out/samples.npy" --out "$out" --cls-only --device "$device"
done
$script 06_fewshot_metrics.py --data "$run" --device "$device"
grep '"step"' "$run"/samples/*/samples.json
echo "The sheet: $run/samples/pairs_w1/sheet.png (condition | reconstruction | pairs)"
if [ $preset = emoji64 ]; then
    echo "OpenMoji (openmoji.org), CC BY-SA 4.0. The model has 52 million parameters for 1,170 training pictures."
fi
echo "memorisation well below 1: samples lie nearer to training pictures than held-out pictures do; the model repeats them"
echo "$SECONDS s. The same command trains on."
