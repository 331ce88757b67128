"""The tokenizer's objective: its losses and their weights."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from vfm_vae.contracts import Aligned, HasLastDecodingWeight, Tokenizer
from vfm_vae.images import Interpolation
from vfm_vae.losses.alignment import adaptive_weight, settle, vf_loss
from vfm_vae.losses.reconstruction import (
    LPIPSLoss,
    SSIMLoss,
    VFMPerceptualLoss,
    l1,
    l2,
    multi_resolution_l1,
)
from vfm_vae.modules.quantizer import QuantizedPosterior
from vfm_vae.options import at_least
from vfm_vae.types import Decoded, Posterior, Variational, VFMFeatures


class Objective(nn.Module):
    """Weights of the tokenizer's losses (VFM-VAE, section 3.4). A loss of weight 0 is not computed.

    Args:
        l1: Weight of the mean absolute error.
        l2: Weight of the mean squared error.
        perceptual: Weight of the perceptual distance.
        perceptual_loss: The perceptual distance. Validation reports it under its own name.
        ssim: Weight of 1 - SSIM.
        multi_resolution: Weight of the L1 error of the images at lower resolutions.
        multi_resolution_images: The images at lower resolutions are no longer compared after so many training images.
        kl: Weight of the divergence from N(0, I), summed over latent dimensions. For a discrete latent it is a
            constant.
        quantization: Weight of the distance between features and codewords, for a discrete latent.
        entropy: Weight of the entropy loss, for a discrete latent.
        alignment: Weight of the alignment with the VFM's final tokens.
        adaptive_alignment: Whether to multiply that weight by the ratio of gradient norms between reconstruction and
            alignment.
        alignment_every: This ratio is computed again every so many batches. The published 1 costs a second backward
            pass through the decoder in every batch.
        distmat_margin: Margin of the alignment's distance matrix term.
        cos_margin: Margin of the alignment's cosine term.
        adversarial: Weight of the projected discriminator's adversarial loss.
        adversarial_patch: Weight of the PatchGAN's adversarial loss.
        feature_matching: Weight of the distance between the PatchGAN's features of real and of generated images.
        adversarial_from: Adversarial losses and feature matching are weighed after so many training images, over all
            stages.
        adaptive_adversarial: Whether to multiply the weights of the two adversarial losses by the ratio of gradient
            norms between reconstruction and adversarial loss, as in VQGAN.

    Raises:
        ValueError: if an option lies outside its range, or a weight has no loss to weigh.
    """

    def __init__(
        self,
        l1: float = 1.0,
        l2: float = 0.0,
        perceptual: float = 0.0,
        perceptual_loss: LPIPSLoss | VFMPerceptualLoss | None = None,
        ssim: float = 0.0,
        multi_resolution: float = 0.1,
        multi_resolution_images: int = 5_000_000,
        kl: float = 1e-6,
        quantization: float = 0.0,
        entropy: float = 0.0,
        alignment: float = 5.0,
        adaptive_alignment: bool = True,
        alignment_every: int = 1,
        distmat_margin: float = 0.0,
        cos_margin: float = 0.0,
        adversarial: float = 1.0,
        adversarial_patch: float = 0.0,
        feature_matching: float = 0.0,
        adversarial_from: int = 0,
        adaptive_adversarial: bool = False,
    ):
        super().__init__()
        self.margins = {"distmat_margin": distmat_margin, "cos_margin": cos_margin}
        self.weights = {
            "l1": l1,
            "l2": l2,
            "perceptual": perceptual,
            "ssim": ssim,
            "multi_resolution": multi_resolution,
            "kl": kl,
            "quantization": quantization,
            "entropy": entropy,
            "alignment": alignment,
            "adversarial": adversarial,
            "adversarial_patch": adversarial_patch,
            "feature_matching": feature_matching,
        }
        starts = {"multi_resolution_images": multi_resolution_images, "adversarial_from": adversarial_from}
        at_least(0, **starts, **self.weights, **self.margins)
        at_least(1, alignment_every=alignment_every)
        if perceptual and perceptual_loss is None:
            raise ValueError(f"perceptual={perceptual:g} needs a perceptual_loss; give one, or set perceptual to 0")
        if adaptive_adversarial and not (l1 or l2 or perceptual or ssim):
            raise ValueError("adaptive_adversarial: there is no reconstruction loss to compare with; set it to false")
        self.perceptual_loss = perceptual_loss
        self.ssim_loss = SSIMLoss()
        self.multi_resolution_images = multi_resolution_images
        self.adaptive_alignment, self.alignment_every = adaptive_alignment, alignment_every
        self.adversarial_from, self.adaptive_adversarial = adversarial_from, adaptive_adversarial
        self._kept_weight: Tensor | None = None
        self._kept_for = 0.0  # more batches

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Checks that a tokenizer has what its losses look at.

        Raises:
            ValueError: if not.
        """
        kind = type(tokenizer).__name__
        if self.weights["alignment"] and not (isinstance(tokenizer, Aligned) and tokenizer.vfm is not None):
            raise ValueError(
                f"objective.alignment: {self.weights['alignment']:g} aligns latents to a VFM, but this "
                f"{kind} has none; set it to 0"
            )
        if not self.adaptive_adversarial:
            return
        if not isinstance(tokenizer, HasLastDecodingWeight):
            raise ValueError(
                f"objective.adaptive_adversarial: it compares gradients at the decoder's last weight, but this {kind} "
                "has no last_decoding_weight; set it to false"
            )
        if not tokenizer.last_decoding_weight.requires_grad:
            raise ValueError(
                "objective.adaptive_adversarial: it compares gradients at the decoder's last weight, which "
                "model.train_only leaves out; set it to false"
            )

    def reconstruction(
        self, decoded: Decoded, target: Tensor, interpolation: Interpolation, images_seen: int
    ) -> dict[str, Tensor]:
        """Unweighted reconstruction terms by name.

        Args:
            decoded: The decoder's images.
            target: What they should be, `[B, 3, H, W]` in [-1, 1].
            interpolation: How targets are resized.
            images_seen: Images the tokenizer was trained on.

        Raises:
            ValueError: if multi-scale images are weighed, and there are none.
        """
        losses = {"l1": l1, "l2": l2, "perceptual": self.perceptual_loss, "ssim": self.ssim_loss}
        terms: dict[str, Callable[[], Tensor]] = {
            name: partial(loss, decoded.image, target) for name, loss in losses.items() if loss is not None
        }
        if images_seen < self.multi_resolution_images:
            if self.weights["multi_resolution"] and not decoded.multiscale:
                raise ValueError("objective.multi_resolution: the tokenizer decodes only one resolution; set it to 0")
            terms["multi_resolution"] = partial(multi_resolution_l1, decoded.multiscale, target, interpolation)
        return {name: term() for name, term in terms.items() if self.weights[name]}

    def latent(
        self,
        posterior: Posterior,
        z: Tensor,
        features: VFMFeatures | None,
        tokenizer: Tokenizer,
        reconstruction: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Unweighted terms on the latent by name, and the numbers that explain them.

        Args:
            posterior: The posterior of the untransformed images.
            z: Latents drawn from it, `[B, C, h, w]`.
            features: The VFM's, of the same images; None where there is none, and no alignment.
            tokenizer: Made the posterior; where alignment is weighed, it is `Aligned`.
            reconstruction: Weighted sum of the reconstruction terms.

        Returns:
            Terms, to be weighted; the alignment term already includes its adaptive weight. Then scalars to log.

        Raises:
            ValueError: if losses are weighed that this posterior does not have.
        """
        terms: dict[str, Tensor] = {}
        extra: dict[str, Tensor] = {}
        if self.weights["kl"]:
            if not isinstance(posterior, Variational):
                raise ValueError("objective.kl: the tokenizer's posterior has no KL divergence; set it to 0")
            terms["kl"] = posterior.kl().mean()
        if isinstance(posterior, QuantizedPosterior):
            extra["codebook_usage"] = posterior.usage
            losses = {"quantization": "vq_loss", "entropy": "entropy_loss"}  # properties, computed where they count
            terms |= {name: getattr(posterior, loss) for name, loss in losses.items() if self.weights[name]}
        elif self.weights["quantization"] or self.weights["entropy"]:
            raise ValueError("quantization, entropy: the tokenizer has no quantizer; set both to 0")
        if self.weights["alignment"]:
            assert isinstance(tokenizer, Aligned) and features is not None  # else there would be no such weight
            loss = vf_loss(tokenizer.align(z), tokenizer.alignment_target(features, z), **self.margins)
            extra |= {"alignment_distance": loss.distance.detach(), "alignment_cosine": loss.cosine.detach()}
            terms["alignment"] = loss.loss
            if self.adaptive_alignment:
                weight = self._alignment_weight(reconstruction, loss.loss, tokenizer.last_encoding_weight)
                extra |= {"alignment": loss.loss.detach(), "alignment_weight": weight}
                terms["alignment"] = weight * loss.loss
        return terms, extra

    def balanced(
        self, terms: Mapping[str, Tensor], image: Tensor, tokenizer: Tokenizer, reconstruction: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Adversarial terms that include their adaptive weights (VQGAN, arXiv 2012.09841, equation 7).

        Args:
            terms: The generator's adversarial terms by name.
            image: What they are of, `[B, 3, H, W]`.
            tokenizer: Decoded it; where weights are adaptive, it `HasLastDecodingWeight`.
            reconstruction: Weighted sum of the reconstruction terms.

        Returns:
            Terms, to be weighted. Then the adaptive weights by name, each in [0, 1e4].
        """
        balanced, ratios = dict(terms), {}
        for name in ("adversarial", "adversarial_patch"):
            if self.adaptive_adversarial and self.weights[name] and name in terms:
                assert isinstance(tokenizer, HasLastDecodingWeight)  # `check_tokenizer` was asked
                term = settle(terms[name], [image], retain_graph=True)  # features are matched on the same graph
                ratio = adaptive_weight(reconstruction, term, tokenizer.last_decoding_weight, maximum=1e4)
                balanced[name], ratios[f"{name}_weight"] = ratio * term, ratio
        return balanced, ratios

    def _alignment_weight(self, reconstruction: Tensor, alignment: Tensor, weight: Tensor) -> Tensor:
        """The adaptive weight, computed again if it was kept for `alignment_every` batches."""
        if self._kept_for == 0 or self._kept_weight is None:
            new = adaptive_weight(reconstruction, alignment, weight)
            old = new.new_zeros(()) if self._kept_weight is None else self._kept_weight.to(new, non_blocking=True)
            # A weight that is not finite, in a batch that the guard refuses, must not spoil later batches.
            self._kept_weight = new if self.alignment_every == 1 else torch.where(new.isfinite(), new, old)
            self._kept_for = self.alignment_every
        self._kept_for -= 1
        return self._kept_weight

    def progress(self) -> dict[str, float | int]:
        """What a run that goes on has to know: the kept weight, and for how many batches more."""
        return {} if self._kept_weight is None else {"weight": float(self._kept_weight), "batches": self._kept_for}

    def go_on(self, progress: Mapping[str, float | int]) -> None:
        """Continues from `progress`; from none, the weight is computed anew."""
        self._kept_weight = torch.tensor(progress["weight"]) if progress else None
        self._kept_for = progress["batches"] if progress else 0

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Weighted sum of terms, a float32 scalar; zero where there are none."""
        return sum((self.weights[name] * term.float() for name, term in terms.items()), torch.zeros(()))
