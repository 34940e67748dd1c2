#!/usr/bin/env bash
# emoji64 on one CUDA GPU, from the font to the table of 06, in under nine minutes. The two trainings of the preset's
# 20,000 steps are stopped when their time is over; 05 samples from the last save. Repeated in the same folder, the
# trainings go on from their last save, and everything behind them runs again.
#
#   bash benchmarks/gpu_demo.sh                                # in runs/gpu_demo
#   TIME=3000 SAVE=500 bash benchmarks/gpu_demo.sh runs/long   # 50 minutes in all, a save every 500 steps
#   STEPS=4000 bash benchmarks/gpu_demo.sh runs/short          # a schedule that ends sooner; it cannot change later
#   MODELS=pairs bash benchmarks/gpu_demo.sh                   # all of the time for 04
#   bash benchmarks/gpu_demo.sh runs/try --device cpu          # without a GPU: 120 digits, the network of tests/small.py
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/gpu_demo device=cuda models=${MODELS:-recon pairs}
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2; shift 2 ;;
        *) run=$1; shift ;;
    esac
done
export PYTHONPATH=$PWD
python=${PYTHON:-python}
time=${TIME:-510} ending=100                                           # seconds; ending: for 05, 01 and 06, a guess
if [ "$device" = cpu ]; then
    preset=digits16 images=$run/images
    script="$python tests/small.py 0" how="--batch 4 --steps ${STEPS:-40} --save-every ${SAVE:-20}"
else
    preset=emoji64 images=data/openmoji
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

# each training gets its share of the time that is left, and ends there; its last save is a whole checkpoint
mkdir -p "$run/last"
shares=$(wc -w <<< "$models")
for model in $models; do
    stage=$([ "$model" = recon ] && echo 03_train_recon.py || echo 04_train_pairs.py)
    left=$(((time - ending - SECONDS) / shares))
    timeout --foreground $((left > 5 ? left : 5)) $script $stage --data "$run" --device "$device" $how || [ $? = 124 ]
    trained=$model.pt
    [ -f "$run/$trained" ] || trained=$model.pt.partial
    if [ ! -f "$run/$trained" ]; then
        echo "error: $stage was stopped before its first save; give it more time (TIME=$((2 * time))) or a smaller SAVE" >&2
        exit 2
    fi
    ln -sf "../$trained" "$run/last/$model.pt"
    shares=$((shares - 1))
done

beside=
for model in $models; do
    out=$run/samples/${model}_w1
    $script 05_sample.py --data "$run" --checkpoint "$run/last/$model.pt" --guidance 1 --out "$out" --device "$device" $beside
    $script 01_embed.py --data "$run" --images "$out/samples.npy" --out "$out" --cls-only --device "$device"
    beside="--beside $out"
done
$script 06_fewshot_metrics.py --data "$run" --device "$device"
grep '"step"' "$run"/samples/*/samples.json
echo "The sheet: $out/sheet.png (condition | samples of: $models)"
if [ $preset = emoji64 ]; then
    echo "OpenMoji (openmoji.org), CC BY-SA 4.0. The model has 52 million parameters for 1,170 training pictures."
fi
echo "memorisation well below 1: samples lie nearer to training pictures than held-out pictures do; the model repeats them"
echo "$SECONDS s. The same command trains on."
