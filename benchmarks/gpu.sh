#!/usr/bin/env bash
# Everything that a GPU must show, in one command: benchmarks/gpu.sh [PYTHON] [DATA]. Without a GPU it runs small on the CPU.
# 1. whole runs beside the bare network, and 20 steps of every recipe in which the host may not wait for the GPU
# 2. the published step beside ours   3. settings that pay: bf16, channels-last, compile, checkpointing, batch size
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python} data=${2:-PhantomDataModule}
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    sizes="96 128" side=96 minutes=10 recipes="" precision=bf16-mixed
else
    echo "There is no GPU here: a small run on the CPU, which only shows that the commands work."
    sizes=32 side=32 minutes=0 recipes="longitudinal_infonce" precision=32-true
fi
export PYTHONPATH=benchmarks
for size in $sizes; do
    # shellcheck disable=SC2086
    "$python" benchmarks/bench_end_to_end.py --size "$size" --data "$data" --syncs $recipes
done
"$python" benchmarks/bench_published.py "$side" 1 1
"$python" -m lssl tune --config longitudinal_infonce --data "$data" --views.size "$side" \
    --trainer.precision "$precision" --minutes "$minutes"
