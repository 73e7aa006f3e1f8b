# Every target does its own set-up: a virtual environment made once from the lock file.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# TensorFlow's start-up notices hide the messages that matter.
export TF_CPP_MIN_LOG_LEVEL ?= 3
UV_VERSION := 0.13.9
comma := ,
empty :=
space := $(empty) $(empty)
commas = $(subst $(space),$(comma),$(1))

.PHONY: setup lock lint test demo audit audit-table audit-batch-table audit-steps-table rounds-table gate training frontier attack-bench attack-bench-speed bench generator published adaptive recognition bounds clean

setup: $(STAMP)

$(VENV)/.locked: requirements.lock
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	touch $@

$(STAMP): $(VENV)/.locked pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# Resolves pyproject.toml again; the result names packages, versions and hashes, but no download host.
lock:
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	.venv-lock/bin/uv pip compile pyproject.toml --extra dev --python-version 3.11 --upgrade \
	  --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet --output-file requirements.lock
	rm -rf .venv-lock

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The first look: train two hospitals' worth of clients, log round 1, attack it, show the page.
# A second `make demo` continues what Ctrl-C stopped.
DEMO_SETS := fundus_patches histology_patches
ROUND_ONE := --partition=iid:16 --batch_size=1 --max_local_steps=1 --client_learning_rate=0.05
resume = $(if $(wildcard $(1)/config.json),--resume)

demo: $(STAMP) $(DEMO_SETS:%=demo-%)
	$(BIN)/tff-shadow-report $(DEMO_SETS:%=--run_dir=runs/demo/%) --output_dir=runs/demo --overwrite
	@echo "open runs/demo/report.html"

demo-%: $(STAMP)
	$(BIN)/tff-shadow-train --run_dir=runs/demo/$* --dataset=$* $(ROUND_ONE) --rounds=60 \
	  --evaluate_every_rounds=10 --save_every_rounds=20 $(call resume,runs/demo/$*)
	$(BIN)/tff-shadow-attack --run_dir=runs/demo/$* --max_targets=8 \
	  $(call resume,runs/demo/$*/attacks/inversion)

# What could the server have seen in the demo? Half a minute each.
audit: demo $(DEMO_SETS:%=audit-%)

audit-%: demo-%
	$(BIN)/tff-shadow-audit --run_dir=runs/demo/$* $(call resume,runs/demo/$*/audits/audit)

GATE_SETS := chest_phantom fundus_patches histology_patches

# All defences under the same audit of round 1: results/audit.csv; what they cost is in the table of
# `make frontier`, whose trainings converge. Hours; what each audit found is kept in results/audits, and
# those that are there are not made again.
AUDITED_SETS := $(GATE_SETS)
AUDITED_SEEDS := 0 1 2
# Patches stay patches when they are turned, for whoever learns from public ones.
PATCH_VARIATIONS := --augment=mirror,turns,shifts,brightness
variations-fundus_patches := $(PATCH_VARIATIONS)
variations-histology_patches := $(PATCH_VARIATIONS)
# 54 images over the seeds.
AUDITED_CLIENTS := 18
NOISE := --defense=shadow --saliency=given --noise_strength_kind
# Of each shape strengths that cost about a point of F1 at most (results/frontier.csv); fresh, as frozen
# noise of that strength costs more. An image_ratio is a ratio here, where a client has one image, and
# costs less where it has more.
FRESH := --noise_freshness=fresh
ratio = $(NOISE)=ratio --noise_shape=$(1) --noise_strength=$(2).0 $(FRESH)
image_ratio = $(NOISE)=image_ratio --noise_shape=$(1) --noise_strength=$(2).0 $(FRESH)
defense-none :=
defense-isotropic := $(call ratio,isotropic,1)
defense-isotropic10 := $(call ratio,isotropic,10)
defense-diagonal10 := $(call ratio,diagonal,10)
defense-iso_image30 := $(call image_ratio,isotropic,30)
defense-diag_image30 := $(call image_ratio,diagonal,30)
defense-iso_image100 := $(call image_ratio,isotropic,100)
defense-iso_image300 := $(call image_ratio,isotropic,300)
defense-correlated := $(call ratio,correlated,1)
# Three times what one public image adds; with the floor, 95 times as much of plain noise. With a floor
# of 99 %, thirty times as much; ten times the strength would cost 4 to 7 points of F1 then.
defense-decoy = $(NOISE)=scale --noise_shape=decoy --noise_strength=3 $(FRESH) \
  $(subst --augment,--decoy_augment,$(variations-$(1)))
defense-decoy_floor99 = $(defense-decoy) --noise_floor=0.99
# The plain part of decoy noise alone: as loud, of public images too, what is shaped a hundredth as strong.
defense-floor_alone = $(defense-decoy) --noise_strength=0.03 --noise_floor=0.9999999
defense-images := $(NOISE)=scale --noise_shape=correlated --noise_strength=0.1 --propagation=images
defense-percentile := --defense=percentile_gaussian
defense-top_k := --defense=top_k
defense-quantization := --defense=quantization --quantization_bits=4
defense-soteria := --defense=soteria
# Clipping at 1 costs 5 points of F1 under any noise; at 3 less than one on histology, 12 on chest.
defense-dp_sgd := --defense=dp_sgd --dp_sgd_clip_norm=3 --dp_sgd_noise_multiplier=0.1
# The same noise.
defense-dp_sgd_clip10 := --defense=dp_sgd --dp_sgd_clip_norm=10 --dp_sgd_noise_multiplier=0.03
# About as much as costs a point of F1 on histology; on fundus patches it costs many.
defense-dp_sgd_noise := --defense=dp_sgd --dp_sgd_clip_norm=3 --dp_sgd_noise_multiplier=0.3
defense-dp_sgd_clip10_noise := --defense=dp_sgd --dp_sgd_clip_norm=10 --dp_sgd_noise_multiplier=0.1
# The attacker has the clients' own generator, the worst case.
shadow-of = runs/generator/$(1)/generator.keras
defense-published = --defense=published --published_generator=$(call shadow-of,$(1)) \
  --published_latent_learning_rate=0.1
# Each client that is played fits latents, or has its pruning computed one by one: 200 instead
# of thousands.
audit-published = --generator=$(call shadow-of,$(1)) --inversion_clients=200
audit-soteria := --inversion_clients=200
AUDITED_DEFENSES := $(patsubst defense-%,%,$(filter defense-%,$(.VARIABLES)))
AUDITED := $(foreach set,$(AUDITED_SETS),$(foreach defense,$(AUDITED_DEFENSES),\
  $(foreach seed,$(AUDITED_SEEDS),$(set)+$(defense)+$(seed))))
part = $(word $(1),$(subst +, ,$(2)))
# Of the first seed alone: they take the most of an audit, and vary little.
bounds-of = $(if $(filter-out 0,$(1)),--bound_clients=0)

FOUND := results/audits/
# Of these cells results/NAME.csv.
define compare-found
	$(BIN)/tff-shadow-compare $(1:%=--summary=$(FOUND)%.json) --output_dir=runs/audited/compared_$(2) \
	  --reference="decoy scale 3, floor 0.999, fresh" --utility_table=results/frontier.csv --overwrite
	cp runs/audited/compared_$(2)/comparison.csv results/$(2).csv
	$(BIN)/python -m binaries.docs_tables
endef

audit-table: $(STAMP) $(AUDITED:%=$(FOUND)%.json)
	$(call compare-found,$(AUDITED),audit)

# The same with clients of 4 images in one step: results/audit_batch4.csv.
BATCH_AUDITED := $(foreach defense,none iso_image100 decoy decoy_floor99 dp_sgd dp_sgd_noise,\
  histology_patches+$(defense)+0+4)

audit-batch-table: $(STAMP) $(BATCH_AUDITED:%=$(FOUND)%.json)
	$(call compare-found,$(BATCH_AUDITED),audit_batch4)

# The same with clients that take five steps on one image: results/audit_steps5.csv.
STEPS_AUDITED := $(foreach defense,none iso_image100 decoy decoy_floor99 dp_sgd,\
  histology_patches+$(defense)+0+1x5)

audit-steps-table: $(STAMP) $(STEPS_AUDITED:%=$(FOUND)%.json)
	$(call compare-found,$(STEPS_AUDITED),audit_steps5)

# SET+DEFENSE+SEED, SET+DEFENSE+SEED+IMAGES of a client or SET+DEFENSE+SEED+1xSTEPS on its image.
images-of = $(firstword $(subst x, ,$(call part,4,$(1))))
steps-of = $(word 2,$(subst x, ,$(call part,4,$(1))))
partition-of = $(if $(call steps-of,$(1)),sizes:1/1/1/1/1/1/1/1,iid:$(AUDITED_CLIENTS))
clients-of = $(if $(call steps-of,$(1)),8,$(if $(call images-of,$(1)),6,$(AUDITED_CLIENTS)))

$(FOUND)%.json: | $(STAMP)
	$(if $(filter published,$(call part,2,$*)),$(MAKE) generator-$(call part,1,$*))
	$(BIN)/tff-shadow-train --run_dir=runs/audited/$* --dataset=$(call part,1,$*) \
	  --seed=$(call part,3,$*) $(ROUND_ONE) --rounds=1 --partition=$(call partition-of,$*) \
	  $(addprefix --batch_size=,$(call images-of,$*)) \
	  $(foreach flag,--local_epochs --max_local_steps,$(addprefix $(flag)=,$(call steps-of,$*))) \
	  $(call defense-$(call part,2,$*),$(call part,1,$*)) $(call resume,runs/audited/$*)
	$(BIN)/tff-shadow-audit --run_dir=runs/audited/$* --cache_dir=runs/audited/cache \
	  --max_clients=$(call clients-of,$*) --lanes=$(AUDITED_CLIENTS) \
	  $(call bounds-of,$(call part,3,$*)) $(variations-$(call part,1,$*)) \
	  $(call audit-$(call part,2,$*),$(call part,1,$*)) $(call resume,runs/audited/$*/audits/audit)
	mkdir -p $(@D)
	$(BIN)/python -m json.tool --compact runs/audited/$*/audits/audit/summary.json $@

# What is left of noise when the server keeps more and more rounds of the same images. Clients of one
# image each, learned slowly, for they are all there is to learn: results/rounds.csv. Hours.
KEPT_ROUNDS := 1 4 16
KEPT := images+frozen images+fresh correlated+fresh isotropic+fresh iso_image100+fresh decoy_floor99+fresh decoy+fresh
KEPT_FLAGS := --max_clients=8 --calibration_clients=4 --bound_clients=0 --cache_dir=runs/kept/cache

rounds-table: $(STAMP) $(KEPT:%=kept-histology_patches+%)
	$(BIN)/tff-shadow-compare $(KEPT:%=--run_dir=runs/kept/histology_patches+%) \
	  --name=$(call commas,$(KEPT_ROUNDS:%=kept_%)) --output_dir=runs/kept/compared --overwrite
	cp runs/kept/compared/comparison.csv results/rounds.csv

kept-%: $(STAMP)
	$(BIN)/tff-shadow-train --run_dir=runs/kept/$* --dataset=$(call part,1,$*) $(ROUND_ONE) \
	  --partition=sizes:1/1/1/1/1/1/1/1 --client_learning_rate=0.005 --rounds=16 \
	  --observed_rounds=$$(seq -s, 16) --save_every_rounds=16 \
	  $(call defense-$(call part,2,$*),$(call part,1,$*)) \
	  --noise_freshness=$(call part,3,$*) $(call resume,runs/kept/$*)
	for count in $(KEPT_ROUNDS); do \
	  audit=runs/kept/$*/audits/kept_$$count; \
	  if [ $$count -gt 1 ]; then together=--separate_rounds=; else together=; fi; \
	  if [ -e $$audit/config.json ]; then resume=--resume; else resume=; fi; \
	  $(BIN)/tff-shadow-audit --run_dir=runs/kept/$* --name=kept_$$count --rounds=$$(seq -s, $$count) \
	    $$together $(KEPT_FLAGS) $(variations-$(call part,1,$*)) $$resume || exit 1; \
	done

# Does the attack see anything? On each embedded set, 16 images, batch 1, round 1 (method of proof:
# nothing measured behind a defence means anything unless the undefended attack works).
gate: $(STAMP)
	@mkdir -p runs/gate; failed=0; for set in $(GATE_SETS); do \
	  rm -rf runs/gate/$$set && \
	  $(BIN)/tff-shadow-train --run_dir=runs/gate/$$set --dataset=$$set $(ROUND_ONE) --rounds=1 \
	    >runs/gate-$$set.log 2>&1 && \
	  $(BIN)/tff-shadow-attack --run_dir=runs/gate/$$set >>runs/gate-$$set.log 2>&1 && \
	  $(BIN)/python -m binaries.gate --run_dir=runs/gate/$$set || failed=1; \
	done; exit $$failed

# Federated against central training; rewrites results/training.csv.
training: $(STAMP)
	$(BIN)/python -m binaries.training_table

# Protection against utility of the defences; continues results/frontier.csv where it stopped. dp_sgd
# cannot train BatchNorm, so it and what it is compared with train group normalisation besides.
BOTH_FLOORS := scale:3.0+floor:0.99,scale:3.0+floor:0.999
# As for defense-floor_alone.
FLOOR_ALONE := scale:0.03+floor:0.9999999
STRONG := --freshness=fresh --shapes=isotropic,diagonal
BY_GROUP := dp_sgd/noise_multiplier:0.01 dp_sgd/noise_multiplier:0.03 dp_sgd/noise_multiplier:0.1
CLIPPED := dp_sgd/clip_norm:3+noise_multiplier:0.1 dp_sgd/clip_norm:10+noise_multiplier:0.03 \
  dp_sgd/clip_norm:3+noise_multiplier:0.3 dp_sgd/clip_norm:10+noise_multiplier:0.1
# F1 of fundus patches varies from seed to seed by more than what decides between these.
MORE_SEEDS := --datasets=fundus_patches --seeds=8 --parts=utility --freshness=fresh

frontier: $(STAMP)
	$(BIN)/python -m binaries.frontier
	$(BIN)/python -m binaries.frontier $(STRONG) --baselines= \
	  --strengths=10.0,30.0,image_ratio:30.0,image_ratio:100.0,image_ratio:300.0
	$(BIN)/python -m binaries.frontier --freshness=fresh --shapes=decoy --baselines= \
	  --strengths=$(BOTH_FLOORS),$(FLOOR_ALONE)
	$(BIN)/python -m binaries.frontier $(STRONG) --norm=group --datasets=histology_patches \
	  --strengths=10.0,30.0,image_ratio:30.0 --baselines=$(call commas,$(BY_GROUP))
	$(BIN)/python -m binaries.frontier --norm=group --shapes= --strengths= \
	  --baselines=$(call commas,$(CLIPPED))
	$(BIN)/python -m binaries.frontier $(MORE_SEEDS) --shapes=decoy --baselines= \
	  --strengths=$(BOTH_FLOORS),$(FLOOR_ALONE)
	$(BIN)/python -m binaries.frontier $(MORE_SEEDS) --shapes=decoy --baselines= \
	  --strengths=scale:3.0+floor:0.999 --learning_rates=0.05,0.02
	$(BIN)/python -m binaries.frontier $(MORE_SEEDS) --norm=group --shapes= --strengths= \
	  --baselines=$(firstword $(CLIPPED))

# The attacks side by side; continues results/attacks.csv where it stopped.
attack-bench: $(STAMP)
	$(BIN)/python -m binaries.attack_bench

bench: $(STAMP)
	$(BIN)/python -m binaries.bench

# A generator per embedded set, and how well it reconstructs unseen images: results/generator.csv.
# A few minutes each; a second call continues what Ctrl-C stopped.
GENERATORS := chest_phantom fundus_patches histology_patches histology_patches_64
flags-chest_phantom := --dataset=chest_phantom --split=drawn
flags-fundus_patches := --dataset=fundus_patches $(variations-fundus_patches)
flags-histology_patches := --dataset=histology_patches $(variations-histology_patches)
flags-histology_patches_64 := $(flags-histology_patches) --image_size=64 --batch_size=8 --steps=1200

generator: $(STAMP) $(GENERATORS:%=generator-%)
	$(BIN)/python -m binaries.generator_table \
	  --run_dirs=$(call commas,$(GENERATORS:%=runs/generator/%))

generator-%: $(STAMP)
	$(BIN)/tff-shadow-train-shadow --run_dir=runs/generator/$* $(flags-$*) \
	  $(call resume,runs/generator/$*)

# The published defence against none; continues results/published.csv where it stopped.
published: $(STAMP) $(patsubst %,generator-%,$(filter-out %_64,$(GENERATORS)))
	$(BIN)/python -m binaries.published_table

# Attacks that know shadow noise; continues results/adaptive.csv where it stopped.
adaptive: $(STAMP)
	$(BIN)/python -m binaries.adaptive_table

# Whose image updates pick out of known ones; continues results/recognition.csv where it stopped.
OF_MANY := decoy/scale:3.0+floor:0.99 decoy/scale:3.0+floor:0.999 dp_sgd/clip_norm:3+noise_multiplier:0.1
RECOGNITION = $(BIN)/python -m binaries.recognition_table

recognition: $(STAMP)
	$(RECOGNITION)
	$(RECOGNITION) --images=4 --seeds=1 --defenses=$(call commas,$(OF_MANY))
	$(RECOGNITION) --images=16 --seeds=1 --datasets=histology_patches \
	  --defenses=$(call commas,$(OF_MANY))
	$(RECOGNITION) --rounds=4 --seeds=1 --datasets=histology_patches \
	  --defenses=$(call commas,$(OF_MANY))

# Bounds of the region error under the same noise; continues results/bounds.csv where it stopped.
bounds: $(STAMP)
	$(BIN)/python -m binaries.bounds_table

# The attack against the same attack in PyTorch, which lives in an environment of its own and is no
# dependency. PIP_INDEX_URL=... names an index of wheels for the CPU only; the default index may
# serve those with CUDA, which work too but are large.
TORCH_VENV := .venv-torch
TORCH_VERSION := 2.13.0

$(TORCH_VENV)/.torch-$(TORCH_VERSION):
	$(PYTHON) -m venv --clear $(TORCH_VENV)
	$(TORCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH_VERSION) numpy
	touch $@

attack-bench-speed: $(STAMP) $(TORCH_VENV)/.torch-$(TORCH_VERSION)
	$(BIN)/python -m binaries.attack_speed --torch_python=$(TORCH_VENV)/bin/python \
	  --case=conv_small_32_restarts8
	$(BIN)/python -m binaries.attack_speed --torch_python=$(TORCH_VENV)/bin/python \
	  --case=resnet18_224

clean:
	rm -rf $(VENV) $(TORCH_VENV) runs
