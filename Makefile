# The pipeline as a graph of files: a stage runs again only when a file it reads has changed.
#   make demo                    the digits, on a CPU           make demo PRESET=emoji16    OpenMoji, on a CPU
#   make demo PRESET=emoji64     OpenMoji, on a GPU             make test                   the tests
#   make full                    the digits, 3 times the images, tokens only, read by a judge of digits: 25 to 55 min
#   make figures                 figures for a lecture, after make demo, two minutes
#   make twostage                2SDM, after make demo          make sweep                  2SDM told more, less
PRESET   ?= digits16
SEED     ?= 0
GUIDANCE ?= 1 0 2
# how the digits are sampled: 60 of each condition, more of the steps at low noise (docs/beyond.md, few steps)
DIGITS   := --time-power 2 --interpolation 0 --variations 60
# make full: the paper's condition and more images, in a folder of their own; the preset's 25 sampling steps
ifneq ($(filter full,$(MAKECMDGOALS)),)
RUN      ?= runs/full$(if $(filter-out 0,$(SEED)),_seed$(SEED))
RECIPE   := --preset full16 --save-every 1000
HOW      := $(DIGITS)
endif
RUN      ?= runs/$(PRESET)$(if $(filter-out 0,$(SEED)),_seed$(SEED))
VENV     ?= .venv
PYTHON   ?= python3
PY       := $(VENV)/bin/python
# On a CPU, stages that do not wait for each other run side by side, each on its share of the cores: on two cores two
# trainings of one thread each made 240 images/s, one of two threads 157 (channels 32, 64, 192, batch 32).
JOBS     ?= $(if $(findstring 64,$(PRESET)),1,2)
MAKEFLAGS += --jobs=$(JOBS)
CORES    := $(shell getconf _NPROCESSORS_ONLN)
SHARE    := OMP_NUM_THREADS=$(shell echo $$(( ($(CORES) + $(JOBS) - 1) / $(JOBS) ))) $(PY)
SOURCE   := $(if $(filter digits% full%,$(PRESET)),digits,$(if $(filter %16,$(PRESET)),openmoji16,openmoji))
# make demo: half the sampling steps of the preset, at no worse FID
HOW_digits16 := --sample-steps 12 $(DIGITS)
HOW      ?= $(HOW_$(PRESET))
RECIPE_emoji16 := --save-every 1000
RECIPE   ?= $(RECIPE_$(PRESET))
SETS     := $(foreach w,$(GUIDANCE),recon_w$(w) pairs_w$(w))
TRAIN     = --data $(RUN) --seed $(SEED)
# what was trained on an older input is deleted; what was interrupted is resumed
fresh     = @find $@ $@.partial ! -newer $< -exec rm {} + 2>/dev/null || true

.PHONY: demo full figures twostage sweep test clean
.DELETE_ON_ERROR:
.SECONDARY:

demo: $(RUN)/figures/done
	@cat $(RUN)/metrics.txt
	@echo "pictures: $(RUN)/samples/pairs_w*/sheet.png (condition | reconstruction | pairs), $(RUN)/figures/"

full: demo
	$(PY) -m examples.digits_judge --data $(RUN)
	$(PY) 06_fewshot_metrics.py --data $(RUN) --judge judge --out $(RUN)/judge

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --requirement requirements.txt
	touch $@

data/digits data/openmoji: data/%: | $(VENV)/installed
	$(PY) -m examples.$* --out $@

data/openmoji16: | $(VENV)/installed
	$(PY) -m examples.openmoji --by-word --size 16 --out $@

$(RUN)/data.json: | data/$(SOURCE)
	$(PY) 01_embed.py --preset $(PRESET) --images data/$(SOURCE) --out $(RUN)

$(RUN)/pairs.npy: $(RUN)/data.json
	$(PY) 02_filter_pairs.py --data $(RUN)

$(RUN)/recon.pt: $(RUN)/data.json
	$(fresh)
	$(SHARE) 03_train_recon.py $(TRAIN) $(RECIPE)

$(RUN)/pairs.pt: $(RUN)/pairs.npy
	$(fresh)
	$(SHARE) 04_train_pairs.py $(TRAIN) $(RECIPE)

# for each guidance weight w = $(1): samples of both models, and a sheet of the pair model's beside the other's
define SAMPLE
$(RUN)/samples/recon_w$(1)/samples.npy: $(RUN)/recon.pt
	$(SHARE) 05_sample.py $(TRAIN) --checkpoint $(RUN)/recon.pt --guidance $(1) $(HOW) --out $$(@D)

$(RUN)/samples/pairs_w$(1)/samples.npy: $(RUN)/pairs.pt $(RUN)/samples/recon_w$(1)/samples.npy
	$(SHARE) 05_sample.py $(TRAIN) --checkpoint $(RUN)/pairs.pt --guidance $(1) $(HOW) --out $$(@D) --beside $(RUN)/samples/recon_w$(1)
endef
$(foreach w,$(GUIDANCE),$(eval $(call SAMPLE,$(w))))

$(RUN)/%/data.json: $(RUN)/%/samples.npy
	$(SHARE) 01_embed.py --data $(RUN) --images $< --out $(@D) --cls-only

$(RUN)/metrics.json: $(foreach s,$(SETS),$(RUN)/samples/$(s)/data.json)
	$(PY) 06_fewshot_metrics.py --data $(RUN) --samples $(^D)

$(RUN)/figures/done: $(RUN)/metrics.json
	$(PY) -m docs.figures $(RUN) --only filter precision_recall training idea
	touch $@

# for a lecture, docs/course.md: two minutes
figures: demo
	$(PY) -m docs.figures $(RUN)

# 2SDM: the prior, three image models on one recipe, and for each row of the table an array y, samples, scores
ROWS      := unconditional kmeans16 oracle 2sdm 2sdm_fewer_steps
TWO       := $(RUN)/twostage
TWO_STEPS ?= $(if $(filter digits16,$(PRESET)),1000)
STEPS      = $(if $(TWO_STEPS),--steps $(TWO_STEPS)) --cond-drop 0
ROW        = $(SHARE) 05_sample.py $(TRAIN) --y $< --out $(@D)

$(RUN)/kmeans16.npy: $(RUN)/data.json
	$(PY) 07_twostage.py told $(TRAIN)

$(RUN)/none.pt: $(RUN)/data.json
	$(fresh)
	$(SHARE) 03_train_recon.py $(TRAIN) $(STEPS) --cond none --out $@

$(RUN)/film.pt: $(RUN)/data.json
	$(fresh)
	$(SHARE) 03_train_recon.py $(TRAIN) $(STEPS) --cond film --out $@

$(RUN)/kmeans16.pt: $(RUN)/kmeans16.npy
	$(fresh)
	$(SHARE) 03_train_recon.py $(TRAIN) $(STEPS) --cond film --cls $< --out $@

$(RUN)/prior.pt: $(RUN)/data.json
	$(fresh)
	$(SHARE) 07_twostage.py prior $(TRAIN)

$(TWO)/2sdm/y.json: $(RUN)/prior.pt $(RUN)/kmeans16.npy
	$(SHARE) 07_twostage.py y $(TRAIN)

$(TWO)/unconditional/y.npy $(TWO)/kmeans16/y.npy $(TWO)/oracle/y.npy $(TWO)/2sdm/y.npy: $(TWO)/2sdm/y.json ;

$(TWO)/unconditional/samples.npy: $(TWO)/unconditional/y.npy $(RUN)/none.pt
	$(ROW) --checkpoint $(RUN)/none.pt

$(TWO)/kmeans16/samples.npy: $(TWO)/kmeans16/y.npy $(RUN)/kmeans16.pt
	$(ROW) --checkpoint $(RUN)/kmeans16.pt

$(TWO)/oracle/samples.npy: $(TWO)/oracle/y.npy $(RUN)/film.pt
	$(ROW) --checkpoint $(RUN)/film.pt

$(TWO)/2sdm/samples.npy: $(TWO)/2sdm/y.npy $(RUN)/film.pt
	$(ROW) --checkpoint $(RUN)/film.pt

# less time in all than the unconditional row, the prior's included: 4 of 5 of the preset's steps
FEWER := $(if $(filter semantica%,$(PRESET)),102,$(if $(filter %64,$(PRESET)),51,20))
$(TWO)/2sdm_fewer_steps/samples.npy: $(TWO)/2sdm/y.npy $(RUN)/film.pt
	$(ROW) --checkpoint $(RUN)/film.pt --sample-steps $(FEWER)

$(TWO)/metrics.json: $(foreach r,$(ROWS),$(TWO)/$(r)/data.json)
	$(PY) 06_fewshot_metrics.py --data $(RUN) --samples $(^D) --out $(TWO)

twostage: $(TWO)/metrics.json | $(RUN)/figures/done
	$(PY) -m docs.figures $(RUN)
	@cat $(TWO)/metrics.txt
	@echo "pictures: $(RUN)/figures/"

# image models that are told more and more of the embedding, at two budgets
TOLD      := none pca1 pca4 pca16 pca64 film kmeans4 kmeans16 kmeans64 kmeans256
TO_TELL   := $(filter-out none film kmeans16,$(TOLD))
BUDGETS   ?= 500 1000
SWEEP     := $(foreach b,$(BUDGETS),$(foreach t,$(TOLD),$(t)_$(b)))

sweep: $(TWO)/2sdm/y.json
	$(PY) 07_twostage.py told $(TRAIN) --told $(TO_TELL)
	$(PY) 07_twostage.py y $(TRAIN) --rows $(TO_TELL)
	for b in $(BUDGETS); do for t in $(TOLD); do \
		how="--cond film"; y=$$t; \
		case $$t in none) how="--cond none"; y=unconditional;; film) y=oracle;; *) how="--cond film --cls $(RUN)/$$t.npy";; esac; \
		out=$(TWO)/sweep/$${t}_$$b; \
		$(PY) 03_train_recon.py $(TRAIN) --cond-drop 0 --steps $$b $$how --out $$out.pt || exit 2; \
		$(PY) 05_sample.py $(TRAIN) --checkpoint $$out.pt --y $(TWO)/$$y/y.npy --out $$out || exit 2; \
		$(PY) 01_embed.py --data $(RUN) --images $$out/samples.npy --out $$out --cls-only || exit 2; \
	done; done
	$(PY) 06_fewshot_metrics.py --data $(RUN) --samples $(addprefix $(TWO)/sweep/,$(SWEEP)) --out $(TWO)/sweep
	$(PY) -m docs.figures $(RUN) --only sweep
	@cat $(TWO)/sweep/metrics.txt

test: $(VENV)/installed
	$(PY) -m pip install --quiet --requirement requirements-test.txt
	OMP_NUM_THREADS=1 $(PY) -m pytest -q --numprocesses=auto --dist=loadfile tests

clean:
	rm -rf $(RUN)
