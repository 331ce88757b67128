"""What the numbers mean: for each known name what it is, which way is better, and what it can be compared with."""

import re
from typing import Literal, NamedTuple

Better = Literal["up", "down"] | None


class Known(NamedTuple):
    """What is known of a number.

    Attributes:
        title: What people call it.
        meaning: What it is, in plain words.
        unit: Its unit; empty where it has none.
        better: Which way is better; None where neither is, or it depends.
        beside: What it can be compared with.
    """

    title: str
    meaning: str
    unit: str = ""
    better: Better = None
    beside: str = ""


SAME = "values of runs that were measured with the same settings"
SAME_LOSS = "the same loss with the same weights and data"
FEATURES = "the same network, reference and count of images; it stands beside no published number"
ADM = "published numbers of 50 000 samples against ADM's reference, where labels and guidance agree"
RECONSTRUCTED = "rFID of tokenizers on 50 000 validation images, against their own reconstructions"
VFM = "CKNNA with the same VFM, the same k and as many images"

# By pattern of the name without `val/` or `test/`; the first one that matches counts.
KNOWN: dict[str, Known] = {
    r"psnr": Known(
        "PSNR",
        "How close each reconstruction is to its image, pixel by pixel; mean over images",
        "dB",
        "up",
        "published PSNR on the same images, size and crop",
    ),
    r"psnr_thumbnail": Known("PSNR, thumbnails", "The same for the decoder's smallest image", "dB", "up", SAME),
    r"ssim": Known(
        "SSIM",
        "Similarity of local structure between image and reconstruction, at most 1; mean over images",
        "",
        "up",
        "published SSIM on the same images, size and crop",
    ),
    r"lpips": Known(
        "LPIPS",
        "Perceptual distance between image and reconstruction on VGG-16's features",
        "",
        "down",
        "published LPIPS (VGG) on the same images and size",
    ),
    r"perceptual_(?P<of>.+)": Known(
        "Perceptual distance, {of}",
        "Distance between image and reconstruction on this network's features",
        "",
        "down",
        "values on the same network",
    ),
    r"fd_(?P<of>[^/]+)/.+": Known(
        "FD of samples, {of}",
        "Fréchet distance between this network's features of samples and of real images",
        "",
        "down",
        FEATURES,
    ),
    r"fd_(?P<of>.+)": Known(
        "FD, {of}",
        "Fréchet distance between this network's features of made images and of real ones",
        "",
        "down",
        FEATURES,
    ),
    r"rfid": Known(
        "rFID", "Fréchet distance of reconstructions to their images on Inception", "", "down", RECONSTRUCTED
    ),
    r"rsfid": Known("rsFID", "The same on Inception's spatial features", "", "down", RECONSTRUCTED),
    r"ris": Known(
        "Inception Score of reconstructions", "How sure and how varied Inception's classes are", "", "up", SAME
    ),
    r"gfid(/.+)?": Known("gFID", "Fréchet distance of samples to real images on Inception", "", "down", ADM),
    r"sfid(/.+)?": Known("sFID", "The same on Inception's spatial features", "", "down", ADM),
    r"inception_score(/.+)?": Known(
        "Inception Score", "How sure and how varied Inception's classes of the samples are", "", "up", ADM
    ),
    r"precision(/.+)?": Known(
        "Precision", "Share of made images that lie among the real ones, by three neighbours", "", "up", ADM
    ),
    r"recall(/.+)?": Known(
        "Recall", "Share of real images that lie among the made ones, by three neighbours", "", "up", ADM
    ),
    r"precision_(?P<of>.+)": Known(
        "Precision, {of}",
        "Share of made images that lie among the real ones, by three neighbours in this network's features",
        "",
        "up",
        FEATURES,
    ),
    r"recall_(?P<of>.+)": Known(
        "Recall, {of}",
        "Share of real images that lie among the made ones, by three neighbours in this network's features",
        "",
        "up",
        FEATURES,
    ),
    r"clip_score": Known(
        "CLIP score", "How well each sample fits its prompt or caption, by CLIP", "", "up", "scores by the same CLIP"
    ),
    r"subject_accuracy(_.+)?": Known(
        "Subjects of prompts", "How often a sample shows the subject that its prompt names, at most 1", "", "up", SAME
    ),
    r"place(_nearby)?_accuracy(_.+)?": Known(
        "Places of prompts",
        "How often a sample shows the part of the photograph that its prompt names; `shuffled` is the control",
        "",
        "up",
        SAME,
    ),
    r"class_accuracy": Known(
        "Class accuracy",
        "How often a linear probe finds the class that a sample was drawn for, at most 1",
        "",
        "up",
        SAME,
    ),
    r"cknna/latent.*": Known(
        "CKNNA of the latent",
        "How far images that are neighbours in the latent are neighbours for the VFM, too",
        "",
        "up",
        VFM,
    ),
    r"cknna/block_(?P<of>\d+).*": Known(
        "CKNNA of block {of}", "The same for the denoiser's features after this block", "", None, VFM
    ),
    r"cknna/(?P<of>.+)": Known("CKNNA, {of}", "Alignment of these features with a VFM's", "", "up", VFM),
    r"se_cknna/(?P<of>.+)": Known(
        "SE-CKNNA, {of}",
        "CKNNA of latents of transformed images with the VFM's features of the clean ones",
        "",
        "up",
        f"{VFM}; published code computes no mean over transformations",
    ),
    r"robustness/(?P<of>.+)": Known(
        "Robustness, {of}", "Cosine similarity of features of clean and transformed images", "", "up", SAME
    ),
    r"probe/(?P<of>.+)": Known(
        "Linear probe, {of}",
        "Share of validation images that a linear classifier on these features gets right",
        "",
        "up",
        "the probe on the VFM itself, of the same run",
    ),
    r"loss_by_time/.*_(?P<of>[\d.]+)": Known(
        "Loss from time {of}",
        "Squared error of the velocity in this tenth of time; 0 is noise, 1 data",
        "",
        "down",
        "the same times on the same latents",
    ),
    r"loss": Known(
        "Loss", "The training objective on validation data", "", "down", "the same objective on the same latents"
    ),
    r"train/loss": Known(
        "Loss in training", "The whole objective in the last batch that was logged", "", "down", SAME_LOSS
    ),
    r"train/loss_(?P<of>.+)": Known("Loss, {of}", "A part of the objective, without its weight", "", None, SAME_LOSS),
    r"train/alignment_weight": Known("Weight of the alignment loss", "How strongly the latent is drawn to the VFM"),
    r"train/alignment_distance": Known(
        "Alignment, distances", "How far distances between positions of the latent are from those of the VFM's tokens"
    ),
    r"train/alignment_cosine": Known("Alignment, cosine", "How far projected latents point away from the VFM's tokens"),
    r"train/alignment(_.+)?": Known("Alignment in training", "The alignment loss without its weight"),
    r"train/logits_(?P<of>.+)": Known("Logits, {of}", "What the discriminator makes of these images on average"),
    r"train/grad_norm(_discriminator)?": Known("Gradient norm", "Norm of all gradients of a step, before clipping"),
    r"train/clip_share.*": Known("Clipped steps", "Share of steps whose gradients were clipped"),
    r"train/lr.*": Known("Learning rate", "Of the last step"),
    r"train/skipped_steps": Known(
        "Refused steps", "Steps that were left out so far, their losses or gradients not being finite"
    ),
    r"(train|validate|test|predict)/(device/)?samples_per_sec": Known(
        "Images per second", "Speed over the last batches", "1/s", "up", "the same model, batch and device"
    ),
    r"(train|validate|test|predict)/(device/)?batches_per_sec": Known(
        "Batches per second", "Speed over the last batches", "1/s", "up", "the same model, batch and device"
    ),
    r"(train|validate|test|predict)/(device/)?flops_per_sec": Known(
        "Operations per second", "Products alone, at two operations per multiplication and addition", "1/s", "up", SAME
    ),
    r"train/device/mfu": Known("MFU", "Share of the device's peak operations that training uses", "", "up", SAME),
    r"train/device/memory_gb": Known("Memory", "The most that tensors took on rank zero's GPU, in 10⁹ bytes", "GB"),
    r"images_seen": Known("Images seen", "Training images over all ranks and stages"),
    r"epoch": Known("Epoch", "Passes over the training data"),
    r"step": Known("Step", "Steps of the optimiser in this stage"),
}


SPELLED = {"l1": "L1", "l2": "L2", "kl": "KL", "mse": "squared error", "multi_resolution": "smaller images"}
SPELLED |= {f"discriminator_{kind}": f"discriminator on {kind} images" for kind in ("real", "generated")}


def bare(name: str) -> str:
    """A number's name without the part of the data that it was measured on."""
    return re.sub(r"^(val|test)/", "", name)


def known(name: str) -> Known | None:
    """What is known of a number by its name in `metrics.json`; None for one that is not ours."""
    short = bare(name)
    for pattern, found in KNOWN.items():
        if match := re.fullmatch(pattern, short):
            of = match.groupdict().get("of")
            return found if of is None else found._replace(title=found.title.format(of=SPELLED.get(of, of)))
    return None


GROUPS = {
    "Quality": r"(psnr|ssim|lpips|perceptual_|fd_|r?s?fid|ris|gfid|incep|precis|recall|clip_s|class_acc|subj|place)",
    "Alignment with the VFM": r"cknna/(?!block_)",
    "CKNNA of blocks": r"cknna/block_",
    "SE-CKNNA": r"se_cknna/",
    "Robustness": r"robustness/",
    "Linear probes": r"probe/",
    "Speed": r"(train|validate|test|predict)/(device/|samples|batches|flops)",
    "Loss by time": r"loss_by_time/",
    "Training": r"(train/|loss)",
}


def group(name: str) -> str:
    """The table that a number belongs into."""
    short = bare(name)
    return next((title for title, pattern in GROUPS.items() if re.match(pattern, short)), "Others")
