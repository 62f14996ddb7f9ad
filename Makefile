# TI-JEPA: from an empty folder to the MVSA table. `make` lists the targets.
# A failing command in a pipe or a list fails the target.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# VENV is where the packages are installed; `make ... VENV=` uses the python on the PATH as it is.
VENV := .venv
PYTHON3 := python3
PY := $(if $(VENV),$(VENV)/bin/python,$(PYTHON3))
COCO := data/coco
MVSA := data/mvsa
# The paper's run where its data are, else the toy. Any PRESET on the command line wins.
PRESET := $(if $(and $(wildcard $(COCO)),$(wildcard $(MVSA))),small,toy)
OUT := out/$(PRESET)
# Passed on to pretrain.py and finetune_mvsa.py: DEVICE=cpu, DTYPE=float16, IMAGE_WEIGHTS=FILE, TEXT_ENCODER=PATH,
# IMAGE_ENCODER=NAME, EPOCHS=N, TARGET=ema|image, SPLIT=FOLDER, CACHE=DIR|off; GPUS=N pretrains with so many processes.
DEVICE := auto
DTYPE := auto
TRAIN := $(PY)$(if $(GPUS), -m torch.distributed.run --nproc_per_node=$(GPUS))
PRETRAIN_ARGS := $(if $(IMAGE_ENCODER),--image_encoder $(IMAGE_ENCODER)) $(if $(IMAGE_WEIGHTS),--image_weights $(IMAGE_WEIGHTS)) \
	$(if $(TEXT_ENCODER),--text_encoder $(TEXT_ENCODER)) $(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(TARGET),--target $(TARGET))
# The first table has all modes and SPLIT; the other protocols, on the toy or by PROTOCOLS="standard grouped", the probes.
PROTOCOLS := $(if $(filter toy,$(PRESET)),standard grouped authors,standard)
options_of = $(if $(filter standard,$(1)),$(if $(SPLIT),--split $(SPLIT)),--protocol $(1) --mode probe)
TOY := data/toy
RUN_COCO := $(if $(filter toy,$(PRESET)),$(TOY)/coco,$(COCO))
RUN_MVSA := $(if $(filter toy,$(PRESET)),$(TOY)/mvsa,$(MVSA))
CACHE := $(if $(filter toy,$(PRESET)),$(TOY)/cache,data/cache)

.PHONY: help reproduce ablate test coco clean check-preset packages
help: ## list the targets
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 18

# $(call once,stage,what it writes,command): a stage that is done is not done again. Its command is kept in OUT/.stage when
# it has succeeded; another command, or a newer checkpoint, makes it run again. pretrain.py itself knows how far it got.
once = if [ "$$(cat $(OUT)/.$(1) 2>/dev/null)" = "$(strip $(3))" ] && [ $(OUT)/.$(1) -nt $(OUT)/checkpoint.pt ] && [ -f $(OUT)/$(2) ]; \
	then echo "$(1): done before, see $(OUT)/$(2)"; else $(3); echo "$(strip $(3))" > $(OUT)/.$(1); fi

reproduce: check-preset packages ## pretrain and evaluate, [PRESET=toy|tiny|small|medium|large COCO=DIR MVSA=DIR VENV=]
ifeq ($(PRESET),toy)
	@$(PY) data.py toy $(TOY)
endif
	@$(PY) data.py check --coco $(RUN_COCO) --mvsa $(RUN_MVSA)
	@$(TRAIN) pretrain.py --preset $(PRESET) --coco $(RUN_COCO) --out $(OUT) --cache $(CACHE) --device $(DEVICE) --dtype $(DTYPE) --resume $(PRETRAIN_ARGS)
	@$(call once,eval,eval.json,$(PY) pretrain.py --eval $(OUT)/checkpoint.pt --coco $(RUN_COCO) --device $(DEVICE) --dtype $(DTYPE))
	@$(foreach protocol,$(PROTOCOLS),$(call once,$(protocol),results$(patsubst %,_%,$(filter-out standard,$(protocol))).json,$(PY) finetune_mvsa.py --checkpoint $(OUT)/checkpoint.pt --mvsa $(RUN_MVSA) --out $(OUT) --cache $(CACHE) --device $(DEVICE) --dtype $(DTYPE) $(call options_of,$(protocol)));)

# Each variant's options; a run is out/ablate/<variant>-<seed>, and one that is there is not done again.
plain := --target ema
image := --target image
vicreg := --target ema --vicreg 1
no_ema := --target ema --momentum 0 --final_momentum 0
shuffled := --target ema --shuffle_captions
VARIANTS := plain image vicreg no_ema shuffled
RUNS := $(foreach variant,$(VARIANTS),$(foreach seed,0 1 2,out/ablate/$(variant)-$(seed)/results.json))

ablate: packages ## what collapses and what does not: five variants x 3 seeds on the toy data, one table
	@$(PY) data.py toy $(TOY)
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 $(RUNS)
	@$(PY) finetune_mvsa.py --ablate out/ablate

variant_of = $(word 1,$(subst -, ,$*))
seed_of = $(word 2,$(subst -, ,$*))
out/ablate/%/results.json:
	@mkdir -p $(@D)
	@$(PY) pretrain.py --preset toy --coco $(TOY)/coco --out $(@D) --cache $(TOY)/cache --seed $(seed_of) --device $(DEVICE) --dtype $(DTYPE) --resume $($(variant_of)) > $(@D)/log.txt 2>&1
	@$(PY) pretrain.py --eval $(@D)/checkpoint.pt --coco $(TOY)/coco --device $(DEVICE) --dtype $(DTYPE) 2>> $(@D)/log.txt
	@$(PY) finetune_mvsa.py --checkpoint $(@D)/checkpoint.pt --mvsa $(TOY)/mvsa --out $(@D) --cache $(TOY)/cache --seeds $(seed_of) --mode probe --device $(DEVICE) --dtype $(DTYPE) >> $(@D)/log.txt 2>&1

test: packages ## run the tests, on the CPU and without network
	@HF_HUB_OFFLINE=1 $(PY) -m pytest -q test_model.py

coco: ## fetch COCO 2017 train images (19 GB) and captions into COCO=DIR, resuming what is half there
	@mkdir -p $(COCO)
	@for zip in annotations/annotations_trainval2017.zip zips/train2017.zip; do \
		file=$(COCO)/$${zip##*/}; \
		[ -f $$file ] || { curl -fL -C - --retry 5 -o $$file.part http://images.cocodataset.org/$$zip; mv $$file.part $$file; }; \
		$(PYTHON3) -m zipfile -e $$file $(COCO); \
	done

clean: ## remove the toy data and the toy results
	@rm -rf $(TOY) out/toy out/ablate

# What will run, before anything is installed: the device is asked of the machine here, and said again by torch later.
check-preset:
	@case "$(PRESET)" in toy|tiny|small|medium|large) ;; *) echo "PRESET is toy, tiny, small, medium or large, not '$(PRESET)'" >&2; exit 2;; esac
	@if [ "$(DEVICE)" != auto ]; then device="$(DEVICE)"; \
	elif nvidia-smi -L >/dev/null 2>&1; then device="cuda (nvidia-smi lists a GPU)"; \
	elif [ "$$(uname -sm)" = "Darwin arm64" ]; then device="mps"; else device="cpu (no GPU found)"; fi; \
	echo "reproduce: preset $(PRESET), data $(RUN_COCO) and $(RUN_MVSA), device $$device$(if $(filter toy,$(PRESET)),. Toy data and toy encoders: the numbers are NOT the paper's)"

ifeq ($(VENV),)
packages:
	@$(PY) -c "import sys, importlib.util as u; m = [p for p in 'torch transformers timm numpy sklearn matplotlib tqdm pytest PIL'.split() if not u.find_spec(p)]; sys.exit('missing in $$(command -v $(PY)): ' + ', '.join(m) + '; pip install -r requirements.txt' if m else 0)"
else
packages: $(VENV)/installed
$(VENV)/installed: requirements.txt
	@echo "installing requirements.txt into $(VENV) (torch is large: minutes)" >&2
	@$(PYTHON3) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@
endif
