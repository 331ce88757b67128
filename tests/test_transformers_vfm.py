"""Vision towers of transformers: small random ones of each family, against what the library itself computes."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
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

DEPTH, WIDTH = 3, 32
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
ViT = SIZES | {"intermediate_size": 48, "image_size": 64, "patch_size": 16}
DINO = SIZES | {"image_size": 56, "patch_size": 14, "mlp_ratio": 2}
QWEN = {"depth": DEPTH, "hidden_size": WIDTH, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 24}
CONFIGS = {
    "siglip_vision_model": ViT,
    "clip_vision_model": ViT,
    "vit_mae": ViT,
    "vit": ViT,
    "dinov2": DINO,
    "dinov2_with_registers": DINO,
    "dinov3_vit": ViT | {"num_register_tokens": 4},
    "qwen2_5_vl_vision": QWEN | {"window_size": 56, "fullatt_block_indexes": [1]},
}
PREFIX = {"siglip_vision_model": 0, "dinov2_with_registers": 5, "dinov3_vit": 5}  # others have the class token alone
PLAIN = [name for name in CONFIGS if not name.startswith("qwen")]
slow = partial(pytest.param, marks=pytest.mark.slow)
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}


def randomised(network):
    """Weights all of which matter; the library leaves tokens at zero and norms without effect."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes folders with a model, as the library writes them."""
    from transformers import AutoConfig, AutoModel

    root = tmp_path_factory.mktemp("towers")

    def make(kind, name=None, seed=0, shards="5GB", **options):
        place = root / (name or kind)
        if not place.exists():
            torch.manual_seed(seed)
            config = AutoConfig.for_model(kind, **(CONFIGS.get(kind, {}) | options))
            randomised(AutoModel.from_config(config)).save_pretrained(place, max_shard_size=shards)
        return str(place)

    return make


@pytest.fixture(scope="module")
def two_towers(folder):
    """SigLIP with its text tower."""
    vision = {"model_type": "siglip_vision_model"} | ViT
    text = {"model_type": "siglip_text_model", "max_position_embeddings": 8, "projection_size": 16} | TEXT
    return folder("siglip", vision_config=vision, text_config=text)


def check_close(found, expected, tolerance=1e-6):
    """Whether tokens differ by no more than a share of the largest value."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * max(1, expected.abs().max())


def library(folder):
    """The library's own model, in its own way."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder).eval()


def images_of(vfm, rows, columns, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, rows * vfm.patch_size, columns * vfm.patch_size, generator=generator) * 2 - 1


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
def test_siglip2_is_timms(two_towers, grid):
    ours = TransformersVFM(two_towers, layers=[0, 2, -2, -1], input_scale=2.0)
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


def test_the_vision_tower_of_two_is_taken_and_nothing_else_read(two_towers, tmp_path):
    tensors = load_file(f"{two_towers}/model.safetensors")
    prefix = next(name for name in tensors if name.endswith("embeddings.patch_embedding.weight"))
    alone = library(two_towers).vision_model
    vfm, images = TransformersVFM(two_towers), torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = alone(pixel_values=vfm.prepare(images)).last_hidden_state
    check_close(vfm(images).tokens, expected)
    assert prefix.startswith("vision_model.") and not any("text" in name for name in vfm.network.state_dict())
    assert not any(name.startswith("head") for name in vfm.network.state_dict())


def test_a_model_in_several_files_is_read_from_those_that_hold_the_tower(folder):
    text = TEXT | {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    place = folder("qwen2_5_vl", shards="20KB", vision_config=CONFIGS["qwen2_5_vl_vision"], text_config=text)
    files = json.loads(Path(place, "model.safetensors.index.json").read_text())["weight_map"]
    others = set(files.values()) - {file for name, file in files.items() if "visual." in name}
    assert others and len(set(files.values()) - others) > 1
    visual = library(place).visual
    for file in others:
        Path(place, file).write_bytes(b"")
    vfm = TransformersVFM(place)
    images = images_of(vfm, 2, 2)
    assert torch.equal(vfm.network.blocks[2].mlp.up_proj.weight, visual.blocks[2].mlp.up_proj.weight)
    assert vfm(images).tokens.shape == (2, 4, 24)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_shape_is_known_without_weights_and_without_drawing(folder, kind):
    vfm = TransformersVFM(folder(kind), layers=[0, -1], input_scale=0.5)
    before = torch.get_rng_state()
    shape = TransformersVFM.shape_of(**vfm.arguments)
    assert torch.equal(torch.get_rng_state(), before)
    assert shape == (vfm.width, vfm.widths, vfm.stride, vfm.target_interpolation)
    assert vfm.stride == 2 * vfm.patch_size and len(vfm.widths) == 2
    assert vfm.interpolation == ("bicubic" if kind.startswith(("dino", "qwen")) else "bilinear")


def test_needs_no_hub_where_the_type_is_given(monkeypatch):
    monkeypatch.setattr("vfm_vae.tower_weights.model_folder", lambda *_: pytest.fail("looked something up"))
    options = {"pretrained": False, "model_args": {"model_type": "dinov3_vit"} | CONFIGS["dinov3_vit"]}
    vfm = TransformersVFM("facebook/dinov3-vits16-pretrain-lvd1689m", layers=[1], **options)
    assert vfm.shape_of(**vfm.arguments).widths == vfm.widths == (WIDTH,)
    assert torch.equal(vfm.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    with torch.device("meta"):
        assert TransformersVFM(vfm.name, **options).network.norm.weight.is_meta


def test_mean_and_std_are_the_image_processors(folder, tmp_path):
    shutil.copytree(folder("vit_mae"), tmp_path / "other")
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 1.0]}
    (tmp_path / "other/preprocessor_config.json").write_text(json.dumps(said))
    vfm = TransformersVFM(str(tmp_path / "other"))
    pixels = torch.zeros(1, 3, 64, 64)
    assert torch.allclose(vfm.prepare(pixels)[0, :, 0, 0], torch.tensor([0.8, 1.2, 0.2]))
    given = TransformersVFM(vfm.name, mean=[0.5] * 3, std=[0.5] * 3)
    assert torch.equal(given.prepare(pixels), pixels)
    (tmp_path / "other/preprocessor_config.json").unlink()
    assert torch.equal(vfm_from(vfm.source()).prepare(pixels), vfm.prepare(pixels))


def test_weights_of_a_rae_are_its_encoders(folder, tmp_path):
    network = library(folder("dinov2_with_registers"))
    tensors = {
        f"encoder.{name}": tensor for name, tensor in load_file(f"{network.name_or_path}/model.safetensors").items()
    }
    without_norm = {name: tensor for name, tensor in tensors.items() if "encoder.layernorm." not in name}
    save_file(without_norm | {"decoder.weight": torch.zeros(2)}, tmp_path / "rae.safetensors")
    arguments = {"layers": [-2, -1], "weights": str(tmp_path / "rae.safetensors")}
    vfm = TransformersVFM(network.name_or_path, norm_affine=False, **arguments)
    before, after = vfm(images_of(vfm, 4, 4)).layers
    normalised = F.layer_norm(before, (WIDTH,), eps=network.config.layer_norm_eps)
    check_close(after, normalised)
    whole = TransformersVFM(network.name_or_path, norm_affine=False)
    assert vfm.fingerprint() == whole.fingerprint() != TransformersVFM(network.name_or_path).fingerprint()
    with pytest.raises(ValueError, match=r"of 62 tensors 2 missing \['layernorm.bias', 'layernorm.weight'\]"):
        TransformersVFM(network.name_or_path, **arguments)
    with pytest.raises(ValueError, match=r"norm_affine: '.*' has no final norm to take gain and bias from"):
        TransformersVFM(folder("qwen2_5_vl_vision"), norm_affine=False)


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


@pytest.mark.parametrize("kind", ["siglip_vision_model", "qwen2_5_vl_vision", *(slow(kind) for kind in PLAIN[1:])])
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


def test_what_is_no_vision_tower_is_refused(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"^name: there is no folder 'siglip'; on the Hugging Face hub it would be owner/m"
    ):
        TransformersVFM("siglip")
    with pytest.raises(ValueError, match=r"^name: '.*' has no config.json of transformers'"):
        TransformersVFM(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "vits16"}')
    with pytest.raises(ValueError, match=r"^name: transformers makes no config of 'vits16' for '"):
        TransformersVFM(str(tmp_path))
    text = folder("bert", **TEXT)
    with pytest.raises(ValueError, match=r"^name: '.*bert' is a 'bert', and no plain vision transformer; choose one"):
        TransformersVFM(text)
    for kind, why in (("siglip2_vision_model", "a NaFlex tower, .* fixed resolution"), ("dinov3_convnext", "a convol")):
        with pytest.raises(ValueError, match=rf"^model_args: 'x/y' is {why}"):
            TransformersVFM.shape_of("x/y", model_args={"model_type": kind})
    swin = {"model_type": "swin", "image_size": 64, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1]}
    with pytest.raises(
        ValueError, match=r"^name: 'x/y' \(SwinModel\) is no plain vision transformer; choose one with pa"
    ):
        TransformersVFM("x/y", pretrained=False, model_args=swin)


def test_options_that_do_not_fit_are_refused(folder):
    place = folder("siglip_vision_model")
    with pytest.raises(ValueError, match=r"layers: .* has no layer 4; its 3 blocks give layers 0 to 3 and -5 to -1"):
        TransformersVFM(place, layers=[4])
    with pytest.raises(ValueError, match=r"^model_args: a 'siglip_vision_model' has no options \['depht'\]"):
        TransformersVFM(place, model_args={"depht": 2})
    with pytest.raises(
        ValueError, match=r"^model_args: transformers makes no config of 'siglip_vision_model' for .*hidden"
    ):
        TransformersVFM(place, model_args={"hidden_size": "wide"})
    with pytest.raises(ValueError, match=r"^mean: must be three numbers, for red, green and blue, given \[0.5\]"):
        TransformersVFM(place, mean=[0.5])
    with pytest.raises(ValueError, match="precision: one of 'bfloat16', 'float32', given 'half'"):
        TransformersVFM(place, precision="half")
    vfm = TransformersVFM(place, input_scale=2.0)
    assert vfm.grid(32, 48) == (4, 6)
    with pytest.raises(
        ValueError, match=r"patches of 16 pixels, which don't divide 64x72 \(images resized by input_scale"
    ):
        vfm(torch.zeros(1, 3, 32, 36))
    qwen = TransformersVFM(folder("qwen2_5_vl_vision"))
    with pytest.raises(ValueError, match=r"has patches of 28 pixels, which don't divide 42x56; height and width"):
        qwen.grid(42, 56)
    with pytest.raises(ValueError, match=r"takes float images in \[-1, 1\], given torch.uint8"):
        qwen(torch.zeros(1, 3, 56, 56, dtype=torch.uint8))


def test_weights_that_are_not_whole_are_refused(folder, tmp_path):
    place = folder("dinov2")
    tensors = load_file(f"{place}/model.safetensors")

    def refused(message, changed, name="weights.safetensors"):
        save_file(changed, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            TransformersVFM(place, weights=str(tmp_path / name))

    begin = r"^weights: '.*weights.safetensors' (does not hold the weights of '.*dinov2': of 61 tensors|holds) "
    lacking = {name: tensor for name, tensor in tensors.items() if name != "encoder.layer.2.norm1.bias"}
    refused(begin + r"1 missing \['encoder.layer.2.norm1.bias'\]$", lacking)
    refused(
        begin + r"1 left over \['encoder.layer.3.norm1.bias'\]$",
        tensors | {"encoder.layer.3.norm1.bias": torch.zeros(2)},
    )
    refused(begin + r"1 of another shape \['layernorm.bias'\]$", tensors | {"layernorm.bias": torch.zeros(3)})
    refused(begin + "no tensor 'embeddings.patch_embeddings.projection.weight'", {"x": torch.zeros(1)})
    both = {f"{part}.{name}": tensor.clone() for name, tensor in tensors.items() for part in ("teacher", "student")}
    refused(begin + r"several vision towers \['student.', 'teacher.'\]; save one alone", both)
    torch.save(nn.Linear(2, 2), tmp_path / "pickle.pth")
    with pytest.raises(ValueError, match="reading it would run code"):
        TransformersVFM(place, weights=str(tmp_path / "pickle.pth"))
    shutil.copytree(place, tmp_path / "empty", ignore=lambda *_: ["model.safetensors"])
    with pytest.raises(ValueError, match=r"^name: '.*empty' holds no model.safetensors; give a file with its weights"):
        TransformersVFM(str(tmp_path / "empty"))
    torch.save(tensors, tmp_path / "whole.pth")
    assert (
        TransformersVFM(place, weights=str(tmp_path / "whole.pth")).fingerprint()
        == TransformersVFM(place).fingerprint()
    )
