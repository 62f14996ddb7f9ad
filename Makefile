# TI-JEPA: from an empty folder to the MVSA table. `make` lists the targets.
.DEFAULT_GOAL := help

# VENV is where the packages are installed; `make ... VENV=` uses the python on the PATH as it is.
VENV := .venv
PYTHON3 := python3
# These two and PRESET can also come from the environment: PRESET=tiny make reproduce
COCO ?= data/coco
MVSA ?= data/mvsa
# A path that begins with ~/, which not every shell replaces; < marks its start
$(foreach name,VENV COCO MVSA OUT CACHE SPLIT POSTS CHECKPOINT IMAGE_WEIGHTS TEXT_ENCODER,$(if $(filter ~/%,$(firstword $($(name)))),\
	$(eval override $(name) := $(subst <~/,$(HOME)/,<$($(name))))))
$(if $(word 2,$(VENV)),$(error VENV cannot have a space in it))
PY := $(if $(VENV),$(VENV)/bin/python,$(PYTHON3))
# `small` where the data are, or were named: then what is missing is an error. Else the toy. A PRESET that is named wins.
ASKED := $(if $(filter pretrain,$(MAKECMDGOALS)),COCO,COCO MVSA)
NAMED := $(filter-out file,$(foreach name,$(ASKED),$(origin $(name))))
PRESET := $(or $(PRESET),$(if $(NAMED),small,$(shell [ -e "$(COCO)" ] && [ -e "$(MVSA)" -o "$(ASKED)" = COCO ] && echo small || echo toy)))
OUT := out/$(PRESET)
# Passed on to both scripts: DEVICE=cpu, DTYPE=bfloat16, IMAGE_WEIGHTS=FILE, TEXT_ENCODER=PATH, CACHE=DIR. To pretrain.py:
# IMAGE_ENCODER=NAME, EPOCHS=N, TARGET=ema|image|whitened, SEED=N, GPUS=N processes, ARGS=any. To finetune_mvsa.py: SPLIT=FOLDER, PROTOCOLS=.
DEVICE := auto
DTYPE := auto
TOY := data/toy
IS_TOY := $(filter toy,$(PRESET))
RUN_COCO := $(if $(IS_TOY),$(TOY)/coco,$(COCO))
RUN_MVSA := $(if $(IS_TOY),$(TOY)/mvsa,$(MVSA))
CACHE := $(if $(IS_TOY),$(TOY)/cache,data/cache)
# The standard protocol has all modes and SPLIT; the others, on the toy or by PROTOCOLS="standard grouped", the probes.
PROTOCOLS := $(if $(IS_TOY),standard grouped authors,standard)
options_of = $(if $(filter standard,$(1)),$(if $(SPLIT),--split "$(SPLIT)"),--mode probe)
ENCODERS := $(if $(IMAGE_WEIGHTS),--image_weights "$(IMAGE_WEIGHTS)") $(if $(TEXT_ENCODER),--text_encoder "$(TEXT_ENCODER)")
BOTH := --device $(DEVICE) --dtype $(DTYPE) --cache "$(CACHE)" $(ENCODERS)
TRAIN := "$(PY)" $(if $(GPUS),-m torch.distributed.run --standalone --local_addr=127.0.0.1 --nproc_per_node=$(GPUS)) pretrain.py $(BOTH) --resume \
	$(if $(IMAGE_ENCODER),--image_encoder $(IMAGE_ENCODER)) $(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(TARGET),--target $(TARGET)) $(if $(SEED),--seed $(SEED)) $(ARGS)
EVAL := "$(PY)" pretrain.py $(BOTH) --eval
JUDGE := "$(PY)" finetune_mvsa.py $(BOTH)

.PHONY: help reproduce pretrain judge picture ablate bench test coco clean check-preset packages
help: ## list the targets
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 18

# Each script knows how far it got and what its files were made from, so all of them run again and do what is left to do.
reproduce: check-preset packages ## pretrain and evaluate, [PRESET=toy|tiny|small|medium|large COCO=DIR MVSA=DIR VENV=]
	@$(if $(IS_TOY),"$(PY)" data.py toy "$(TOY)")
	@"$(PY)" data.py check --coco "$(RUN_COCO)" --mvsa "$(RUN_MVSA)"
	@$(TRAIN) --preset $(PRESET) --coco "$(RUN_COCO)" --out "$(OUT)"
	@[ "$(OUT)/eval.json" -nt "$(OUT)/checkpoint.pt" ] || $(EVAL) "$(OUT)/checkpoint.pt" --coco "$(RUN_COCO)"
	@$(foreach protocol,$(PROTOCOLS),$(JUDGE) --checkpoint "$(OUT)/checkpoint.pt" --mvsa "$(RUN_MVSA)" --out "$(OUT)" \
		--protocol $(protocol) $(call options_of,$(protocol)) &&) true

pretrain: check-preset packages ## pretrain and measure the energies, without MVSA [PRESET=tiny COCO=DIR]
	@$(if $(IS_TOY),"$(PY)" data.py toy "$(TOY)")
	@$(TRAIN) --preset $(PRESET) --coco "$(RUN_COCO)" --out "$(OUT)"
	@$(EVAL) "$(OUT)/checkpoint.pt" --coco "$(RUN_COCO)"

$(if $(filter judge,$(MAKECMDGOALS)),$(if $(and $(CHECKPOINT),$(POSTS)),,$(error make judge needs CHECKPOINT=FILE and POSTS=FOLDER)))
judge: PROTOCOLS := standard
judge: packages ## judge a checkpoint on other labelled posts, FOLDER/posts.csv, CHECKPOINT=FILE POSTS=FOLDER
	@$(foreach protocol,$(PROTOCOLS),$(JUDGE) --checkpoint "$(CHECKPOINT)" --posts "$(POSTS)" --protocol $(protocol) \
		$(call options_of,$(protocol)) &&) true

picture: packages ## the README's picture, .github/toy.png, from the pictures of make reproduce
	@"$(PY)" -c 'from PIL import Image; \
	curves, energies, masks, maps = (Image.open(f"out/toy/{name}.png").convert("RGB") for name in "curves energies masks maps".split()); \
	parts = (curves.resize((1000, 200)), 0, 0), (energies.resize((380, 243)), 0, 205), (masks.crop((0, 280, 800, 560)).resize((610, 213)), 385, 215), (maps.crop((0, 0, 1000, 540)), 0, 455); \
	whole = Image.new("RGB", (1000, 995), "white"); \
	[whole.paste(part, (x, y)) for part, x, y in parts]; \
	whole.quantize(256, 2).save(".github/toy.png", optimize=True)'

# Each variant's options; a run is out/ablate/<variant>-<seed>.
plain :=
image := --target image
sigreg := --sigreg 0.005
no_ema := --momentum 0 --final_momentum 0
shuffled := --shuffle_captions
image_shuffled := --target image --shuffle_captions
before := --target image --mask before
before_shuffled := --target image --mask before --shuffle_captions
recipe := --target whitened --mask before --visible 0.3
VARIANTS := plain image sigreg no_ema shuffled image_shuffled before before_shuffled recipe
RUNS := $(foreach variant,$(VARIANTS),$(foreach seed,0 1 2,out/ablate/$(variant)-$(seed)/results.json))

ablate: packages ## what collapses and what does not: nine variants x 3 seeds on the toy data, one table
	@"$(PY)" data.py toy "$(TOY)"
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 PRESET=toy TARGET= SEED= EPOCHS= ARGS= $(RUNS)
	@"$(PY)" finetune_mvsa.py --ablate out/ablate

variant_of = $(word 1,$(subst -, ,$*))
seed_of = $(word 2,$(subst -, ,$*))
out/ablate/%/results.json: Makefile model.py data.py pretrain.py finetune_mvsa.py
	@mkdir -p $(@D)
	@$(TRAIN) --coco "$(TOY)/coco" --out $(@D) --seed $(seed_of) $($(variant_of)) > $(@D)/log.txt 2>&1
	@$(EVAL) $(@D)/checkpoint.pt --coco "$(TOY)/coco" >> $(@D)/log.txt 2>&1
	@$(JUDGE) --checkpoint $(@D)/checkpoint.pt --mvsa "$(TOY)/mvsa" --out $(@D) --seeds 0 1 2 --mode probe >> $(@D)/log.txt 2>&1

bench: packages ## how long a preset's pretraining takes here; needs no data, [PRESET=... IMAGES=N DEVICE= DTYPE=]
	@"$(PY)" pretrain.py --bench --preset $(PRESET) --device $(DEVICE) --dtype $(DTYPE) $(if $(IMAGES),--max_images $(IMAGES))

test: packages ## run the tests, on the CPU and without network
	@"$(PY)" -m pytest -q test_model.py

coco: packages ## fetch COCO 2017's captions and first 10,000 images (1.6 GB) into COCO=DIR [IMAGES=N|all]
	@"$(PY)" data.py coco "$(COCO)" --images $(or $(IMAGES:all=0),10000)

clean: ## remove the toy data and the toy results
	@rm -rf "$(TOY)" out/toy out/ablate

# What will run, before anything is installed: the device is asked of the machine here, and said again by torch later.
check-preset:
	@case "$(PRESET)" in toy|tiny|small|medium|large) ;; *) echo "PRESET is toy, tiny, small, medium or large, not '$(PRESET)'" >&2; exit 2;; esac
	@if [ "$(DEVICE)" != auto ]; then device="$(DEVICE)"; \
	elif nvidia-smi -L >/dev/null 2>&1; then device="cuda (nvidia-smi lists a GPU)"; \
	elif [ "$$(uname -sm)" = "Darwin arm64" ]; then device="mps"; else device="cpu (no GPU found)"; fi; \
	echo "reproduce: preset $(PRESET), data $(RUN_COCO) and $(RUN_MVSA), device $$device$(if $(IS_TOY),. Toy data and toy encoders: the numbers are NOT the paper's)"

ifeq ($(VENV),)
packages:
	@"$(PY)" -c "import sys, importlib.util as u; u.find_spec('packaging') or sys.exit(sys.executable + ' lacks the packages; pip install -r requirements.txt'); \
	from importlib.metadata import distributions; from packaging.requirements import Requirement; \
	found = lambda name: next((one.version for one in distributions(name=name)), '0'); \
	lacks = [str(r) for r in map(Requirement, open('requirements.txt').read().split()) if not r.specifier.contains(found(r.name), prereleases=True)]; \
	sys.exit(sys.executable + ' lacks ' + ', '.join(lacks) + '; pip install -r requirements.txt' if lacks else 0)"
else
packages: $(VENV)/installed
# Of two makes at once, the second waits and finds it done (where the disk has locks).
define LOCKED
import contextlib, fcntl, subprocess, sys
lock = open(sys.argv[1], "w")
with contextlib.suppress(OSError):
    fcntl.flock(lock, fcntl.LOCK_EX)
sys.exit(subprocess.call(sys.argv[2:]))
endef
export LOCKED
$(VENV)/installed: requirements.txt
	@echo "installing requirements.txt into $(VENV) (torch is large: minutes)" >&2
	@$(PYTHON3) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed, not " + sys.version.split()[0] + ": make PYTHON3=python3.11 ...")'
	@$(PYTHON3) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON3) lacks its venv module: install it (Debian: apt install python3-venv), or VENV= to use its packages" >&2; exit 1; }
	@mkdir -p $(VENV)
	@$(PYTHON3) -c "$$LOCKED" $(VENV)/.lock sh -c '[ $@ -nt requirements.txt ] || { $(PYTHON3) -m venv $(VENV) && $(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt && touch $@; }'
endif
