"""Vision towers of transformers: small random ones of each family, against what the library itself computes."""

import json
from functools import partial

import pytest
import torch
from tiny_towers import CONFIGS, DEPTH, PLAIN, PREFIX, WIDTH, Folders, check_close, images_of, library
from torch import nn
from torch.nn import functional as F
from training import repeat

from callbacks.cknna import CKNNACallback
from callbacks.distribution import DistributionCallback
from vfm_vae import compilation
from vfm_vae.modules.adapter import Adapter
from vfm_vae.tokenizer import VFMVAE, FrozenTokenizer
from vfm_vae.transformers_vfm import TransformersVFM
from vfm_vae.vfm import FrozenVFM, check_frozen, check_source, check_vfm, vfm_from, vfm_identity

slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp("towers"))


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
@pytest.mark.parametrize("kind", PLAIN)
def test_layers_are_the_librarys(folder, kind, grid):
    vfm = TransformersVFM(folder(kind), layers=[*range(DEPTH + 1), -2, -1])
    images = images_of(vfm, *grid)
    features, network = vfm(images), library(folder(kind))
    resampling = {} if kind.startswith("dino") else {"interpolate_pos_encoding": True}
    order = torch.arange(grid[0] * grid[1]).expand(2, -1)
    if kind == "vit_mae":  # shuffles its patches, and says how
        network.config.mask_ratio = 0.0
        torch.manual_seed(0)
    with torch.no_grad():
        found = network(pixel_values=vfm.prepare(images), output_hidden_states=True, **resampling)
    order = found.ids_restore if kind == "vit_mae" else order
    final = network.post_layernorm(found.last_hidden_state) if kind.startswith("clip") else found.last_hidden_state
    prefix = PREFIX.get(kind, 1)
    expected = [tokens[:, prefix:].take_along_dim(order[..., None], 1) for tokens in (*found.hidden_states, final)]
    expected.insert(-1, expected[-2])
    assert features.grid == vfm.grid(*images.shape[2:]) == grid
    for tokens, wanted in zip(features.layers, expected, strict=True):
        check_close(tokens, wanted)
    assert torch.equal(features.tokens, features.layers[-1])
    pooled = final[:, 0] if prefix else expected[-1].mean(1)
    check_close(features.pooled, pooled)
    if kind.startswith(("clip", "dino")):
        check_close(features.pooled, found.pooler_output)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])  # of merged tokens; windows of two by two
def test_qwens_tokens_are_in_raster_order_and_four_patches_wide(folder, grid):
    from transformers import Qwen2VLImageProcessor

    vfm = TransformersVFM(folder("qwen2_5_vl_vision"), layers=[0, 1, 2, -2, -1])
    assert vfm.patch_size == 28 and vfm.widths == (4 * WIDTH,) * 4 + (24,) and vfm.width == 24
    images, network = images_of(vfm, *grid), library(vfm.name)
    processor = Qwen2VLImageProcessor(do_resize=False, do_rescale=False, min_pixels=1)
    given = processor(list((images + 1) / 2), return_tensors="pt")
    features = vfm(images)
    with torch.no_grad():
        merged = network(given.pixel_values, grid_thw=given.image_grid_thw).pooler_output.view(2, -1, 24)
        check_close(features.tokens, merged)
        check_close(features.pooled, merged.mean(1))
        kernel = network.patch_embed.proj.weight.sum(2)  # a still image is two equal frames
        embedded = F.conv2d(vfm.prepare(images), kernel, stride=14).unflatten(2, (-1, 2)).unflatten(4, (-1, 2))
        check_close(features.layers[0], embedded.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2), 3e-6)
        last = features.layers[-2]  # the merger makes the final tokens of it, one by one
        check_close(network.merger(last.reshape(-1, WIDTH)).view_as(merged), merged)
    assert features.grid == grid and not torch.equal(features.layers[1], features.layers[2])


def test_images_of_a_batch_do_not_see_each_other(folder):
    for kind in CONFIGS:
        vfm = TransformersVFM(folder(kind), layers=[1, -1])
        images = images_of(vfm, 3, 4, batch=3)
        whole, alone = vfm(images), vfm(images[1:2])
        for tokens, wanted in zip(whole.layers, alone.layers, strict=True):
            check_close(tokens[1:2], wanted)


NAMES = {  # timm's, of a block, by transformers'
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def to_timm(tensors):
    """SigLIP's tensors under timm's names."""
    embedding = {"patch_embed.proj": "embeddings.patch_embedding", "norm": "post_layernorm"}
    pairs = [
        (f"{ours}.{part}", f"{theirs}.{part}") for ours, theirs in embedding.items() for part in ("weight", "bias")
    ]
    for block in range(DEPTH):
        ours, theirs = f"blocks.{block}", f"encoder.layers.{block}"
        pairs += [(f"{ours}.{a}.{p}", f"{theirs}.{b}.{p}") for a, b in NAMES.items() for p in ("weight", "bias")]
    found = {ours: tensors[theirs] for ours, theirs in pairs}
    for block in range(DEPTH):
        for part in ("weight", "bias"):
            three = [tensors[f"encoder.layers.{block}.self_attn.{name}_proj.{part}"] for name in "qkv"]
            found[f"blocks.{block}.attn.qkv.{part}"] = torch.cat(three)
    return found | {"pos_embed": tensors["embeddings.position_embedding.weight"][None]}


@pytest.mark.parametrize("grid", [(4, 4), (3, 6)])
def test_siglip2_is_timms(folder, grid):
    ours = TransformersVFM(folder.two_towers(), layers=[0, 2, -2, -1], input_scale=2.0)
    sizes = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2, "mlp_ratio": 1.5, "img_size": 64, "global_pool": "avg"}
    arguments = {
        "layers": [0, 2, -2, -1],
        "input_scale": 2.0,
        "pretrained": False,
        "model_args": sizes | {"fc_norm": False},
    }
    timms = FrozenVFM("vit_large_patch16_siglip_512.v2_webli", **arguments)
    timms.network.load_state_dict(to_timm(ours.network.state_dict()))
    images = images_of(ours, *grid)[..., ::2, ::2]
    for one, other in zip(ours(images).layers, timms(images).layers, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=3e-6)
    torch.testing.assert_close(ours(images).pooled, timms(images).pooled, rtol=0, atol=3e-6)
    assert ours(images).grid == timms(images).grid == grid
    assert (ours.stride, ours.interpolation, ours.target_interpolation) == (8.0, "bilinear", "bilinear")
    assert torch.equal(ours.mean, timms.mean) and torch.equal(ours.std, timms.std)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_shape_is_known_without_weights_and_without_drawing(folder, kind):
    vfm = TransformersVFM(folder(kind), layers=[0, -1], input_scale=0.5)
    before = torch.get_rng_state()
    shape = TransformersVFM.shape_of(**vfm.arguments)
    assert torch.equal(torch.get_rng_state(), before)
    assert shape == (vfm.width, vfm.widths, vfm.stride, vfm.target_interpolation)
    assert vfm.stride == 2 * vfm.patch_size and len(vfm.widths) == 2
    assert vfm.interpolation == ("bicubic" if kind.startswith(("dino", "qwen")) else "bilinear")


def test_frozen_stays_frozen(folder):
    vfm = TransformersVFM(folder("dinov3_vit"))
    model = nn.ModuleDict({"vfm": vfm, "head": nn.Linear(WIDTH, 1)}).train().requires_grad_(True)
    check_frozen(vfm)
    check_source(vfm)
    assert set(model.state_dict()) == {"head.weight", "head.bias"} == {name for name, _ in model.named_parameters()}
    images, before = images_of(vfm, 2, 2).requires_grad_(), vfm.fingerprint()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    model["head"](vfm.differentiable(images).pooled).sum().backward()
    optimizer.step()
    assert images.grad.abs().sum() > 0 and not vfm(images).tokens.requires_grad
    assert not any(module.training for module in vfm.network.modules())
    assert before == TransformersVFM(vfm.name).fingerprint()
    vfm._fingerprint = None
    assert vfm.fingerprint() == before


@pytest.mark.parametrize("kind", CONFIGS)
def test_computes_in_float32_on_cpus_and_products_held_in_bfloat16_change_nothing_under_autocast(folder, kind):
    vfm = TransformersVFM(folder(kind))
    images = images_of(vfm, 2, 3)
    expected = vfm(images).tokens
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vfm(images).tokens, expected)

    def in_bfloat16():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return vfm._run(vfm.prepare(images), (2, 3), [])[0]

    expected = in_bfloat16()
    vfm.hold_products_in(torch.bfloat16)
    assert torch.bfloat16 in {parameter.dtype for parameter in vfm.network.parameters()}
    assert torch.equal(in_bfloat16(), expected)
    exact = TransformersVFM(folder(kind), precision="float32")
    exact.hold_products_in(torch.bfloat16)
    assert {parameter.dtype for parameter in exact.network.parameters()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_runs_on_cuda_in_the_precision_asked_for(folder, kind, precision):
    torch.backends.cudnn.allow_tf32 = False  # which float32 convolutions would take by default
    vfm = TransformersVFM(folder(kind), layers=[0, -1], precision=precision)
    images = images_of(vfm, 3, 5)
    expected = vfm(images)
    vfm.cuda().hold_products_in(torch.bfloat16)
    vfm.compile_regions()
    with torch.autocast("cuda", torch.bfloat16):
        features = vfm(images.cuda())
    assert features.tokens.dtype == torch.float32
    error = ((features.tokens.cpu() - expected.tokens).norm() / expected.tokens.norm()).item()
    assert error < 1e-4 if precision == "float32" else 1e-3 < error < 0.1


@pytest.mark.parametrize("kind", ["siglip_vision_model", *map(slow, ("qwen2_5_vl_vision", *PLAIN[1:]))])
def test_compiles_block_by_block(folder, kind, monkeypatch):
    compile_eagerly, graphs = torch.compile, []

    def compile(function, **kwargs):
        return compile_eagerly(function, backend=lambda graph, _, **__: graphs.append(1) or graph.forward, **kwargs)

    monkeypatch.setattr(torch, "compile", compile)
    torch._dynamo.reset()
    compilation.compiled.cache_clear()
    vfm = TransformersVFM(folder(kind), layers=[0, -1])
    images = images_of(vfm, 4, 4)
    eager = vfm(images)
    vfm.compile_regions()
    torch.testing.assert_close(vfm(images), eager, rtol=0, atol=1e-5)
    assert len(graphs) == (3 if kind.startswith("qwen") else 1)
    vfm(torch.cat([images, images[:1]]))
    assert len(graphs) == (3 if kind.startswith("qwen") else 1)
    torch._dynamo.reset()
    compilation.compiled.cache_clear()


def test_identity_tells_weights_classes_and_interpolations_apart(folder):
    vfm = TransformersVFM(folder("dinov2"), layers=[1, -1], input_scale=2.0)
    source = json.loads(json.dumps(vfm.source()))
    again = vfm_from(source)
    images = images_of(vfm, 2, 3)[..., ::2, ::2]
    assert type(again) is TransformersVFM and torch.equal(again(images).layers[0], vfm(images).layers[0])
    assert source["class_path"] == "vfm_vae.transformers_vfm.TransformersVFM" and "model_args" not in source
    identity = {"vfm": vfm_identity(vfm), "format_version": 2}
    check_vfm(again, identity)
    other = TransformersVFM(vfm.name, weights=f"{folder('dinov2', name='other', seed=1)}/model.safetensors")
    with pytest.raises(ValueError, match=r"trained on other weights of '.*dinov2' \(sha256"):
        check_vfm(other, identity)
    with pytest.raises(
        ValueError, match=r"trained on a vfm_vae.transformers_vfm.TransformersVFM, but model.vfm is a vfm"
    ):
        timms = FrozenVFM("vit_photos_patch8_64")
        timms.name = vfm.name
        check_vfm(timms, identity)
    bilinear = TransformersVFM(vfm.name, interpolation="bilinear")
    assert bilinear.view()["interpolation"] == "bilinear" and "interpolation" not in vfm.view()
    with pytest.raises(
        ValueError, match=r"^model\.vfm\.interpolation: the checkpoint was trained with 'bilinear', but"
    ):
        check_vfm(vfm, {"vfm": vfm_identity(bilinear)})


def test_names_of_weights_are_no_part_of_the_fingerprint(folder):
    vfm = TransformersVFM(folder("vit_mae"))
    renamed = TransformersVFM(vfm.name)
    renamed.network.norm_of_another_version = renamed.network.layernorm
    del renamed.network.layernorm
    assert set(renamed.network.state_dict()) != set(vfm.network.state_dict())
    assert renamed.fingerprint() == vfm.fingerprint()


@pytest.fixture
def module(folder, tiny_module):
    """A tokenizer on Qwen2.5-VL's visual tower, whose layers differ in width."""
    module = tiny_module()
    vfm = TransformersVFM(folder("qwen2_5_vl_vision"), layers=[0, -1], input_scale=3.5)
    adapter = Adapter([128, 24], [64, 24], latent_channels=4, unshuffle=1, decoded_channels=16, alignment_channels=24)
    module.model = VFMVAE(adapter, module.model.decoder, vfm)
    return module


def test_a_tokenizer_is_trained_on_one_and_read_back(module, batch, trainer, tmp_path):
    fit = trainer(max_steps=4)
    fit.fit(module, repeat(batch))
    fit.save_checkpoint(tmp_path / "tokenizer.ckpt")
    assert module.images_seen > 0
    read = FrozenTokenizer(str(tmp_path / "tokenizer.ckpt"))
    images = batch.images.float() / 127.5 - 1
    assert type(read.network.vfm) is TransformersVFM and read.network.vfm.widths == (128, 24)
    assert torch.equal(read.network.encode(images).mode(), module.model.eval().encode(images).mode())
    module.model.save_pretrained(tmp_path / "folder")
    assert torch.equal(
        VFMVAE.from_pretrained(tmp_path / "folder").encode(images).mode(), read.network.encode(images).mode()
    )


def test_numbers_are_measured_on_one_and_named_by_its_folders_last_part(folder, module, data, trainer):
    network = TransformersVFM(folder("dinov2", name="dino.v2"), input_scale=0.875)
    callbacks = [DistributionCallback(network), CKNNACallback([network], num_images=26, k=3)]
    numbers = trainer(callbacks=callbacks).validate(module, data(), verbose=False)[0]
    assert numbers["val/fd_dino_v2"] > 0 and 0 < numbers["val/cknna/latent"] <= 1
