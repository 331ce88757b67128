"""Numbers that no config states: what is published, and what these projects settled on, stays what is left out."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from callbacks.cknna import CKNNACallback
from callbacks.ema import EMA
from ldm.alignment import REG, REPA
from ldm.guidance import Autoguidance, Guidance, InternalGuidance
from ldm.module import DiffusionModule
from ldm.samplers import Dopri5, Euler, EulerMaruyama, Heun, time_grid
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.transforms import RandomCrop
from vfm_vae.discriminators.augment import DifferentiableAugmentation
from vfm_vae.discriminators.layers import LocalBatchNorm
from vfm_vae.discriminators.patchgan import PatchGAN
from vfm_vae.discriminators.projected import DiscriminatorHead, ProjectedDiscriminator
from vfm_vae.losses.alignment import adaptive_weight, vf_loss
from vfm_vae.losses.guard import NonFiniteGuard
from vfm_vae.losses.objective import Objective
from vfm_vae.module import TokenizerModule
from vfm_vae.modules.equivariance import EquivarianceRegularizer
from vfm_vae.modules.quantizer import VectorQuantizer

DEFAULTS: dict[Callable[..., Any], dict[str, Any]] = {
    # DiffAugment's (arXiv 2006.10738), as StyleGAN-T's discriminator takes them.
    DifferentiableAugmentation: {
        "brightness": 0.5,
        "saturation": 1.0,
        "contrast": 0.5,
        "translation": 0.125,
        "cutout": 0.2,
    },
    # StyleGAN-T (arXiv 2301.09515), section 3.2.
    ProjectedDiscriminator: {
        "backbone": "vit_small_patch16_224.dino",
        "size": 224,
        "layers": (0, 3, 6, 9, 12),
        "kernel_size": 9,
        "virtual_batch_size": 8,
        "crop_probability": 0.5,
    },
    DiscriminatorHead: {"kernel_size": 9, "virtual_batch_size": 8},
    LocalBatchNorm: {"virtual_batch_size": 8, "eps": 1e-5},
    # VFM-VAE (arXiv 2510.18457), appendix, and its public code.
    PatchGAN: {
        "num_scales": 3,
        "num_layers": 3,
        "base_channels": 64,
        "max_channels": 512,
        "kernel_size": 4,
        "virtual_batch_size": 8,
        "loss": "least_squares",
    },
    Objective: {
        "l1": 1.0,
        "l2": 0.0,
        "perceptual": 0.0,
        "ssim": 0.0,
        "multi_resolution": 0.1,
        "multi_resolution_images": 5_000_000,
        "kl": 1e-6,
        "quantization": 0.0,
        "entropy": 0.0,
        "alignment": 5.0,
        "adaptive_alignment": True,
        "alignment_every": 1,
        "distmat_margin": 0.0,
        "cos_margin": 0.0,
        "adversarial": 1.0,
        "adversarial_patch": 0.0,
        "feature_matching": 0.0,
        "adversarial_from": 0,
        "adaptive_adversarial": False,
    },
    vf_loss: {"distmat_margin": 0.0, "cos_margin": 0.0, "distmat_weight": 1.0, "cos_weight": 1.0},
    adaptive_weight: {"maximum": 1e8},
    EquivarianceRegularizer: {
        "probability": 0.5,
        "prior_probability": 0.25,
        "scales": (0.25, 0.5, 0.75, 1.0),
        "prior_scales": (0.25, 0.5, 0.75),
    },
    NonFiniteGuard: {
        "jump": 10.0,
        "floor": 1e-6,
        "adversarial_limit": 1e4,
        "grace_images": 50_000,
        "max_in_a_row": 100,
    },
    EMA: {"half_life_images": 160_000, "ramp_up": 0.05, "decay": None},
    # VFM-VAE's discrete variant.
    VectorQuantizer: {
        "vocabulary_size": 32768,
        "num_codebooks": 8,
        "width": 64,
        "beta": 0.25,
        "temperature": 0.01,
    },
    TokenizerModule: {
        "evaluate": "mode",
        "rounding": "round",
        "gradient_clip_val": None,
        "order": "simultaneous",
        "latent_noise": 0.0,
        "discriminate_from": None,
    },
    # LightningDiT (arXiv 2501.01423) and its public code; SiT (arXiv 2401.08740) for the samplers.
    DiffusionModule: {
        "times": "lognormal",
        "cosine_weight": 1.0,
        "label_drop": 0.1,
        "statistics_images": 10_000,
        "shift": None,
        "base_weight": 1.0,
        "matrix_optimizer": None,
        "lr_scheduler": None,
    },
    Guidance: {"scale": 1.0, "start": 0.0, "end": 1.0, "channels": None, "cls_scale": 0.0, "inner": None},
    Autoguidance: {"scale": 1.0, "start": 0.0, "end": 1.0, "channels": None, "cls_scale": 0.0},
    InternalGuidance: {"scale": 1.0, "start": 0.0, "end": 1.0, "channels": None, "cls_scale": 0.0},
    time_grid: {"shift": 1.0, "end": 1.0},
    Euler: {"steps": 250, "shift": 1.0, "end": 1.0},
    Heun: {"steps": 250, "shift": 1.0, "end": 1.0},
    Dopri5: {"atol": 1e-6, "rtol": 1e-3},
    EulerMaruyama: {"steps": 250, "last": 0.04, "shift": 1.0},
    # REPA (arXiv 2410.06940) and REG (arXiv 2507.01467).
    REPA: {"weight": 0.5},
    REG: {"weight": 0.5, "cls_weight": 0.03},
    CKNNACallback: {"k": 10},
    # ADM's crops (arXiv 2105.05233) and ours for training.
    ImageNetDataModule: {"min_crop": 0.5, "resampling": "lanczos", "evaluation_crop": "adm", "max_bad_fraction": 0.01},
    RandomCrop: {"min_crop": 0.5, "resampling": "lanczos"},
}


@pytest.mark.parametrize("part", DEFAULTS, ids=lambda part: part.__name__)
def test_what_is_left_out_is_as_published(part: Callable[..., Any]):
    parameters = inspect.signature(part).parameters
    assert {name: parameters[name].default for name in DEFAULTS[part]} == DEFAULTS[part]


def test_parts_that_are_left_out_are_the_default_ones():
    augmentation = ProjectedDiscriminator("vit_photos_patch8_64", size=64, layers=(1,)).augmentation
    assert {name: getattr(augmentation, name) for name in DEFAULTS[DifferentiableAugmentation]} == DEFAULTS[
        DifferentiableAugmentation
    ]
