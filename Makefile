# The pipeline as a graph of files: a stage runs again only when a file it reads has changed.
#   make demo                    the digits, on a CPU           make demo PRESET=emoji16    OpenMoji, on a CPU
#   make demo PRESET=emoji64     OpenMoji, on a GPU             make test                   the tests
PRESET   ?= digits16
GUIDANCE ?= 0 0.5 1 2
RUN      ?= runs/$(PRESET)
VENV     ?= .venv
PYTHON   ?= python3
PY       := $(VENV)/bin/python
MODELS   := recon pairs
SETS     := $(foreach w,$(GUIDANCE),$(foreach m,$(MODELS),$(m)_w$(w)))

.PHONY: demo test clean
.DELETE_ON_ERROR:
.SECONDARY:

demo: $(RUN)/samples/pairs_w1/sheet.png $(RUN)/metrics.json
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
	$(PY) 03_train_recon.py --data $(RUN)

$(RUN)/pairs.pt: $(RUN)/pairs.npy
	$(PY) 04_train_pairs.py --data $(RUN)

# one rule for each model and each guidance weight: $(1) is the model, $(2) the weight
define SAMPLE
$(RUN)/samples/$(1)_w$(2)/samples.npy: $(RUN)/$(1).pt
	$(PY) 05_sample.py --data $(RUN) --checkpoint $(RUN)/$(1).pt --guidance $(2) --out $$(@D)
endef
$(foreach m,$(MODELS),$(foreach w,$(GUIDANCE),$(eval $(call SAMPLE,$(m),$(w)))))

$(RUN)/samples/%/cls.npy: $(RUN)/samples/%/samples.npy
	$(PY) 01_embed.py --preset $(PRESET) --images $< --out $(@D) --cls-only

$(RUN)/samples/pairs_w1/sheet.png: $(RUN)/samples/recon_w1/samples.npy $(RUN)/samples/pairs_w1/samples.npy
	$(PY) 05_sample.py --data $(RUN) --guidance 1 --beside $(<D) --sheet-only

$(RUN)/metrics.json: $(foreach s,$(SETS),$(RUN)/samples/$(s)/cls.npy)
	$(PY) 06_fewshot_metrics.py --data $(RUN)

test: $(VENV)/installed
	$(PY) -m pip install --quiet --requirement requirements-test.txt
	$(PY) -m pytest -q tests

clean:
	rm -rf $(RUN)
