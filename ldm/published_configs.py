"""Published configurations of diffusion models: which of our classes they name, and with which options."""

from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from ldm.models.ditdh import DiTDH
from ldm.models.lightningdit import LightningDiT
from ldm.models.sit import SiT

Model = TypeVar("Model", LightningDiT, DiTDH)


class Family(NamedTuple, Generic[Model]):
    """How a published class is configured.

    Attributes:
        model: Our class.
        prefix: What the names of its sizes begin with.
        options: Published arguments → ours.
        defaults: What the public class takes where its configuration is silent, by our names.
        fixed: Arguments that may have this one value alone; others change the network in ways that no published
            VFM-VAE model uses.
        ignored: Arguments that change no number.
    """

    model: type[Model]
    prefix: str
    options: dict[str, str]
    defaults: dict[str, Any]
    fixed: dict[str, Any]
    ignored: frozenset[str] = frozenset()


SHARED_OPTIONS = {
    "depth": "depth",
    "hidden_size": "width",
    "num_heads": "num_heads",
    "input_size": "input_size",
    "in_channels": "in_channels",
    "patch_size": "patch_size",
    "num_classes": "num_classes",
}
LIGHTNINGDIT_FAMILY = Family[LightningDiT](
    LightningDiT,
    "LightningDiT-",
    SHARED_OPTIONS | {"use_qknorm": "qk_norm", "use_swiglu": "swiglu", "use_rope": "rotary", "use_rmsnorm": "rms_norm"},
    {"qk_norm": False, "swiglu": False, "rotary": False, "rms_norm": False},
    {"wo_shift": False, "learn_sigma": False},
)
REG_FAMILY = Family[LightningDiT](
    SiT,
    "SiT-",
    SHARED_OPTIONS
    | {
        "qk_norm": "qk_norm",
        "cls_token_dim": "cls_channels",
        "z_dims": "align_channels",
        "encoder_depth": "align_depth",
        "projector_dim": "projector_width",
    },
    {"qk_norm": False},
    {"use_cfg": True, "learn_sigma": False, "path_type": "linear", "prediction": "v"},
    frozenset({"fused_attn"}),
)

# Of the public DiTDH, depth, hidden_size and num_heads are pairs: of the body, and of the head.
DITDH_PAIRS = {
    "depth": ("depth", "head_depth"),
    "hidden_size": ("width", "head_width"),
    "num_heads": ("num_heads", "head_num_heads"),
}
DITDH_FAMILY = Family[DiTDH](
    DiTDH,
    "DiTDH-",
    {ours: ours for pair in DITDH_PAIRS.values() for ours in pair}
    | {name: SHARED_OPTIONS[name] for name in ("input_size", "in_channels", "patch_size", "num_classes")}
    | {"use_qknorm": "qk_norm"},
    {"qk_norm": False},
    {
        "mlp_ratio": 4.0,
        "use_swiglu": True,
        "use_rope": True,
        "use_rmsnorm": True,
        "use_pos_embed": True,
        "wo_shift": False,
        "learn_sigma": False,
    },
    frozenset({"class_dropout_prob"}),
)

# Arguments of REG's training and sampling → those of its class.
REG_TRAINING = {
    "model": "registry_name",
    "latent_size": "input_size",
    "vae_latent_dim": "in_channels",
    "projector_embed_dims": "z_dims",
}


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a public class from any form in which configurations are published.

    Args:
        config: One of
            LightningDiT's training YAML, with sections `model`, `data` and `vae`;
            REG's training arguments, where `model` names a size, such as `SiT-XL/1`, and the latent is VFM-VAE's of
            32 × 16 × 16 unless they say otherwise;
            RAE's YAML, of training or sampling, with sections `stage_2` and `transport`;
            arguments of any of the classes, which come back as they are.
            In the others, options that say nothing of the network are passed over.

    Returns:
        Arguments, as `lightningdit_from_published`, `reg_from_published` and `ditdh_from_published` take them.

    Raises:
        ValueError: if a needed section or option is missing, or what the network predicts is not a velocity.
    """
    if "stage_2" in config:
        return _read_ditdh(config)
    if isinstance(config.get("model"), Mapping):
        return _read_lightningdit(config)
    if "model" in config:
        return _read_reg({name.replace("-", "_"): value for name, value in config.items()})
    return dict(config)


def build(family: Family[Model], config: Mapping[str, Any]) -> Model:
    """The model, with random weights, that arguments of a public class stand for.

    Raises:
        ValueError: if there are arguments that are not supported, or a size is given twice.
    """
    refused = {name for name, value in family.fixed.items() if config.get(name) not in (None, value)}
    unknown = config.keys() - family.options.keys() - family.fixed.keys() - family.ignored - {"registry_name"}
    if refused or unknown:
        raise ValueError(f"config: {sorted(refused | unknown)} is not supported; known are {', '.join(family.options)}")
    given = {ours: config[name] for name, ours in family.options.items() if name in config}
    options = family.defaults | given
    if "registry_name" in config:
        if sizes := config.keys() & {"depth", "hidden_size", "width", "num_heads", "patch_size"}:
            raise ValueError(f"config: registry_name already sets {sorted(sizes)}; leave one of the two out")
        return family.model.of_size(config["registry_name"].removeprefix(family.prefix), **options)
    return family.model(**options)


def parameters(config: Mapping[str, Any], section: str) -> dict[str, Any]:
    """The options of a section of RAE's YAML, which may be missing; they stand below `params`, or directly."""
    content = config.get(section) or {}
    return dict(content.get("params") or content)


def of_both_towers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the public DiTDH with one number each where it has pairs, by our names.

    Raises:
        ValueError: if there is something else than a pair of numbers.
    """
    config = dict(config)
    for name, (body, head) in DITDH_PAIRS.items():
        if name not in config:
            continue
        pair = config.pop(name)
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"config: {name} is a list of two numbers, of body and head, given {pair!r}")
        config |= dict(zip((body, head), pair, strict=True))
    return config


def _read_lightningdit(config: Mapping[str, Any]) -> dict[str, Any]:
    def read(section: str, option: str) -> Any:
        if option not in (config.get(section) or {}):
            raise ValueError(f"config: {section}.{option} is missing")
        return config[section][option]

    data: dict[str, Any] = {"latent_norm": True, "latent_multiplier": 1.0}  # because latents are normalized here
    transport: dict[str, Any] = {"path_type": "Linear", "prediction": "velocity"}
    for section, required in {"data": data, "transport": transport}.items():
        for option, supported in required.items():
            given = (config.get(section) or {}).get(option, supported)
            if given != supported:
                raise ValueError(f"config: {section}.{option} must be {supported}, given {given!r}")
    known = {*LIGHTNINGDIT_FAMILY.options, *LIGHTNINGDIT_FAMILY.fixed}
    return {name: value for name, value in config["model"].items() if name in known} | {
        "registry_name": read("model", "model_type"),
        "in_channels": read("model", "in_chans"),
        "num_classes": read("data", "num_classes"),
        "input_size": read("data", "image_size") // read("vae", "downsample_ratio"),
    }


def _read_ditdh(config: Mapping[str, Any]) -> dict[str, Any]:
    network = config["stage_2"] or {}
    transport = parameters(config, "transport")
    for option, supported in {"path_type": "Linear", "prediction": "velocity"}.items():
        if (given := transport.get(option, supported)) != supported:
            raise ValueError(f"config: transport.{option} must be {supported}, given {given!r}")
    if not isinstance(network.get("params"), Mapping):
        raise ValueError("config: stage_2.params, which has the arguments of the network, is missing")
    if (target := str(network.get("target", "DiTwDDTHead"))).rpartition(".")[2] != "DiTwDDTHead":
        raise ValueError(f"config: stage_2.target must be DiTwDDTHead, given {target!r}")
    return dict(network["params"])


def _read_reg(config: Mapping[str, Any]) -> dict[str, Any]:
    known = {*REG_FAMILY.options, *REG_FAMILY.fixed, *REG_TRAINING.values()}
    arguments = {REG_TRAINING.get(name, name): value for name, value in config.items()}
    arguments = {name: value for name, value in arguments.items() if name in known}
    if isinstance(widths := arguments.get("z_dims"), str | int):  # on the command line, numbers between commas
        arguments["z_dims"] = [int(width) for width in str(widths).split(",")]
    return arguments
