"""What tells the latents of one's own tokenizers from others'."""

from torch import Tensor, nn

from vfm_vae.modules.posterior import DiagonalGaussian
from vfm_vae.pretrained_tokenizer import PretrainedTokenizer
from vfm_vae.types import Decoded, Posterior


class Scaled(PretrainedTokenizer):
    latent_channels, compression = 4, 1

    def __init__(self, scale: float = 1.0, vfm: object = None) -> None:
        super().__init__()
        self.scale, self.vfm = scale, vfm
        self.encoder, self.decoder = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 3, 1)
        for weight in self.parameters():
            nn.init.ones_(weight)

    def encode(self, images: Tensor) -> Posterior:
        return DiagonalGaussian(self.encoder(images) * self.scale)

    def decode(self, z: Tensor) -> Decoded:
        return Decoded(self.decoder(z / self.scale), ())


class OnVFM(Scaled):
    def attach_vfm(self, weights: str | None = None) -> "OnVFM":
        return self


class Source:
    """All of a VFM that an identity asks for."""

    def __init__(self, fingerprint: str | None = "a", **arguments: object) -> None:
        self.told = {"name": "vit", "weights": "here.pth", "fingerprint": fingerprint} | arguments

    def source(self) -> dict[str, object]:
        return self.told


def fingerprint(model: PretrainedTokenizer) -> str | None:
    return model.latent_identity()["fingerprint"]


def test_it_depends_on_class_arguments_and_weights_but_on_no_decoder(tmp_path):
    model, other = Scaled(1), Scaled(1)
    nn.init.zeros_(other.decoder.weight)
    assert fingerprint(model) == fingerprint(other)
    nn.init.zeros_(other.encoder.weight)
    assert len({fingerprint(m) for m in (model, other, Scaled(0.18), OnVFM(vfm=Source()))}) == 4
    model.save_pretrained(tmp_path)  # read again, the scale is 1.0
    assert fingerprint(Scaled.from_pretrained(tmp_path)) == fingerprint(model)


def test_it_depends_on_the_vfm_where_that_encodes():
    assert fingerprint(Scaled(vfm=Source("a"))) == fingerprint(Scaled(vfm=Source("b"))) == fingerprint(Scaled())
    vfms = [Source("a"), Source("b"), Source("a", input_scale=2.0)]
    assert len({fingerprint(OnVFM(vfm=vfm)) for vfm in vfms}) == 3
    absent = OnVFM()
    assert fingerprint(absent) is None and fingerprint(OnVFM(vfm=Source(None))) is None
    absent.absent_vfm = vfms[0].told | {"weights": None}
    assert fingerprint(absent) == fingerprint(OnVFM(vfm=vfms[0]))
