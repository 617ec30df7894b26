# PY=python3 make test         use an interpreter that has the packages; else .venv is made here
# make bert BERT="--steps 9000" other flags for a stage: GPT, BERT, REWARD, PPO (in a new RUN)
# make reward RUN=runs/mine    another folder for the outcome
# make bench SUITES=bpe BENCH="--rounds 9"   other suites and flags; SHAKESPEARE=FILE: a local copy

ifndef PY
PY := .venv/bin/python
VENV := .venv/ready
endif
SYSTEM_PYTHON ?= python3
DATA := data/hutto
BUDGET ?= main
$(if $(filter main demo tiny,$(BUDGET)),,$(error BUDGET is $(BUDGET): give demo, main or tiny))
RUN ?= runs/main

# What each stage is given, by budget: demo (10 minutes in all), main, tiny (does it run at all).
GPT_demo := --steps 640 --batch_size 48 --eval_every 160 --dropout 0.1
GPT_main := --steps 800 --batch_size 48 --eval_every 200 --dropout 0.1
GPT_tiny := --steps 20 --eval_every 10 --n_layer 2
BERT_demo := --steps 800 --eval_every 400
BERT_main := --steps 2000 --dropout 0.1
BERT_tiny := --steps 20 --eval_every 10 --n_layer 2
REWARD_demo := --steps 400
REWARD_main := --members 2 --steps 1200 --eval_every 100 --patience 12 --dropout 0.2 --word_dropout 0.2
REWARD_tiny := --steps 20 --eval_every 10 --n_samples 128
PPO_demo := --steps 48 --posterior_prompts 8 --posterior_samples 2560 --eval_every 24
PPO_main := --steps 200 --lr 2.5e-4 --muon_lr 2.5e-4 --posterior_prompts 8 --posterior_samples 3072 --eval_every 100
PPO_tiny := --steps 2 --batch 32 --minibatch 16 --n_eval 64 --posterior_prompts 2 --posterior_samples 64
# The full run's second policy, whose KL costs four times as much: what is left is finer, and asks
# for larger batches and lower rates. And steps that make each other method as long as PPO, 2 minutes.
PPO_0.4 := --beta 0.4 --steps 90 --batch 512 --minibatch 128 --lr 2e-4 --muon_lr 2e-4 --posterior_prompts 8 --posterior_samples 2048 --eval_every 45
TRAINER := --posterior_prompts 8 --posterior_samples 1024 --eval_every 1000
STEPS_ppo := 45
STEPS_rloo := 79
STEPS_grpo := 79
STEPS_dpo := 82
STEPS_dpg := 79
STEPS_sft := 71
SUITES ?= bpe pretrain logprob generate ppo objective scaling
BENCH ?= --rounds 5 --seconds 8
GPT ?= $(GPT_$(BUDGET))
BERT ?= $(BERT_$(BUDGET))
REWARD ?= $(REWARD_$(BUDGET))
PPO ?= $(PPO_$(BUDGET))

# a stage that was interrupted goes on where it stopped
go_on = $(if $(wildcard $(RUN)/$(1)/last/state.pt),--resume)

.DEFAULT_GOAL := help
.PHONY: help setup test lint check demo data pretrain bert vae examples reward minilm classes sums chat rlhf trainers overoptimisation report results bench parity clean

help: ## 0    this list
	@echo "Minutes on a 2-core x86-64 CPU with AMX, 2026-11, after setup; a stage with what it needs (sums, chat: without AMX):"
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-18s%s\n", $$1, $$2}'

.venv/ready: pyproject.toml constraints.txt
	$(SYSTEM_PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@

setup: $(VENV) ## 0.5  .venv with the pinned packages

# two processes of one thread each; a file's tests share what they have trained
test: $(VENV) ## 4.3  all tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

lint: $(VENV) ## 0.1  ruff
	$(PY) -m ruff check .

check: lint test ## 4.4   what CI runs: lint and test

demo: $(VENV) ## 8.4  the whole story, from data to report, in runs/demo (replaced)
	rm -rf runs/demo && mkdir -p runs/demo && date +%s > runs/demo/started
	$(MAKE) --no-print-directory report RUN=runs/demo BUDGET=$(BUDGET:main=demo)

data: $(DATA)/meta.json ## 0.2  human ratings of 23,703 snippets, fetched and tokenised
$(DATA)/meta.json: data/hutto/prepare.py | $(VENV)
	$(PY) data/hutto/prepare.py
	touch $@

pretrain: $(RUN)/gpt/summary.json ## 2.8  GPT on the snippets
$(RUN)/gpt/summary.json: | $(DATA)/meta.json
	$(PY) train_pretrain.py gpt --data $(DATA) --out $(RUN)/gpt $(GPT) $(call go_on,gpt)

bert: $(RUN)/bert/summary.json ## 3.4  BERT-style encoder on the snippets
$(RUN)/bert/summary.json: | $(DATA)/meta.json
	$(PY) train_pretrain.py bert --data $(DATA) --out $(RUN)/bert $(BERT) $(call go_on,bert)

reward: $(RUN)/reward/summary.json ## 15   reward model on the encoder, with what it needs
$(RUN)/reward/summary.json: | $(RUN)/gpt/summary.json $(RUN)/bert/summary.json
	$(PY) train_rlhf.py reward --data $(DATA) --init $(RUN)/bert --policy $(RUN)/gpt --out $(RUN)/reward $(REWARD) $(call go_on,reward)

# the full run goes to two posteriors, those of beta .1 and .4
rlhf: $(RUN)/ppo/summary.json $(if $(filter main,$(BUDGET)),$(RUN)/ppo-0.4/summary.json) ## 34   PPO towards two posteriors, with what it needs
train_ppo = $(PY) train_rlhf.py ppo --data $(DATA) --policy $(RUN)/gpt --reward $(RUN)/reward --out $(RUN)/$(1) $(call go_on,$(1))
$(RUN)/ppo/summary.json: | $(RUN)/reward/summary.json
	$(call train_ppo,ppo) $(PPO)
$(RUN)/ppo-0.4/summary.json: | $(RUN)/reward/summary.json
	$(call train_ppo,ppo-0.4) $(PPO_0.4)

# latent variables: the plain language model of the same size, the VAE, and the same without what
# keeps it from collapse
VAE_tiny := --steps 20 --eval_every 10 --n_layer 2 --iwae_samples 2
train_vae = $(PY) train_pretrain.py vae --data $(DATA) --out $(RUN)/vae/$(1) $(VAE_$(BUDGET)) $(call go_on,vae/$(1))
vae: $(RUN)/vae/latent/summary.json $(RUN)/vae/collapsed/summary.json ## 32   VAE language model, beside one without z and one that collapses
	$(PY) -m nanokl report $(RUN)
$(RUN)/vae/plain/summary.json: | $(DATA)/meta.json
	$(call train_vae,plain) --n_latent 0
$(RUN)/vae/latent/summary.json: | $(RUN)/vae/plain/summary.json
	$(call train_vae,latent) --lm $(RUN)/vae/plain
$(RUN)/vae/collapsed/summary.json: | $(RUN)/vae/plain/summary.json
	$(call train_vae,collapsed) --lm $(RUN)/vae/plain --free_bits 0 --kl_warmup 0

examples: $(VENV) ## 0.6  the articles' examples, repaired, in runs/examples
	$(PY) -m nanokl examples

# others' encoder in the place of ours
MINILM := data/minilm/model
REWARD_minilm := --objective rating --freeze 2 --members 4 --steps 400 --eval_every 100 --dropout 0 --muon_lr 0 --trunk_lr 0.05
$(MINILM)/config.json: | $(VENV)
	$(PY) data/minilm/prepare.py
minilm: $(RUN)/minilm/summary.json ## 28   reward model on all-MiniLM-L6-v2, with what it needs
$(RUN)/minilm/summary.json: | $(RUN)/gpt/summary.json $(MINILM)/config.json
	$(PY) train_rlhf.py reward --data $(DATA) --init $(MINILM) --policy $(RUN)/gpt --out $(RUN)/minilm $(if $(filter tiny,$(BUDGET)),$(REWARD_tiny),$(REWARD_minilm)) $(call go_on,minilm)

# the same texts in three classes, on three trunks
CLASSES := --objective classes --steps 600 --eval_every 50 --group_size 32 --dropout 0.1
classes: $(RUN)/classes/bert/summary.json $(RUN)/classes/gpt/summary.json $(RUN)/classes/minilm/summary.json ## 15   fine-tuning BERT, GPT and MiniLM side by side
$(RUN)/classes/minilm/summary.json: | $(DATA)/meta.json $(MINILM)/config.json
	$(PY) train_rlhf.py reward --data $(DATA) --init $(MINILM) --out $(RUN)/classes/minilm $(if $(filter tiny,$(BUDGET)),$(REWARD_tiny) --objective classes,$(CLASSES) --muon_lr 0 --trunk_lr 0.05) $(call go_on,classes/minilm)
$(RUN)/classes/%/summary.json: | $(RUN)/gpt/summary.json $(RUN)/bert/summary.json
	$(PY) train_rlhf.py reward --data $(DATA) --init $(RUN)/$* --out $(RUN)/classes/$* $(if $(filter tiny,$(BUDGET)),$(REWARD_tiny) --objective classes,$(CLASSES) --trunk_lr 0.5) $(call go_on,classes/$*)

# other ways to the posterior, each for as long as PPO takes
METHODS ?= ppo rloo grpo dpo dpg sft
BETAS ?= 0.1 0.4
trainers: $(foreach m,$(METHODS),$(foreach b,$(BETAS),$(RUN)/trainers/$(m)-$(b)/summary.json)) ## 53   every method at two prices, side by side
	$(PY) -m nanokl report $(RUN)
$(RUN)/trainers/%/summary.json: | $(RUN)/reward/summary.json
	$(call train_ppo,trainers/$*) --method $(firstword $(subst -, ,$*)) --beta $(lastword $(subst -, ,$*)) $(if $(filter main,$(BUDGET)),$(TRAINER) --steps $(STEPS_$(firstword $(subst -, ,$*))),$(PPO))

# sums in two languages: fine-tuning, then three methods that are told right or wrong, PPO that pays
# nothing for KL, and by steps so rough that it shows what the price is for
SUMS := data/arithmetic
SUMS_SFT := $(if $(filter tiny,$(BUDGET)),--steps 6 --n_layer 1 --eval_every 3,--steps 1800 --block_size 72 --lr 2e-3 --muon_lr 3e-3)
SUMS_PPO := --max_prompt 18 --max_new_tokens 12 $(if $(filter tiny,$(BUDGET)),$(PPO_tiny),--batch 512 --minibatch 256 --steps 120 --warmup 10 --decay 1 --lr 3e-4 --muon_lr 0 --momentum 0.9) --no-shaping
SUMS_rloo := --method rloo --group 4
SUMS_grpo := --method grpo --group 4
SUMS_free := --beta 0
SUMS_rough := $(if $(filter tiny,$(BUDGET)),,--steps 40 --lr 1e-3 --decay 0 --posterior_samples 0)
SUMS_rough-free := $(SUMS_rough) --beta 0
train_sums = $(PY) train_rlhf.py ppo --data $(SUMS) --policy $(RUN)/sums/sft --reward nanokl/dialogue.py:right --out $(RUN)/sums/$(1) $(SUMS_PPO) $(call go_on,sums/$(1))
sums: $(RUN)/sums/ppo/summary.json $(foreach m,rloo grpo free rough rough-free,$(RUN)/sums/ppo-$(m)/summary.json) ## 48   a checkable reward: sums, by PPO, RLOO, GRPO, and PPO without a price of KL (sum of parts)
	$(PY) -m nanokl report $(RUN)/sums
$(SUMS)/conversations.jsonl: data/arithmetic/prepare.py | $(VENV)
	$(PY) data/arithmetic/prepare.py
	touch $@
$(RUN)/sums/sft/summary.json: | $(SUMS)/conversations.jsonl
	$(PY) train_rlhf.py sft --data $(SUMS) --out $(RUN)/sums/sft $(SUMS_SFT) $(call go_on,sums/sft)
$(RUN)/sums/ppo/summary.json: | $(RUN)/sums/sft/summary.json
	$(call train_sums,ppo)
$(RUN)/sums/ppo-%/summary.json: | $(RUN)/sums/sft/summary.json
	$(call train_sums,ppo-$*) $(SUMS_$*)

# open chat: what people said to each other, what they thought of it, and a policy paid by that
CHAT := data/chat
CHAT_GPT := $(if $(filter tiny,$(BUDGET)),$(GPT_tiny),--steps 600 --batch_size 32 --eval_every 200)
CHAT_BERT := $(if $(filter tiny,$(BUDGET)),$(BERT_tiny),--steps 600 --batch_size 32 --eval_every 300)
CHAT_SFT := $(if $(filter tiny,$(BUDGET)),--steps 6 --eval_every 3,--steps 250 --lr 5e-4 --muon_lr 5e-4)
CHAT_REWARD := $(if $(filter tiny,$(BUDGET)),$(REWARD_tiny),--steps 300)
CHAT_PPO := $(if $(filter tiny,$(BUDGET)),$(PPO_tiny),--steps 80 --warmup 8 --lr 2e-4 --muon_lr 2e-4 --posterior_prompts 8)
chat: $(RUN)/chat/ppo/summary.json ## 75   open chat: GPT, encoder, fine-tuning, reward model of ratings, PPO in dialogues (sum of parts, beside others)
	$(PY) -m nanokl report $(RUN)/chat
$(CHAT)/meta.json: data/chat/prepare.py | $(VENV)
	$(PY) data/chat/prepare.py
	touch $@
$(RUN)/chat/gpt/summary.json: | $(CHAT)/meta.json
	$(PY) train_pretrain.py gpt --data $(CHAT) --block_size 128 --out $(RUN)/chat/gpt $(CHAT_GPT) $(call go_on,chat/gpt)
$(RUN)/chat/bert/summary.json: | $(CHAT)/meta.json
	$(PY) train_pretrain.py bert --data $(CHAT) --block_size 128 --out $(RUN)/chat/bert $(CHAT_BERT) $(call go_on,chat/bert)
$(RUN)/chat/sft/summary.json: | $(RUN)/chat/gpt/summary.json
	$(PY) train_rlhf.py sft --data $(CHAT) --init $(RUN)/chat/gpt --out $(RUN)/chat/sft $(CHAT_SFT) $(call go_on,chat/sft)
$(RUN)/chat/reward/summary.json: | $(RUN)/chat/sft/summary.json $(RUN)/chat/bert/summary.json
	$(PY) train_rlhf.py reward --data $(CHAT) --init $(RUN)/chat/bert --policy $(RUN)/chat/sft --max_prompt 24 --out $(RUN)/chat/reward $(CHAT_REWARD) $(call go_on,chat/reward)
$(RUN)/chat/ppo/summary.json: | $(RUN)/chat/reward/summary.json
	$(PY) train_rlhf.py ppo --data $(CHAT) --policy $(RUN)/chat/sft --reward $(RUN)/chat/reward --env nanokl/dialogue.py:open_chat --turns 2 --max_prompt 24 --out $(RUN)/chat/ppo $(CHAT_PPO) $(call go_on,chat/ppo)

# Gao et al. 2022 at small scale: trained on one half of each text's ratings, watched by the other
HALF := $(if $(filter tiny,$(BUDGET)),$(REWARD_tiny),$(REWARD_demo))
CHEAP := $(if $(filter tiny,$(BUDGET)),$(PPO_tiny),--steps 120) --beta 0.02 --posterior_samples 0
overoptimisation: $(RUN)/overoptimisation/ppo/summary.json ## 15   what PPO gains by what its reward model has wrong
	$(PY) -m nanokl report $(RUN)/overoptimisation
$(RUN)/raters-%/summary.json: | $(RUN)/gpt/summary.json $(RUN)/bert/summary.json
	$(PY) train_rlhf.py reward --data $(DATA) --init $(RUN)/bert --policy $(RUN)/gpt --out $(RUN)/raters-$* --raters $* $(HALF) $(call go_on,raters-$*)
$(RUN)/overoptimisation/ppo/summary.json: | $(RUN)/raters-first/summary.json $(RUN)/raters-second/summary.json
	$(PY) train_rlhf.py ppo --data $(DATA) --policy $(RUN)/gpt --reward $(RUN)/raters-first --gold $(RUN)/raters-second --out $(RUN)/overoptimisation/ppo $(CHEAP) $(call go_on,overoptimisation/ppo)

report: $(RUN)/ppo/summary.json ## 0.1  summary.json, report.html and figures of a run
	$(PY) -m nanokl report $(RUN)

results: $(VENV) ## 47   the README's table: demo, 4 more PPO seeds, the main run (sum of parts)
	$(MAKE) demo
	rm -rf runs/seeds
	for seed in 1 2 3 4; do $(PY) train_rlhf.py ppo --data $(DATA) --policy runs/demo/gpt --reward runs/demo/reward --out runs/seeds/$$seed $(PPO_demo) --seed $$seed || exit; done
	$(MAKE) report

# What nanokl is measured against lives in environments of its own: it is no dependency. The last
# trl that has PPOTrainer is 1.9.
peers := -e . transformers==5.23.0 liger-kernel==0.8.5 trl==1.16.0
peers-ppo := -e . transformers==5.23.0 trl==1.9.0
parity := -e '.[dev,parity]'
.venv/%/ready: constraints.txt pyproject.toml
	$(SYSTEM_PYTHON) -m venv .venv/$*
	.venv/$*/bin/python -m pip install -q --disable-pip-version-check $($*) -c constraints.txt
	touch $@

data/shakespeare/meta.json: data/shakespeare/prepare.py | $(VENV)
	$(PY) data/shakespeare/prepare.py $(SHAKESPEARE)
	touch $@

bench: $(VENV) .venv/peers/ready .venv/peers-ppo/ready data/shakespeare/meta.json ## 20   nanokl beside its peers: tables, and numbers in runs/bench
	for suite in $(SUITES); do $(PY) -m nanokl bench $$suite $(BENCH) || exit; done

# tests/fixtures keep what transformers computes for machines that have none
parity: .venv/parity/ready $(MINILM)/config.json ## 1.4  the same numbers as transformers'; tests/fixtures made anew
	.venv/parity/bin/python tests/make_fixtures.py
	.venv/parity/bin/python -m pytest tests/test_parity.py tests/test_hf.py

clean: ## 0    remove runs/ and the prepared data, keep .venv
	rm -rf runs data/*/*.bin data/*/*.json data/*/*.jsonl $(MINILM)
