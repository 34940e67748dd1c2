# The pipeline as a graph of files: a stage runs again only when a file it reads has changed.
#   make demo                    the digits, on a CPU           make demo PRESET=emoji16    OpenMoji, on a CPU
#   make demo PRESET=emoji64     OpenMoji, on a GPU             make test                   the tests
#   make twostage                2SDM, after make demo          make sweep                  2SDM told more and less, an hour
PRESET   ?= digits16
SEED     ?= 0
GUIDANCE ?= 1 0 2
RUN      ?= runs/$(PRESET)$(if $(filter-out 0,$(SEED)),_seed$(SEED))
VENV     ?= .venv
PYTHON   ?= python3
PY       := $(VENV)/bin/python
# On a CPU, stages that do not wait for each other run side by side, each on its share of the cores: on two cores two trainings
# of one thread each make 240 images/s, one of two threads makes 157.
JOBS     ?= $(if $(findstring 64,$(PRESET)),1,2)
MAKEFLAGS += --jobs=$(JOBS)
CORES    := $(shell getconf _NPROCESSORS_ONLN)
SHARE    := OMP_NUM_THREADS=$(shell echo $$(( ($(CORES) + $(JOBS) - 1) / $(JOBS) ))) $(PY)
# one process a GPU, a power of two of them, since they share batches of 32; $(JOBS) where there is no GPU
COUNT    := import torch; n = torch.cuda.device_count(); print(1 << n.bit_length() - 1 if n else $(JOBS))
RANKS    := $(SHARE) -m torch.distributed.run --standalone --nproc-per-node=$$($(PY) -c "$(COUNT)")
# half the sampling steps of the preset at no worse FID: docs/beyond.md, few steps
FEW_digits16 := --sample-steps 12 --time-power 2 --interpolation 0
FEW      ?= $(FEW_$(PRESET))
ROWS     := unconditional kmeans oracle 2sdm 2sdm_fewer_steps
LABEL    ?=
TWO      := $(RUN)/twostage$(if $(LABEL),_$(LABEL))
TWO_STEPS ?= $(if $(filter digits16,$(PRESET)),1000)
TWOSTAGE := --data $(RUN) --seed $(SEED) $(if $(LABEL),--label $(LABEL)) $(if $(TWO_STEPS),--steps $(TWO_STEPS))
SETS     := $(foreach w,$(GUIDANCE),recon_w$(w) pairs_w$(w))

.PHONY: demo twostage sweep test clean
.DELETE_ON_ERROR:
.SECONDARY:

demo: $(foreach s,$(SETS),$(RUN)/samples/$(s)/samples.npy) $(RUN)/metrics.json
	@cat $(RUN)/metrics.txt
	@echo "pictures: $(foreach w,$(GUIDANCE),$(RUN)/samples/pairs_w$(w)/sheet.png) (condition | reconstruction | pairs)"
	@echo "          $(RUN)/metrics.png (precision and recall over guidance)"

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --requirement requirements.txt
	touch $@

$(RUN)/data.json: | $(VENV)/installed
	$(PY) 01_embed.py --preset $(PRESET) --out $(RUN)

$(RUN)/pairs.npy: $(RUN)/data.json
	$(PY) 02_filter_pairs.py --data $(RUN)

# what was trained on an older input is deleted; what was interrupted is resumed
$(RUN)/recon.pt: $(RUN)/data.json
	@find $@ $@.partial $@.sharded -depth ! -newer $< -delete 2>/dev/null || true
	$(SHARE) 03_train_recon.py --data $(RUN) --seed $(SEED)

$(RUN)/pairs.pt: $(RUN)/pairs.npy
	@find $@ $@.partial $@.sharded -depth ! -newer $< -delete 2>/dev/null || true
	$(SHARE) 04_train_pairs.py --data $(RUN) --seed $(SEED)

# for each guidance weight w = $(1): samples of both models, and a sheet of the pair model's beside the other's
define SAMPLE
$(RUN)/samples/recon_w$(1)/samples.npy: $(RUN)/recon.pt
	$(SHARE) 05_sample.py --data $(RUN) --seed $(SEED) --checkpoint $(RUN)/recon.pt --guidance $(1) $(FEW) --out $$(@D)

$(RUN)/samples/pairs_w$(1)/samples.npy: $(RUN)/pairs.pt $(RUN)/samples/recon_w$(1)/samples.npy
	$(SHARE) 05_sample.py --data $(RUN) --seed $(SEED) --checkpoint $(RUN)/pairs.pt --guidance $(1) $(FEW) --out $$(@D) --beside $(RUN)/samples/recon_w$(1)
endef
$(foreach w,$(GUIDANCE),$(eval $(call SAMPLE,$(w))))

$(RUN)/samples/%/cls.npy: $(RUN)/samples/%/samples.npy
	$(SHARE) 01_embed.py --data $(RUN) --images $< --out $(@D) --cls-only

$(RUN)/metrics.json: $(foreach s,$(SETS),$(RUN)/samples/$(s)/cls.npy)
	$(PY) 06_fewshot_metrics.py --data $(RUN) --samples $(^D)

# 2SDM: every image model, the prior and the samples of 07; then 01 and 06 on each row of the table
$(TWO)/interpolation.png: $(RUN)/data.json
	@find $(TWO) -depth ! -newer $< -delete 2>/dev/null || true
	$(RANKS) 07_twostage.py $(TWOSTAGE)

$(TWO)/%/cls.npy: $(TWO)/interpolation.png
	$(SHARE) 01_embed.py --data $(RUN) --images $(@D)/samples.npy --out $(@D) --cls-only

$(TWO)/metrics.json: $(foreach r,$(ROWS),$(TWO)/$(r)/cls.npy)
	$(PY) 06_fewshot_metrics.py --data $(RUN) --samples $(^D) --out $(@D)

$(TWO)/distances.png: $(TWO)/metrics.json
	$(PY) 07_twostage.py figures $(TWOSTAGE)

twostage: $(TWO)/distances.png
	@cat $(TWO)/metrics.txt
	@echo "pictures: $(TWO)/rows.png ($(ROWS)), interpolation.png, neighbours.png, distances.png"

# image models that are told more and more of the embedding, at two budgets
$(TWO)/sweep/metrics.json: $(TWO)/metrics.json
	$(RANKS) 07_twostage.py sweep $(TWOSTAGE)
	for row in $(@D)/*/; do $(PY) 01_embed.py --data $(RUN) --images $$row/samples.npy --out $$row --cls-only || exit 2; done
	$(PY) 06_fewshot_metrics.py --data $(RUN) --samples $(@D)/*/ --out $(@D)

sweep: $(TWO)/sweep/metrics.json
	$(PY) 07_twostage.py figures $(TWOSTAGE)
	@cat $(TWO)/sweep/metrics.txt
	@echo "picture: $(TWO)/sweep.png"

test: $(VENV)/installed
	$(PY) -m pip install --quiet --requirement requirements-test.txt
	OMP_NUM_THREADS=1 $(PY) -m pytest -q --numprocesses=auto --dist=loadfile tests

clean:
	rm -rf $(RUN)
