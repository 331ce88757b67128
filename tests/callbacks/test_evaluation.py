"""Callbacks that measure during validation: CKNNA and the Fréchet distance."""

import pytest
import torch
from lightning.pytorch.callbacks import Timer
from torch.utils.data import default_collate

from callbacks.cknna import CKNNACallback
from callbacks.distribution import DistributionCallback
from callbacks.evaluation import rows_of
from callbacks.probe import LinearProbeCallback
from callbacks.robustness import RobustnessCallback
from vfm_vae.images import from_uint8, quantised
from vfm_vae.metrics.alignment import cknna, prepare_features
from vfm_vae.metrics.distribution import frechet_distance
from vfm_vae.metrics.inception import Inception, InceptionNetwork
from vfm_vae.types import Batch
from vfm_vae.vfm import FrozenVFM


def small_vfm(name="vit_tiny_patch16_224", embed_dim=8, **options):
    torch.manual_seed(embed_dim)
    size = {"img_size": 8, "patch_size": 4, "depth": 1, "num_heads": 2, "embed_dim": embed_dim}
    return FrozenVFM(name, pretrained=False, model_args=size, **options)


@pytest.fixture
def expected(module, data):
    """By hand: every validation image at once."""
    images = from_uint8(data.val_set.images)
    module.eval()
    with torch.no_grad():
        latent = module.model.encode(images).flatten(1)
        return {"images": images, "latent": latent, "fake": module.model(images)}


def cknna_by_hand(features, vfm, images, k=4):
    return cknna(prepare_features(features), prepare_features(vfm(images).tokens.mean(1)), k).item()


@pytest.mark.parametrize("evaluation, prefix", [("validate", "val"), ("test", "test")])
def test_alignment_is_logged_without_padding(module, padded_data, trainer, expected, evaluation, prefix):
    vfm = small_vfm()
    run = trainer(CKNNACallback([vfm], k=4))
    getattr(run, evaluation)(module, padded_data, verbose=False)
    logged = run.callback_metrics
    assert {f"{prefix}/cknna/latent", f"{prefix}/cknna/pixels"} <= logged.keys()
    by_hand = cknna_by_hand(expected["latent"], vfm, expected["images"])
    assert logged[f"{prefix}/cknna/latent"].item() == pytest.approx(by_hand, abs=1e-5)


def test_several_vfms_are_named_and_a_subset_is_spread_over_the_set(module, data, trainer, expected):
    vfms = [small_vfm(), small_vfm("vit_small_patch16_224", 12)]
    run = trainer(CKNNACallback(vfms, num_images=6, k=4))
    run.validate(module, data, verbose=False)
    chosen = [i for i in range(13) if i * 6 % 13 < 6]
    assert len(chosen) == 6
    for vfm in vfms:
        by_hand = cknna_by_hand(expected["latent"][chosen], vfm, expected["images"][chosen])
        assert run.callback_metrics[f"val/cknna/latent/{vfm.name}"].item() == pytest.approx(by_hand, abs=1e-5)


def test_two_halves_on_two_ranks_choose_the_same_subset():
    callback = CKNNACallback([small_vfm()], num_images=7, k=4)
    callback.num_samples = 20
    index = torch.arange(-2, 20)
    assert callback.chosen(index).sum() == 7 and not callback.chosen(index)[:2].any()


def test_features_are_named_even_where_no_image_is_chosen(module, data, trainer):
    callback = CKNNACallback([small_vfm()], num_images=6, k=4)
    callback.num_samples = 13
    callback.start(trainer(), module)
    batch = next(iter(data.val_dataloader()))
    skipped = [i for i in range(5) if i * 6 % 13 >= 6]
    with torch.no_grad():
        callback.update(module, rows_of(batch, skipped))
    assert set(callback._stores) == {"cknna/latent", "cknna/pixels"}
    with pytest.warns(UserWarning, match="more images than 0"):
        assert callback.results()["cknna/latent"].isnan()


def test_frechet_distance_is_logged_by_the_vfms_name(module, padded_data, trainer, expected):
    vfm = small_vfm()
    run = trainer(DistributionCallback(vfm))
    run.validate(module, padded_data, verbose=False)
    real, fake = (vfm(quantised(expected[key])).pooled.double() for key in ("images", "fake"))
    by_hand = frechet_distance(real.mean(0), real.T.cov(), fake.mean(0), fake.T.cov()).item()
    assert run.callback_metrics["val/fd_vit_tiny_patch16_224"].item() == pytest.approx(by_hand, rel=1e-4)


def test_real_images_are_looked_at_once_in_a_run(module, data, trainer):
    vfm, seen = small_vfm(), []
    vfm.register_forward_hook(lambda layer, args, features: seen.append(len(args[0])))
    callback = DistributionCallback(vfm, precision_recall=True)
    run = trainer(callback, val_check_interval=3, max_steps=6)
    run.fit(module, data)
    assert sum(seen) == 13 + 2 * 13
    images = from_uint8(data.val_set.images)
    with torch.no_grad():
        real, fake = (vfm(quantised(x)).pooled.double() for x in (images, module.eval().model(images)))
    by_hand = frechet_distance(real.mean(0), real.T.cov(), fake.mean(0), fake.T.cov()).item()
    assert run.callback_metrics["val/fd_vit_tiny_patch16_224"].item() == pytest.approx(by_hand, rel=1e-4)
    assert 0 <= run.callback_metrics["val/recall_vit_tiny_patch16_224"] <= 1


OTHER = "vit_small_patch16_224"
SAME_NETWORK = ("vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224.augreg_in21k_ft_in1k")


@pytest.mark.parametrize(
    ("make", "shared"),
    [
        (lambda: (CKNNACallback([small_vfm()]), CKNNACallback([small_vfm(OTHER)])), "cknna/<feature>"),
        (
            lambda: (CKNNACallback([small_vfm()], times=[0.1]), CKNNACallback([small_vfm()], times=[0.9])),
            "cknna/<feature>",
        ),
        (lambda: map(DistributionCallback, map(small_vfm, SAME_NETWORK)), "fd_vit_tiny_patch16_224"),
        (lambda: (RobustnessCallback(), RobustnessCallback()), "robustness/latent"),
        (lambda: (LinearProbeCallback(time=0.1), LinearProbeCallback(time=0.9)), "probe/<feature>"),
    ],
)
def test_two_that_would_log_the_same_are_refused_before_anything_is_measured(module, data, trainer, make, shared):
    first, second = make()
    run = trainer(first, Timer(), second)
    name = type(first).__name__
    with pytest.raises(ValueError, match=rf"^trainer.callbacks: {name} and another {name} would both log '{shared}"):
        run.validate(module, data, verbose=False)
    assert not module.validated


@pytest.fixture
def inception(monkeypatch):
    """Without weights: for its name."""
    with torch.device("meta"):
        network = InceptionNetwork()
    monkeypatch.setattr("vfm_vae.metrics.inception._load", lambda weights: (network, "f" * 64))
    return Inception()


def test_inceptions_numbers_against_two_references_are_told_apart(inception, photos, module, data, trainer):
    """Their names hold no reference's, but reconstructions and samples have names of their own."""
    val, train = (
        DistributionCallback(inception, reference=str(photos / split), precision_recall=False)
        for split in ("val", "train")
    )
    with pytest.raises(ValueError, match="would both log 'gfid'"):
        trainer(val, train).validate(module, data, verbose=False)
    assert not val.names() & DistributionCallback(inception).names()


def test_what_is_named_apart_may_stand_side_by_side(module, data, trainer):
    vfms = [small_vfm(), small_vfm(OTHER, 12)]
    run = trainer(*map(DistributionCallback, vfms), CKNNACallback(vfms, k=4), CKNNACallback([small_vfm()], k=4))
    run.validate(module, data, verbose=False)
    assert {
        "val/fd_vit_tiny_patch16_224",
        f"val/fd_{OTHER}",
        f"val/cknna/latent/{OTHER}",
    } <= run.callback_metrics.keys()


@pytest.mark.parametrize("kind", [RobustnessCallback, LinearProbeCallback])
def test_vfms_of_one_network_keep_the_tag_that_tells_them_apart(kind):
    callback = kind([*map(small_vfm, SAME_NETWORK), small_vfm(f"{OTHER}.augreg_in21k")])
    assert list(callback.vfms) == [*SAME_NETWORK, OTHER]
    with pytest.raises(ValueError, match="vfms: each may be given once"):
        kind([small_vfm(), small_vfm(input_scale=2.0)])


def test_what_is_counted_was_measured(module, data, trainer):
    callbacks = CKNNACallback([small_vfm()], num_images=11, k=3), DistributionCallback(small_vfm())
    trainer(*callbacks).test(module, data, verbose=False)
    assert [callback.settings()["num_images"] for callback in callbacks] == [11, 13]
    trainer(*callbacks, limit_test_batches=1).test(module, data, verbose=False)
    assert [callback.settings()["num_images"] for callback in callbacks] == [4, 5]
    data.collate_padded = lambda samples: collate_damaged(samples, 3)
    trainer(*callbacks).test(module, data, verbose=False)
    assert [callback.settings()["num_images"] for callback in callbacks] == [10, 12]


def test_counts_of_ranks_add_up(module, data, trainer, monkeypatch):
    callback = DistributionCallback(small_vfm())
    run = trainer(callback)
    monkeypatch.setattr(run.strategy, "reduce", lambda tensor, reduce_op: {"sum": tensor + 12}[reduce_op])
    run.validate(module, data, verbose=False)
    assert callback.num_measured == 25


def collate_damaged(samples, number):
    batch = Batch(*default_collate(samples))
    return batch._replace(index=torch.where(batch.index == number, -1, batch.index))


def test_settings_name_networks_and_how_they_see_images(module, data, trainer):
    vfm = small_vfm(input_scale=2.0, precision="float32", antialias_positions=True)
    callbacks = CKNNACallback([vfm], k=4), DistributionCallback(vfm)
    trainer(*callbacks).test(module, data, verbose=False)
    alignment, distance = (callback.settings() for callback in callbacks)
    seen = {"input_scale": 2.0, "antialias": False, "antialias_positions": True, "precision": "float32"}
    assert alignment["vfms"] == {vfm.name: {"weights": vfm.fingerprint(), **seen}}
    assert distance["network"] == vfm.name and distance.items() >= seen.items()


def test_the_check_before_training_measures_nothing(module, data, trainer):
    run = trainer(CKNNACallback([small_vfm()], k=4), DistributionCallback(small_vfm()), num_sanity_val_steps=1)
    run.fit(module, data)
    assert "val/cknna/latent" not in run.callback_metrics
    run = trainer(CKNNACallback([small_vfm()], k=4), num_sanity_val_steps=1, val_check_interval=3, max_steps=3)
    run.fit(module, data)
    assert "val/cknna/latent" in run.callback_metrics


def test_measuring_stays_out_of_checkpoints(module, data, trainer, tmp_path):
    run = trainer(CKNNACallback([small_vfm()], k=4), DistributionCallback(small_vfm()), val_check_interval=3)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == module.state_dict().keys()


def test_what_is_missing_is_named(module, data, trainer):
    with pytest.raises(ValueError, match="vfms"):
        CKNNACallback([])
    with pytest.raises(ValueError, match=r"num_images.*got 10"):
        CKNNACallback([small_vfm()], num_images=10)
    with pytest.raises(ValueError, match="each may be given once"):
        CKNNACallback([small_vfm(), small_vfm()])

    class Samples(type(module)):
        alignment_features = None

        def evaluation_images(self, batch):
            return None, batch.images / 127.5 - 1

    with pytest.raises(ValueError, match="has no real images"):
        trainer(DistributionCallback(small_vfm())).validate(Samples(), data, verbose=False)


def test_configuration_files_can_name_the_references():
    from jsonargparse import ArgumentParser

    from callbacks.evaluation import EvaluationCallback

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=EvaluationCallback)
    vfm = {
        "class_path": "vfm_vae.vfm.FrozenVFM",
        "init_args": {"name": "vit_tiny_patch16_224", "pretrained": False, "model_args": {"depth": 1}},
    }
    for path, arguments in (
        ("cknna.CKNNACallback", {"vfms": [vfm]}),
        ("distribution.DistributionCallback", {"network": vfm}),
    ):
        config = parser.parse_object({"callback": {"class_path": f"callbacks.{path}", "init_args": arguments}})
        assert isinstance(parser.instantiate(config).callback, EvaluationCallback)
