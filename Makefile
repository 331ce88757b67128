# The developer's menu: `make` or `make help` lists it. ARGS="--option=value …" goes on to the program of a target.
PYTHON ?= python3
VENV ?= .venv
DATA ?= data/imagenet
GPUS ?= 1
STAGE ?= patchgan
ARGS ?=
RUN ?= epochs64
# What a run needs beside the latents: a VFM's features, or captions.
BESIDE := $(if $(filter reg% best,$(RUN)),_reg)$(if $(filter t2i_%,$(RUN)),_text)
RUN_BASE = $(if $(filter _reg,$(BESIDE)),reg,$(if $(findstring ditdh,$(RUN)),ditdh,lightningdit))
# A variant of the tokenizer's training, with runs of its own, and of what is trained on its latents.
RECIPES := as_published discrete
RECIPE ?=
$(if $(filter-out $(RECIPES),$(RECIPE)),$(error RECIPE: one of $(RECIPES), or none; given $(RECIPE)))
# Another tokenizer in its place (target baseline), likewise.
BASELINES := sdvae vavae rae
BASELINE ?=
$(if $(filter-out $(BASELINES),$(BASELINE)),$(error BASELINE: one of $(BASELINES), or none; given $(BASELINE)))
OTHER := $(strip $(RECIPE) $(BASELINE))
$(if $(word 2,$(OTHER)),$(error RECIPE, BASELINE: one of the two at most; given $(OTHER)))
RUNS := runs$(if $(OTHER),/$(OTHER))
PUBLISHED := $(if $(filter as_published,$(RECIPE)),_published)

# Paths may have spaces: a word of the shell, in which a leading ~ is still the home folder, and one of make itself.
space := $(subst ,, )
quoted = '$(subst ','\'',$(1))'
path = $(if $(filter ~/%,$(firstword $(1))),$(patsubst '~/%,~/'%,$(quoted)),$(quoted))
escaped = $(subst $(space),\ ,$(1))
BIN := $(call path,$(VENV)/bin)
READY := $(call escaped,$(VENV))/.ready
# Refuses a variable that is none of some words, where a target takes it.
one_of = $(if $(and $(filter 1,$(words $($(1)))),$(filter $(2),$($(1)))),,$(error $(1): one of $(2); given '$($(1))'))

# glibc returns large blocks to the kernel, which zeroes their pages again in every step: a fifth of the time on CPU.
TUNED := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592

TOKENIZER := $(TUNED) $(BIN)/python -m vfm_vae
LDM := $(TUNED) $(BIN)/python -m ldm
FIT := $(TOKENIZER) fit

# A folder of tar shards or of images; no GPU, one, or several of one machine.
SHARDS := $(foreach folder,. train,$(wildcard $(call escaped,$(DATA))/$(folder)/*.tar))
IMAGENET := -c configs/data/$(if $(strip $(SHARDS)),imagenet_wds,imagenet).yaml --data.root $(call path,$(DATA))
CAPTIONED := -c configs/data/captions$(if $(strip $(SHARDS)),_wds).yaml --data.root $(call path,$(DATA))
one_or_many = $(if $(filter 0,$(GPUS)),cpu,$(if $(filter 1,$(GPUS)),gpu,$(1)))
TRAINER = -c configs/trainer/$(call one_or_many,ddp8).yaml $(DEVICES)
TRAINER_LDM = -c configs/trainer/$(call one_or_many,ddp8_ldm).yaml $(DEVICES)
DEVICES := $(if $(filter-out 0 1,$(GPUS)),--trainer.devices=$(GPUS))
# Images or latents that a GPU takes at a time: what the configs say, which 80 GB hold, or fewer. Steps stay as large, and
# validations as many steps apart.
MICRO ?= $(if $(filter 0,$(GPUS)),8)
AT_A_TIME := $(if $(MICRO),--data.micro_batch_size=$(MICRO))
COUNT := $(if $(filter 0,$(GPUS)),1,$(GPUS))
EVALUATED := $(shell expr $(or $(MICRO),64) \* $(COUNT) 2>/dev/null)
MEASURED := --data.val_batch_size=$(or $(EVALUATED),$(error GPUS, MICRO: whole numbers; given '$(GPUS)', '$(MICRO)'))
FORMER_weak := strong
FORMER_ssim := weak
FORMER_patchgan := ssim
STAGES := strong weak ssim patchgan
OF_STAGE = $(if $(BASELINE),$(RUNS)/tokenizer,$(call one_of,STAGE,$(STAGES))$(RUNS)/$(STAGE))
RUN_CONFIGS := $(filter-out cknna ditdh lightningdit reg samples sweep t2i_test test%,$(basename $(notdir $(wildcard configs/ldm/*.yaml))))
OF_RUN = $(call one_of,RUN,$(RUN_CONFIGS))$(RUNS)/ldm/$(RUN)
former = $(if $(FORMER_$(1)),--model.init_from=$(RUNS)/$(FORMER_$(1))/checkpoints/last.ckpt)
VARIANT = $(if $(RECIPE),-c configs/vfm_vae/$(RECIPE).yaml $(call former,$@))
RUN_BASES = $(if $(filter _text,$(BESIDE)),,-c configs/ldm/$(RUN_BASE).yaml \
  $(if $(filter lightningdit,$(RUN_BASE)),-c configs/data/latents.yaml))
VARIANT_LATENTS := $(if $(OTHER),--run.output=$(RUNS)/latents$(BESIDE))
VARIANT_LDM = $(if $(OTHER),--data.root=$(RUNS)/latents$(BESIDE) --run.folder=$(RUNS)/ldm \
  --model.tokenizer.checkpoint=$(OF_STAGE)/checkpoints/last.ckpt $(LATENT_$(BASELINE)))
LATENT_sdvae := --model.model.in_channels=4 --model.model.input_size=32 --model.model.patch_size=2
LATENT_rae := --model.model.in_channels=768
COMPLETED_vavae := sdvae
BASELINE_CONFIGS = $(call one_of,BASELINE,$(BASELINES))-c configs/vfm_vae/base.yaml \
  $(foreach name,$(COMPLETED_$(BASELINE)) $(BASELINE),-c configs/vfm_vae/baselines/$(name).yaml)
STAGE_FIT = $(FIT) -c configs/vfm_vae/base.yaml -c configs/vfm_vae/$@.yaml $(IMAGENET) $(TRAINER) $(AT_A_TIME) $(VARIANT) \
  $(ARGS)

# What a report is on: a list of folders, in which the shell's quotes keep one with spaces together; or one folder.
REPORT := $(BIN)/python -m vfm_vae.report
REPORTED = $(if $(filter file,$(origin RUN)),runs/demo,$(if $(wildcard $(call escaped,$(RUN))),$(call path,$(RUN)),$(RUN)))

# What the page shows, likewise.
SHOWN = $(if $(filter-out file,$(origin RUN)),$(if $(wildcard $(call escaped,$(RUN))),$(call path,$(RUN)),$(RUN)))

# The demo's diffusion model: lightningdit, or reg.
DENOISER ?= lightningdit
REG = $(call one_of,DENOISER,lightningdit reg)$(filter reg,$(DENOISER))
DEMO_LDM = -c configs/demo/ldm.yaml $(if $(REG),-c configs/demo/reg.yaml)
DEMO_NAME = $(if $(REG),reg,ldm)
DEMO_GUIDED = $(DEMO_LDM) -c configs/demo/$(DEMO_NAME)_guided.yaml

# A process for each core, each with its own files of tests; ARGS="-n 0" runs them one after the other.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install demo demo-tokenizer demo-text tokenizer-study ablation test test-all lint format bench bench-gpu app report tensorboard docs embedded-vfm embedded-judge strong weak ssim patchgan baseline latents ldm samples sweep evaluate evaluate-tokenizer evaluate-ldm clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(READY): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(call path,$(VENV))
	$(BIN)/pip install --quiet --editable .[dev]
	@touch '$@'

install: $(READY) ## make .venv with the package and what develops it

# Both stages go on where they were stopped, and end at once where they are complete.
demo-tokenizer: install
	$(FIT) -c configs/demo/tokenizer.yaml -c configs/demo/strong.yaml $(ARGS)
	$(FIT) -c configs/demo/tokenizer.yaml -c configs/demo/weak.yaml $(ARGS)

demo: demo-tokenizer ## train tokenizer and diffusion model on the embedded photographs, and sample; results in runs/demo
	$(TOKENIZER) predict -c runs/demo/weak/config.yaml -c configs/demo/latents$(if $(REG),_reg).yaml \
	  --ckpt_path runs/demo/weak/checkpoints/last.ckpt $(ARGS)
	$(TOKENIZER) test -c runs/demo/weak/config.yaml -c configs/demo/weak_test.yaml \
	  --ckpt_path runs/demo/weak/checkpoints/last.ckpt $(ARGS)
	$(LDM) fit $(DEMO_LDM) -c configs/demo/ldm_train.yaml --run.name=$(DEMO_NAME) $(ARGS)
	$(LDM) validate $(DEMO_GUIDED) $(ARGS)
	$(LDM) predict $(DEMO_GUIDED) $(ARGS)
	$(BIN)/python -m vfm_vae.convert runs/demo/weak/checkpoints/last.ckpt --out runs/demo/pretrained/tokenizer
	$(BIN)/python -m ldm.convert runs/demo/$(DEMO_NAME)/checkpoints/last.ckpt --out runs/demo/pretrained/$(DEMO_NAME) \
	  --class_names data/photos/train
	@echo "Reconstructions: runs/demo/weak/images/val.png · samples by class: runs/demo/$(DEMO_NAME)/images/samples_guidance_*.png"
	@echo "Samples as files: runs/demo/samples$(if $(REG),_reg){/,.npz} · numbers: runs/demo/metrics.json · to try them: make app · TensorBoard: make tensorboard"
	$(REPORT) runs/demo

demo-text: demo-tokenizer ## train a text-to-image model on the photographs' captions, and draw what prompts ask for; results in runs/demo
	$(TOKENIZER) predict -c runs/demo/weak/config.yaml -c configs/demo/latents_text.yaml \
	  --ckpt_path runs/demo/weak/checkpoints/last.ckpt $(ARGS)
	$(LDM) fit -c configs/demo/text.yaml -c configs/demo/text_train.yaml $(ARGS)
	$(BIN)/python -m vfm_vae.embedded.captions --prompts runs/demo/prompts.jsonl
	$(LDM) predict -c configs/demo/text.yaml -c configs/demo/text_guided.yaml $(ARGS)
	$(BIN)/python -m vfm_vae.metrics.prompted runs/demo/samples_text --prompts runs/demo/prompts.jsonl \
	  --metrics runs/demo/metrics.json --entry text_guided --picture runs/demo/text_samples.png
	$(BIN)/python -m ldm.convert runs/demo/text/checkpoints/last.ckpt --out runs/demo/pretrained/text
	@echo "Samples beside their prompts: runs/demo/text_samples.png · numbers: runs/demo/metrics.json · TensorBoard: make tensorboard"
	$(REPORT) runs/demo

# On ImageNet, where DATA is given; then one command runs at a time, on all GPUs.
GIVEN := $(filter-out file,$(origin DATA))
STUDY = $(if $(GIVEN),study/imagenet/plan.yaml --jobs=1 --tokenizers="$(IMAGENET) $(TRAINER) $(AT_A_TIME)" \
  --denoisers="$(TRAINER_LDM) $(AT_A_TIME)",study/photos.yaml)

tokenizer-study: install ## train tokenizers, a diffusion model on each, and compare, on the embedded photographs, or: DATA=/path GPUS=8
	$(TUNED) $(BIN)/python -m ldm.study $(STUDY) $(ARGS)

ablation: install ## add to a diffusion model what came after the paper, one thing at a time, and compare, on the embedded photographs
	$(TUNED) $(BIN)/python -m ldm.study study/ablation.yaml $(ARGS)

test: install ## run the fast tests
	$(TUNED) $(BIN)/pytest $(PARALLEL) $(ARGS)

test-all: install ## run all tests that this machine can, the slow ones too
	$(TUNED) $(BIN)/pytest $(PARALLEL) -m "not gpu or gpu" $(ARGS)

lint: install ## check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config setup.cfg

format: install ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## measure what is claimed to be fast, as ratios within one run
	$(BIN)/python tests/bench/modulated.py
	$(TUNED) $(BIN)/python tests/bench/modulated.py
	$(TUNED) $(BIN)/python tests/bench/step.py
	$(BIN)/python tests/bench/loader.py
	$(BIN)/python tests/bench/guidance.py
	$(BIN)/python tests/bench/cknna.py
	$(BIN)/python tests/bench/evaluation.py
	$(TUNED) $(BIN)/python tests/bench/busy.py

bench-gpu: install ## measure training, sampling and evaluation at full size on one GPU, in six minutes; runs/bench_gpu.json
	$(BIN)/python tests/bench/gpu.py $(ARGS)

app: install ## a page to try models on, at http://127.0.0.1:7860, the demo's or others: make app RUN="folder folder"
	$(BIN)/python -m vfm_vae app $(SHOWN) $(ARGS)

report: install ## one HTML file on a run, or on several side by side: make report RUN=runs/demo | RUN="runs/a runs/b"
	$(REPORT) $(REPORTED) $(ARGS)

# Its faster reader would show what runs have logged beyond the checkpoint that they went back to.
tensorboard: install ## show the runs at http://localhost:6006/#custom_scalars
	@echo "The page of charts: http://localhost:6006/#custom_scalars"
	$(BIN)/tensorboard --logdir runs --load_fast=false $(ARGS)

docs: install ## build the documentation as a site, in site/; make docs ARGS=serve shows it at http://localhost:8000
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(ARGS),build)

embedded-vfm: install ## pretrain the embedded ViT again and draw its features
	$(BIN)/python -m vfm_vae.embedded.pretrain --picture docs/embedded_pca.png $(ARGS)

embedded-judge: install ## train the judge again, the network that measures and that nothing is trained with
	$(BIN)/python -m vfm_vae.embedded.train_judge $(ARGS)

strong: install ## stage 1, strong alignment, on ImageNet: make strong DATA=/path GPUS=8 [MICRO=4] [RECIPE=as_published] (GPUS=0: CPU)
	$(STAGE_FIT)

weak: install ## stage 2, weak alignment, from the strong stage
	$(STAGE_FIT)

ssim: install ## stage 3, SSIM fine-tuning, from the weak stage
	$(STAGE_FIT)

patchgan: install ## stage 4, PatchGAN fine-tuning, from the SSIM stage
	$(STAGE_FIT)

baseline: install ## another tokenizer: make baseline BASELINE=sdvae|vavae|rae DATA=/path GPUS=8; then latents, ldm, … with this BASELINE
	$(FIT) $(BASELINE_CONFIGS) $(IMAGENET) $(TRAINER) $(AT_A_TIME) $(ARGS)

latents: install ## cache the latents of the data that STAGE was trained on, with features for RUN=reg…|best, or of captioned data in DATA for RUN=t2i_…: make latents GPUS=8
	$(TOKENIZER) predict -c $(OF_STAGE)/config.yaml $(if $(filter _text,$(BESIDE)),$(CAPTIONED)) -c configs/vfm_vae/latents$(BESIDE).yaml $(TRAINER) $(MEASURED) \
	  --trainer.precision=32-true $(VARIANT_LATENTS) \
	  --ckpt_path $(OF_STAGE)/checkpoints/last.ckpt $(ARGS)

ldm: install ## train a denoiser on cached latents: make ldm RUN=epochs64|epochs80|epochs560|reg80|reg480|reg640|best|rae_ditdh_xl|t2i_lumina|t2i_lightningdit GPUS=8
	$(LDM) fit $(RUN_BASES) -c configs/ldm/$(notdir $(OF_RUN)).yaml $(TRAINER_LDM) $(AT_A_TIME) $(VARIANT_LDM) $(ARGS)

samples: install ## draw 50 000 samples from a trained denoiser: make samples RUN=epochs64 GPUS=8; or RUN=t2i_lumina ARGS='--prompt "a fox"'
	$(LDM) predict -c $(OF_RUN)/config.yaml $(if $(filter _text,$(BESIDE)),,-c configs/ldm/samples.yaml) $(TRAINER_LDM) $(MEASURED) \
	  --trainer.precision=32-true \
	  --ckpt_path $(OF_RUN)/checkpoints/last.ckpt --run.output=$(OF_RUN)/samples $(ARGS)

sweep: install ## find the best guidance of a trained diffusion model: make sweep RUN=epochs64 GPUS=8
	$(LDM) sweep -c $(OF_RUN)/config.yaml -c configs/ldm/sweep.yaml $(TRAINER_LDM) $(MEASURED) \
	  --trainer.precision=32-true \
	  --ckpt_path $(OF_RUN)/checkpoints/last.ckpt $(ARGS)

evaluate: evaluate-tokenizer evaluate-ldm ## measure tokenizer and diffusion model: make evaluate STAGE=patchgan RUN=epochs64 GPUS=8

evaluate-tokenizer: install ## rFID and its kin, alignment, probes of a trained tokenizer
	$(TOKENIZER) test -c $(OF_STAGE)/config.yaml -c configs/vfm_vae/test$(PUBLISHED).yaml $(TRAINER) $(MEASURED) \
	  --trainer.precision=32-true \
	  --ckpt_path $(OF_STAGE)/checkpoints/last.ckpt $(ARGS)

evaluate-ldm: install ## gFID and its kin of a trained LightningDiT
	$(LDM) test -c $(OF_RUN)/config.yaml -c configs/ldm/$(if $(filter _text,$(BESIDE)),t2i_test,test$(PUBLISHED)).yaml $(TRAINER_LDM) $(MEASURED) \
	  --trainer.precision=32-true \
	  --ckpt_path $(OF_RUN)/checkpoints/last.ckpt $(ARGS)

clean: ## remove caches and the demo's results, not other runs
	rm -rf runs/demo build site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache *.egg-info
	find . -name __pycache__ -not -path ./$(call quoted,$(VENV)/*) -prune -exec rm -rf {} +
