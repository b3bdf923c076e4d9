#!/usr/bin/env bash
# From pre-training to comparison: small models by every method on enwik8 at equal tokens, exported to Hugging Face,
# fine-tuned on movie-review snippets; one table and one picture of held-out bits per byte beside the task.
#
#     tools/compare_methods.sh                                   about seven hours on a CPU core, by shorter runs
#     ITERS=100 RATES=1 SEEDS="1 2" EXAMPLES=1500 EPOCHS=3 tools/compare_methods.sh
#
# What is finished is kept in OUT: the same command goes on where it stopped. VENV is where `make install` put Python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

METHODS=${METHODS:-full lora switchlora relora golore lte} # of benchmarks/enwik8.py
RATES=${RATES:-2}                                          # learning rates tried of each, 1 or 2
ITERS=${ITERS:-1500}                                       # updates of 4096 tokens
SEEDS=${SEEDS:-1 2 3}                                      # of the fine-tuning
EXAMPLES=${EXAMPLES:-9065}                                 # to fine-tune on, of 9,065
EPOCHS=${EPOCHS:-5}
LR=${LR:-3e-4} # of the fine-tuning: the models are small
LENGTH=${LENGTH:-128}
DATA=${DATA:-data/enwik8_2048}
REVIEWS=${REVIEWS:-data/reviews}
CACHE=${CACHE:-.cache}
OUT=${OUT:-runs/compare_$ITERS}
VENV=${VENV:-.venv}
PYTHON=$VENV/bin/python
[ -x "$PYTHON" ] || PYTHON=python3
read -ra methods <<<"$METHODS"
read -ra seeds <<<"$SEEDS"

[ -e "$DATA/enwik8.bin" ] || "$PYTHON" tools/prepare_enwik8.py --out "$DATA" --vocab-size 2048 --cache "$CACHE"
[ -e "$REVIEWS/train.jsonl" ] || "$PYTHON" tools/prepare_reviews.py "$REVIEWS" --cache "$CACHE"

"$PYTHON" benchmarks/enwik8.py --data "$DATA/enwik8" --out "$OUT/pretrain" --methods "${methods[@]}" --seeds 0 \
  --iters "$ITERS" --rates "$RATES" --save

listed=$("$PYTHON" tools/compare_methods.py models "$OUT/pretrain")
models=()
while read -r name folder; do
  exported=$OUT/hf/$(basename "$folder")
  models+=("$name=$exported")
  [ -e "$exported" ] || "$PYTHON" tools/convert_hf.py to-hf "$folder/checkpoints" "$exported"
done <<<"$listed"

"$PYTHON" tools/finetune_glue.py "${models[@]}" --tasks "$REVIEWS" --seeds "${seeds[@]}" --epochs "$EPOCHS" --lr "$LR" \
  --max-length "$LENGTH" --train-examples "$EXAMPLES" --output "$OUT/glue"
"$PYTHON" tools/compare_methods.py table "$OUT/pretrain" "$OUT/glue" --out "$OUT"
