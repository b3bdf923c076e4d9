#!/bin/bash
#SBATCH --job-name=lora_350m
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# LoRA without switching on LLaMA 350M, the lower baseline:   sbatch slurm/lora_350m.sh
# A trial on CPUs:   PRESET=llama_9m TRAIN_ITERS=40 sbatch slurm/lora_350m.sh
#
# Source: run_lora_350m.sh in the code of Zhou et al. 2024 (arXiv 2406.06564): C4 in samples of 512 tokens, 40000
# updates of 1152 samples on 8 GPUs, rank 256, started as SwitchLoRA is, learning rate 1e-2, cosine after 100 updates
# of warm-up, Adam 0.9 and 0.999, clipping at 1, no weight decay, no dropout.

# Second column: the published run. Third: with PRESET=llama_9m. A variable of the environment wins over both.
source slurm/common.sh || exit 2
setting PRESET llama_350m
setting TRAIN_ITERS 40000 40
setting LORA_RANK 256 16
setting LR 1e-2
setting WARMUP 100 4
setting SEQ_LENGTH 512 128
setting MICRO_BATCH 72 4
setting GLOBAL_BATCH 1152 32

train --method lora --lora-rank "$LORA_RANK" --lr-decay-style cosine --clip-grad 1
