"""The discrete latent: its quantiser against closed forms, and a tokenizer that trains with it."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from callbacks.evaluation import rows_of
from vfm_vae.losses.objective import Objective
from vfm_vae.modules.adapter import Adapter
from vfm_vae.modules.decoder import Decoder
from vfm_vae.modules.quantizer import QuantizedPosterior, VectorQuantizer, merge, split
from vfm_vae.tokenizer import VFMVAE, FrozenTokenizer
from vfm_vae.types import Batch, VFMFeatures
from vfm_vae.vfm import FrozenVFM

VFM = {"name": "vit_photos_patch8_64", "layers": [0, -1]}
ADAPTER = {
    "feature_channels": [128, 128],
    "layer_channels": [8, 8],
    "latent_channels": 8,
    "unshuffle": 1,
    "decoded_channels": 16,
    "alignment_channels": 128,
    "gaussian": False,
}
DECODER = {
    "in_channels": 16,
    "channels": [16, 16, 16, 16, 8],
    "route_channels": [16, 16, 16],
    "attention_depths": [1],
    "num_res_blocks": 0,
    "w_channels": 16,
}
QUANTIZER = {"vocabulary_size": 32, "num_codebooks": 2, "width": 8}


def quantizer(**options) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(**QUANTIZER | options)


def plane(*degrees: float) -> torch.Tensor:
    """One codebook of unit vectors in the plane, `[1, V, 2]`."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)[None]


def in_plane(*degrees: float, **options) -> VectorQuantizer:
    module = VectorQuantizer(vocabulary_size=len(degrees), num_codebooks=1, width=2, **options)
    module.codebooks.data = 3 * plane(*degrees)
    return module


def towards(*degrees: float) -> torch.Tensor:
    """Latents `[1, 2, 1, w]` of length 2 with these directions."""
    return 2 * plane(*degrees).mT[:, :, None]


def test_split_gives_each_codebook_its_channels_and_merge_undoes_it():
    latents = torch.arange(2 * 8 * 3 * 4.0).view(2, 8, 3, 4)
    slices = split(latents, 2)
    assert torch.equal(slices[1, 12 + 5], latents[1, 4:, 1, 1])  # second image, sixth cell, second codebook
    assert torch.equal(merge(slices, (2, 3, 4)), latents)


def test_the_nearest_codeword_by_direction_is_taken():
    posterior = in_plane(0, 90, 180)(towards(40, 50, 100, 200))
    assert posterior.indices.flatten().tolist() == [0, 1, 1, 2]
    torch.testing.assert_close(posterior.mode().flatten(2), plane(0, 90, 90, 180).mT)
    assert torch.equal(posterior.sample(torch.randn(1, 2, 1, 4)), posterior.mode())


def test_losses_against_closed_forms():
    posterior = in_plane(0, 180, beta=0.5)(towards(60))
    assert posterior.vq_loss.item() == pytest.approx(1.5 * (2 - 2 * math.cos(math.pi / 3)) / 2)
    # On a codeword an assignment is certain; half of the tokens on each of two codewords are an entropy of log 2.
    assert in_plane(0, 180)(towards(0, 180)).entropy_loss.item() == pytest.approx(-math.log(2), abs=1e-5)
    assert in_plane(0, 180)(towards(0, 0)).entropy_loss.item() == pytest.approx(0, abs=1e-5)
    # Between two codewords, entropies of token and batch are the same.
    assert in_plane(0, 180)(towards(90)).entropy_loss.item() == pytest.approx(0, abs=1e-5)


def test_entropy_by_distances_and_temperature():
    module = quantizer(temperature=0.3)
    latents = torch.randn(2, 8, 3, 3)
    losses = []
    for features, codewords in zip(split(latents, 2), module.codebooks, strict=True):
        distances = torch.cdist(F.normalize(features, dim=1), F.normalize(codewords, dim=1)).square()
        p = (-distances / 0.3).softmax(dim=1)
        mean = p.mean(0)
        losses.append(torch.special.entr(p).sum(1).mean() + (mean * (mean + 1e-7).log()).sum())
    torch.testing.assert_close(module(latents).entropy_loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-4)


def test_the_gradient_passes_straight_through_to_the_normalised_features():
    module = quantizer()
    latents, direction = torch.randn(2, 8, 3, 3, requires_grad=True), torch.randn(2, 8, 3, 3)
    (module(latents).mode() * direction).sum().backward()
    copy = latents.detach().clone().requires_grad_()
    normalised = F.normalize(copy.unflatten(1, (2, 4)), dim=2).flatten(1, 2)
    (normalised * direction).sum().backward()
    torch.testing.assert_close(latents.grad, copy.grad)
    assert module.codebooks.grad is None


def test_each_loss_part_moves_its_side():
    latents = torch.randn(2, 8, 3, 3)
    gradients = {}
    for beta in (0.0, 0.25, 0.5):
        module, features = quantizer(beta=beta), latents.clone().requires_grad_()
        module(features).vq_loss.backward()
        gradients[beta] = features.grad, module.codebooks.grad
    assert not gradients[0.0][0].any()
    torch.testing.assert_close(gradients[0.5][0], 2 * gradients[0.25][0])
    torch.testing.assert_close(gradients[0.5][1], gradients[0.0][1])


def test_indices_stand_for_the_latents():
    module = quantizer()
    posterior = module(torch.randn(2, 8, 3, 5))
    assert posterior.indices.shape == (2, 2, 3, 5) and posterior.indices.dtype == torch.int64
    assert torch.equal(module.decode_indices(posterior.indices), posterior.mode())
    assert torch.equal(module.decode_indices(posterior.indices.flatten(2), (3, 5)), posterior.mode())
    assert torch.equal(module(posterior.mode()).indices, posterior.indices)


def test_usage_counts_the_codewords_of_a_batch():
    posterior = in_plane(0, 90, 180, 270)(towards(0, 0, 90, 0))
    assert posterior.usage.item() == 50
    torch.testing.assert_close(posterior.frequency, torch.tensor([[0.75, 0.25, 0, 0]]))
    one_in = {places: in_plane(0, 90)(towards(90, *[0] * (places - 1))).usage.item() for places in (100, 300)}
    assert one_in == {100: 100, 300: 50}  # a codeword is used above 0.01 / V, here one place in 200


def test_running_frequencies_are_copied_then_decay():
    module = in_plane(0, 180)
    first, second = towards(0), towards(180)
    module(first)
    assert module.frequency.tolist() == [[1, 0]]
    for _ in range(99):
        module(second)
    assert module.updates == 100
    assert module.frequency[0, 0].item() == pytest.approx(0.9**99, rel=1e-4)
    module(first)
    assert module.frequency[0, 0].item() == pytest.approx(0.99 * 0.9**99 + 0.01)


def test_neither_evaluation_nor_a_broken_batch_leaves_a_trace():
    module = quantizer()
    module(torch.randn(1, 8, 2, 2))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.eval()(torch.randn(1, 8, 2, 2))
    broken = torch.randn(1, 8, 2, 2)
    for value in (math.nan, math.inf):
        broken[0, 3, 1, 1] = value
        posterior = module.train()(broken)
        assert not posterior.mode().isfinite().all()  # the guard has to see it
    assert before.keys() == module.state_dict().keys() == {"codebooks", "frequency", "updates"}
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_what_a_discrete_latent_says_of_a_distribution():
    posterior = quantizer()(torch.randn(3, 8, 2, 5))
    torch.testing.assert_close(posterior.kl(), torch.full((3,), 2 * 5 * 2 * math.log(16)))
    with pytest.raises(ValueError, match="predict: this tokenizer has a quantizer"):
        posterior.moments()


def test_autocast_changes_nothing():
    latents = torch.randn(2, 8, 3, 3, dtype=torch.bfloat16)
    plain = quantizer()(latents.float())
    with torch.autocast("cpu", torch.bfloat16):
        posterior = quantizer()(latents)
        losses = posterior.vq_loss, posterior.entropy_loss
    assert torch.equal(posterior.indices, plain.indices) and torch.equal(posterior.mode(), plain.mode())
    assert losses == (plain.vq_loss, plain.entropy_loss)
    assert {loss.dtype for loss in losses} == {posterior.mode().dtype} == {torch.float32}


def test_codewords_start_in_a_small_cube():
    codebooks = quantizer(vocabulary_size=2048).codebooks
    assert 0.99 / 72 < codebooks.abs().max() <= 1 / 72


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary_size": 33}, "vocabulary_size: 33 is no multiple of num_codebooks=2"),
        ({"width": 7}, "width: 7 is no multiple of num_codebooks=2"),
    ],
)
def test_options_that_do_not_divide(options, message):
    with pytest.raises(ValueError, match=message):
        quantizer(**options)


def test_latents_and_indices_that_do_not_fit():
    module = quantizer()
    with pytest.raises(ValueError, match="width: the quantizer takes 8 channels, but was given 4"):
        module(torch.zeros(1, 4, 2, 2))
    indices = torch.zeros(1, 2, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match="indices: expected \\[B, 2, h, w\\], got \\[1, 1, 6\\]"):
        module.decode_indices(indices[:, :1], (2, 3))
    for grid in (None, (2, 2)):
        with pytest.raises(ValueError, match="indices \\[1, 2, 6\\] do not fill rows and columns"):
            module.decode_indices(indices, grid)
    with pytest.raises(ValueError, match=r"must be in 0\.\.15, got 0\.\.16"):
        module.decode_indices(torch.tensor([[[0], [16]]]), (1, 1))


def tokenizer(quantizer: dict | None = QUANTIZER, **adapter) -> VFMVAE:
    torch.manual_seed(0)
    discrete = None if quantizer is None else VectorQuantizer(**quantizer)
    return VFMVAE(Adapter(**ADAPTER | adapter), Decoder(**DECODER), FrozenVFM(**VFM), discrete)


def test_a_tokenizer_whose_adapter_and_quantizer_do_not_fit():
    with pytest.raises(ValueError, match="quantizer: is 8 wide, but the adapter has latent_channels=4"):
        tokenizer(latent_channels=4)
    with pytest.raises(ValueError, match="got gaussian=True with a quantizer"):
        tokenizer(gaussian=True)
    with pytest.raises(ValueError, match="got gaussian=False without a quantizer"):
        tokenizer(quantizer=None)


def test_a_tokenizer_encodes_to_codewords():
    model = tokenizer().eval()
    posterior = model.encode(torch.rand(2, 3, 32, 64) * 2 - 1)
    assert isinstance(posterior, QuantizedPosterior)
    assert posterior.indices.shape == (2, 2, 4, 8) and posterior.mean.shape == (2, 8, 4, 8)
    assert model.decode(model.quantizer.decode_indices(posterior.indices)).image.shape == (2, 3, 32, 64)


def test_the_codebooks_and_not_their_usage_are_part_of_the_identity():
    model = tokenizer()
    before = model.latent_identity()
    model.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert model.quantizer.updates == 1 and model.latent_identity() == before
    model.quantizer.codebooks.data[0, 0, 0] += 1
    assert model.latent_identity()["fingerprint"] != before["fingerprint"]


def test_a_gaussian_tokenizer_is_what_it_was(tiny_model):
    model = tiny_model()
    assert not any("quantizer" in name for name in model.state_dict())
    assert model.adapter.fuse[-1].mlp.out.out_features == 2 * model.latent_channels


def latent_terms(posterior, **weights):
    objective = Objective(**{"alignment": 0.0, "kl": 0.0} | weights)
    features = VFMFeatures((), torch.zeros(1, 4, 8), torch.zeros(1, 8), (2, 2))
    return objective.latent(posterior, posterior.mode(), features, tokenizer(), torch.zeros(()))


def test_the_objective_weighs_the_quantizer_s_losses():
    posterior = quantizer()(torch.randn(2, 8, 2, 2))
    terms, scalars = latent_terms(posterior, quantization=1.0, entropy=0.1)
    assert terms == {"quantization": posterior.vq_loss, "entropy": posterior.entropy_loss}
    assert scalars == {"codebook_usage": posterior.usage}
    assert latent_terms(posterior)[0] == {}


@pytest.mark.parametrize("weight", ["quantization", "entropy"])
def test_without_a_quantizer_its_losses_weigh_nothing(weight, tiny_model):
    posterior = tiny_model().encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="quantization, entropy: the tokenizer has no quantizer"):
        latent_terms(posterior, **{weight: 1.0})


class Repeat(Dataset):
    """One batch, over and over."""

    def __init__(self, batch: Batch):
        self.batch = batch

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, _: int) -> Batch:
        return self.batch


@pytest.fixture
def discrete_module(tiny_module: Callable) -> Callable:
    """A TokenizerModule around a discrete tokenizer."""

    def build(**objective):
        losses = {"kl": 0.0, "quantization": 1.0, "adversarial": 0.01, "alignment": 1.0}
        module = tiny_module(
            objective=losses | objective,
            optimizer=partial(torch.optim.Adam, lr=2e-3, betas=(0.0, 0.99)),
        )
        module.model = tokenizer()
        return module

    return build


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_one_batch_overfits(discrete_module, trainer, batch, precision):
    batch = rows_of(batch, slice(3))
    module = discrete_module(entropy=0.01)

    def error() -> float:
        return module.eval().reconstruct(batch).image.sub(batch.images / 127.5 - 1).abs().mean().item()

    before, codebooks = error(), module.model.quantizer.codebooks.detach().clone()
    run = trainer(max_steps=60, precision=precision)
    run.fit(module.train(), DataLoader(Repeat(batch), batch_size=None))
    assert error() < 0.6 * before
    assert module.guard.num_skipped == 0 and module.model.quantizer.updates == 60
    assert (module.model.quantizer.codebooks != codebooks).any()
    assert run.callback_metrics["train/loss_quantization"] > 0
    assert any(name.endswith("codebook_usage") and value > 0 for name, value in run.callback_metrics.items())


def test_a_checkpoint_holds_the_whole_tokenizer(discrete_module, trainer, batch, tmp_path: Path):
    module = discrete_module()
    run = trainer(max_steps=2)
    run.fit(module, DataLoader(Repeat(batch), batch_size=None))
    run.save_checkpoint(tmp_path / "last.ckpt")
    frozen, model = FrozenTokenizer(str(tmp_path / "last.ckpt")), module.model.eval()
    assert frozen.identity == model.latent_identity()
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.equal(frozen.encode(images).indices, model.encode(images).indices)
    assert torch.equal(frozen.network.quantizer.frequency, model.quantizer.frequency)
    assert frozen.network.quantizer.updates == 2


def test_a_cache_takes_latents_and_no_moments(discrete_module, trainer, batch):
    module = discrete_module().eval()
    module.predict = "latents"
    encoded = module.predict_step(batch, 0)
    assert encoded.tensors["latents"].shape == encoded.tensors["latents_flip"].shape == (8, 8, 8, 8)
    module.predict = "moments"
    with pytest.raises(ValueError, match="predict: this tokenizer has a quantizer"):
        module.predict_step(batch, 0)
