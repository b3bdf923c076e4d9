# Shared by the job scripts, which source it from the root of the repository; docs/slurm.md says what happens when.
set -uo pipefail
asked="" step=""
trap forward USR1 # SLURM announces the time limit (--signal), or someone asks: scancel --batch --signal=USR1 JOB
trap : TERM       # SLURM ends the job and tells the ranks itself; this script waits for them

forward() {
  asked=USR1
  echo "$(date +%T) USR1: the ranks are asked to save and stop"
  [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null
}

# setting NAME VALUE [TRIAL]: NAME as in the environment, else VALUE, or TRIAL with PRESET=llama_9m (a trial on CPUs)
setting() {
  local default=$2
  [ "${PRESET:-}" = llama_9m ] && default=${3-$2}
  printf -v "$1" %s "${!1-$default}"
}

# train FLAGS: all ranks of the allocation, from the newest checkpoint on; then what their exit code asks for
train() {
  setting RUN "runs/$SLURM_JOB_NAME"
  setting DATA data/c4 runs/quickstart/data/shakespeare
  setting TOKENIZER "" runs/quickstart/data/shakespeare.model
  setting SPLIT 969,30,1 95,5,0
  setting DS_CONFIG ds_configs/zero1.json
  setting PRECISION bf16 no-bf16
  setting EVAL_INTERVAL 1000 20
  setting LOG_INTERVAL 10 1
  setting SAVE_INTERVAL 1000 10
  setting SAVE_SECONDS 1800
  setting KEEP_LAST 3
  setting MAX_RESTARTS 3
  [ -e "$RUN/DONE" ] && echo "$RUN/DONE is there: this run is over" && exit 0
  mkdir -p "$RUN" || exit 2
  [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || rm -f "$RUN/failures"

  local gpus=${SLURM_GPUS_ON_NODE:-0}
  local tasks=$((gpus > 0 ? gpus : ${SLURM_NTASKS_PER_NODE:-1}))
  local place=(--ntasks-per-node="$tasks" --cpus-per-task="$((SLURM_CPUS_ON_NODE / tasks))" --wait=60 --immediate=300)
  [ "$gpus" -eq 0 ] || place+=(--gpus-per-node="$gpus")
  # a port of its own for every start: the last one may still be taken
  export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 16 + ${SLURM_RESTART_COUNT:-0}) % 12000))
  unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR
  local command=(python pretrain_llama.py --preset "$PRESET" --ds-config "$DS_CONFIG" "--$PRECISION"
    --train-iters "$TRAIN_ITERS" --lr "$LR" --lr-warmup-iters "$WARMUP" --seq-length "$SEQ_LENGTH"
    --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH"
    --data-path $DATA --split "$SPLIT" ${TOKENIZER:+--tokenizer-model "$TOKENIZER"}
    --log-interval "$LOG_INTERVAL" --eval-interval "$EVAL_INTERVAL" --output-dir "$RUN"
    --save "$RUN/checkpoints" --load auto --keep-last "$KEEP_LAST"
    --save-interval "$SAVE_INTERVAL" --save-seconds "$SAVE_SECONDS")
  echo "$(date +%T) start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, $tasks per node"
  srun "${place[@]}" "${command[@]}" "$@" &
  step=$!
  [ -z "$asked" ] || forward
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a signal ends one wait
  wait "$step"
  finish $?
}

# finish CODE: of the ranks (docs/slurm.md has the table); leaves the script
finish() {
  echo "$(date +%T) the ranks ended with $1${asked:+ after $asked}"
  case $1 in
    0) echo "$TRAIN_ITERS updates" >"$RUN/.DONE" && sync "$RUN/.DONE" && mv "$RUN/.DONE" "$RUN/DONE" ;;
    2) echo "a mistake in the command or the input: not started again" ;;
    75) requeue ;;
    *) if [ -n "$asked" ] || may_fail_again; then requeue; fi ;;
  esac
  exit "$1"
}

# Whether this failure is among the first MAX_RESTARTS since the newest checkpoint
may_fail_again() {
  local count=0 place="" newest
  newest=$(cat "$RUN/checkpoints/latest" 2>/dev/null || echo none)
  [ -e "$RUN/failures" ] && read -r count place <"$RUN/failures"
  [ "$place" = "$newest" ] || count=0
  count=$((count + 1))
  echo "$count $newest" >"$RUN/failures"
  echo "failure $count since checkpoint $newest, $MAX_RESTARTS are survived"
  [ "$count" -le "$MAX_RESTARTS" ]
}

# Back into the queue; not if the job was cancelled, or if SLURM queues it again by itself
requeue() {
  local state
  until state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T); do sleep 10; done # the controller is away
  [ "$state" = RUNNING ] || return
  {
    until scontrol requeue "$SLURM_JOB_ID"; do sleep 10; done
    sleep 60 # until SLURM ends this script
  } &
  wait $!
}
