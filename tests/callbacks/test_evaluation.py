"""Callbacks that measure during validation: CKNNA and the Fréchet distance."""

import pytest
import torch

from callbacks.cknna import CKNNACallback
from callbacks.fid import DistributionCallback
from vfm_vae.metrics.alignment import cknna, prepare_features
from vfm_vae.metrics.distribution import frechet_distance
from vfm_vae.metrics.reconstruction import from_uint8, quantised
from vfm_vae.vfm import FrozenVFM


def small_vfm(name="vit_tiny_patch16_224", embed_dim=8):
    torch.manual_seed(embed_dim)
    size = {"img_size": 8, "patch_size": 4, "depth": 1, "num_heads": 2, "embed_dim": embed_dim}
    return FrozenVFM(name, pretrained=False, model_args=size)


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
        callback.update(module, type(batch)(*(field[skipped] for field in batch)))
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
    for path, arguments in (("cknna.CKNNACallback", {"vfms": [vfm]}), ("fid.DistributionCallback", {"network": vfm})):
        config = parser.parse_object({"callback": {"class_path": f"callbacks.{path}", "init_args": arguments}})
        assert isinstance(parser.instantiate(config).callback, EvaluationCallback)
