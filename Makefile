# The pipeline as a graph of files: a stage runs again only when a file it reads has changed.
#   make demo                    the digits, on a CPU           make demo PRESET=emoji16    OpenMoji, on a CPU
#   make demo PRESET=emoji64     OpenMoji, on a GPU             make test                   the tests
PRESET   ?= digits16
GUIDANCE ?= 0 1 2
SEED     ?= 0
RUN      ?= runs/$(PRESET)
VENV     ?= .venv
PYTHON   ?= python3
PY       := $(VENV)/bin/python
SETS     := $(foreach w,$(GUIDANCE),recon_w$(w) pairs_w$(w))

.PHONY: demo test clean
.DELETE_ON_ERROR:
.SECONDARY:

demo: $(RUN)/samples/recon_w1/samples.npy $(RUN)/samples/pairs_w1/samples.npy $(RUN)/metrics.json
	@cat $(RUN)/metrics.txt
	@echo "pictures: $(RUN)/samples/pairs_w1/sheet.png (condition | reconstruction model | pair model)"
	@echo "          $(RUN)/metrics.png (precision and recall over guidance)"

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --requirement requirements.txt
	touch $@

$(RUN)/data.json: | $(VENV)/installed
	$(PY) 01_embed.py --preset $(PRESET) --out $(RUN)

$(RUN)/pairs.npy: $(RUN)/data.json
	$(PY) 02_filter_pairs.py --data $(RUN)

$(RUN)/recon.pt: $(RUN)/data.json
	$(PY) 03_train_recon.py --data $(RUN) --seed $(SEED)

$(RUN)/pairs.pt: $(RUN)/pairs.npy
	$(PY) 04_train_pairs.py --data $(RUN) --seed $(SEED)

# for each guidance weight w = $(1): samples of both models, and a sheet of the pair model's beside the other's
define SAMPLE
$(RUN)/samples/recon_w$(1)/samples.npy: $(RUN)/recon.pt
	$(PY) 05_sample.py --data $(RUN) --seed $(SEED) --checkpoint $(RUN)/recon.pt --guidance $(1) --out $$(@D)

$(RUN)/samples/pairs_w$(1)/samples.npy: $(RUN)/pairs.pt $(RUN)/samples/recon_w$(1)/samples.npy
	$(PY) 05_sample.py --data $(RUN) --seed $(SEED) --checkpoint $(RUN)/pairs.pt --guidance $(1) --out $$(@D) --beside $(RUN)/samples/recon_w$(1)
endef
$(foreach w,$(GUIDANCE),$(eval $(call SAMPLE,$(w))))

$(RUN)/samples/%/cls.npy: $(RUN)/samples/%/samples.npy
	$(PY) 01_embed.py --data $(RUN) --images $< --out $(@D) --cls-only

$(RUN)/metrics.json: $(foreach s,$(SETS),$(RUN)/samples/$(s)/cls.npy)
	$(PY) 06_fewshot_metrics.py --data $(RUN)

test: $(VENV)/installed
	$(PY) -m pip install --quiet --requirement requirements-test.txt
	$(PY) -m pytest -q tests

clean:
	rm -rf $(RUN)
