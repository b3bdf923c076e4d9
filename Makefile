# make pretrain   everything from nothing to a pre-trained LLaMA, its loss curve and a checkpoint
# make test       the test suite            make check   lint and type check
# make test-all   every case of the large tables, for instance every method under every layout for every family
# make test-slurm the job scripts on a SLURM cluster that the tests bring up (needs root); deepspeed over pdsh
# make install    only the virtual environment   make data-enwik8   100 MB of Wikipedia as training data
PYTHON ?= python3
VENV ?= .venv
# On a GPU machine any torch >= 2.6 with CUDA that suits it: make install TORCH=torch
TORCH ?= torch==2.13.0
RANKS ?= 2
ITERS ?= 600
WARMUP ?= 30
RUN ?= runs/quickstart
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
ifeq ($(shell command -v nvidia-smi),)
export DS_ACCELERATOR ?= cpu
endif
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: install pretrain data-enwik8 test test-all test-slurm check clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else "Python 3.10 to 3.12 is needed, this is %d.%d; choose one with make PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

pretrain: install
	$(BIN)/python tools/prepare_sample.py --out $(RUN)/data --vocab-size 2048 --cache .cache
	$(BIN)/deepspeed --num_accelerators $(RANKS) --log_level error pretrain_llama.py \
	  --ds-config ds_configs/zero2_offload.json --method switchlora --preset llama_9m \
	  --lora-rank 16 --switch-interval 20 --switch-descent-rate 0.3 \
	  --seq-length 128 --micro-batch-size 16 --lr 2e-2 --lr-warmup-iters $(WARMUP) --train-iters $(ITERS) \
	  --data-path $(RUN)/data/shakespeare --tokenizer-model $(RUN)/data/shakespeare.model --split 95,5,0 \
	  --eval-interval 100 --eval-iters 10 --log-interval 10 \
	  --save $(RUN)/checkpoints --save-interval 200 --keep-last 2 --load auto --output-dir $(RUN)
	$(BIN)/python tools/plot_run.py $(RUN) --checkpoint $(RUN)/checkpoints

# The first 10**8 bytes of Wikipedia of 2006, cleaned: VOCAB=8192 pieces, or TOKENIZER=file or folder
VOCAB ?= 8192
data-enwik8: install
	$(BIN)/python tools/prepare_enwik8.py --out data/enwik8 --vocab-size $(VOCAB) --cache .cache \
	  $(if $(TOKENIZER),--tokenizer-model $(TOKENIZER))

# two files of tests at a time: most of them wait for ranks of their own
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: install
	$(BIN)/python -m pytest --every-cell -n 2 --dist loadfile

test-slurm: install
	$(BIN)/python -m pytest --slurm tests/slurm

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy megalowrank pretrain_llama.py pretrain_gpt.py tools benchmarks

clean:
	rm -rf runs/quickstart
