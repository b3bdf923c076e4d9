#!/bin/bash
#SBATCH --job-name=relora_1b
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# ReLoRA on LLaMA 1.3B. It wants a start of full rank, WARM_START, a folder of checkpoints; without it, it starts cold:
#   RUN=runs/full_start TRAIN_ITERS=10000 sbatch slurm/full_1b.sh
#   WARM_START=runs/full_start/checkpoints sbatch slurm/relora_1b.sh
# A trial on CPUs:   PRESET=llama_9m TRAIN_ITERS=40 sbatch slurm/relora_1b.sh
#
# Source: the configuration for 1B in the code of Lialin et al. 2023 (arXiv 2307.05695): rank 128, merges every 1000
# updates, the smallest 80 % of the moments zeroed, 130000 updates of 1024 samples of 2048 tokens, learning rate 4e-4
# down to a tenth, 500 updates of warm-up and 100 after every merge, Adam 0.9 and 0.95, weight decay 0.01. That run
# goes on from update 1000 of a Pythia on the Pile; the shape and the text here are those of the paper: LLaMA on C4.

# Second column: the published run. Third: with PRESET=llama_9m. A variable of the environment wins over both.
source slurm/common.sh || exit 2
setting PRESET llama_1b
setting TRAIN_ITERS 130000 40
setting LORA_RANK 128 16
setting INTERVAL 1000 10
setting LR 4e-4 2e-3
setting MIN_LR 4e-5 2e-4
setting WARMUP 500 4
setting RESTART_WARMUP 100 2
setting SEQ_LENGTH 2048 128
setting MICRO_BATCH 4
setting GLOBAL_BATCH 1024 32
setting WARM_START ""

train --method relora --lora-rank "$LORA_RANK" --relora-interval "$INTERVAL" \
  --relora-reset magnitude --relora-prune-ratio 0.8 --lr-decay-style cosine_restarts --min-lr "$MIN_LR" \
  --lr-restart-warmup-iters "$RESTART_WARMUP" --adam-beta2 0.95 --weight-decay 0.01 --clip-grad 1 \
  ${WARM_START:+--load "$WARM_START" --finetune}
