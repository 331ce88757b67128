from collections import Counter
from itertools import combinations

import pytest
import torch

from vfm_vae.images import resize
from vfm_vae.modules.equivariance import EquivarianceRegularizer, Transform


def test_rotation_is_clockwise():
    z = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    turned = Transform(quarter_turns=1)
    assert turned.latent(z).squeeze().tolist() == [[3, 1], [4, 2]]
    assert turned.image(z, "bilinear").squeeze().tolist() == [[3, 1], [4, 2]]
    assert Transform(quarter_turns=3).latent(z).squeeze().tolist() == [[2, 4], [1, 3]]


def test_identity_changes_nothing():
    x = torch.randn(2, 3, 8, 8)
    transform = Transform()
    for result in (transform.latent(x), transform.image(x, "bicubic"), transform.shrink(x, "bicubic")):
        assert torch.equal(result, x)


def test_latent_is_not_antialiased_but_the_image_is():
    checkerboard = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).float().view(1, 1, 16, 16)
    impulse = torch.zeros(1, 1, 8, 8)
    impulse[..., 3, 3] = 1
    transform = Transform(scale=0.25)
    # Bilinear without antialias reads the four pixels around each centre, and nothing else.
    assert transform.latent(checkerboard).allclose(torch.tensor(0.5))
    assert not transform.latent(impulse).any()
    assert transform.image(impulse, "bilinear").gt(0).all()


def test_branches_act_apart():
    x = torch.randn(1, 3, 16, 24)
    assert Transform(scale=0.5, quarter_turns=1).image(x, "bilinear").shape == (1, 3, 12, 8)
    assert Transform(scale=0.5).shrink(x, "bilinear") is x
    prior = Transform(prior_scale=0.75)
    assert prior.shrink(x, "bicubic").shape == (1, 3, 12, 18)
    assert prior.latent(x) is x
    assert prior.image(x, "bicubic") is x


def test_draws_depend_on_seed_and_counter_alone():
    first, second = EquivarianceRegularizer(seed=3), EquivarianceRegularizer(seed=3)
    counters = range(0, 64 * 512, 512)
    draws = [first.draw(images, (16, 16)) for images in counters]
    assert draws == [second.draw(images, (16, 16)) for images in reversed(counters)][::-1]
    assert len(set(draws)) > 8
    assert draws != [EquivarianceRegularizer(seed=4).draw(images, (16, 16)) for images in counters]


def test_ranks_and_phases_draw_for_themselves():
    draw = EquivarianceRegularizer().draw
    counters = range(0, 64 * 512, 512)
    sequences = [
        [draw(images, (16, 16), rank=rank, phase=phase) for images in counters]
        for rank in range(3)
        for phase in ("generator", "discriminator")
    ]
    assert sequences[0] == [draw(images, (16, 16), rank=0, phase="generator") for images in counters]
    same = [sum(a == b for a, b in zip(one, other, strict=True)) for one, other in combinations(sequences, 2)]
    assert max(same) < len(counters) / 2  # as many as chance has it: 0.2, mostly of no transform at all


def test_frequencies():
    num = 20_000
    draws = [EquivarianceRegularizer(seed=1).draw(images, (16, 16)) for images in range(0, num * 32, 32)]
    prior = Counter(draw.prior_scale for draw in draws if draw.prior_scale != 1)
    assert set(prior) == {0.25, 0.5, 0.75}
    assert prior.total() / num == pytest.approx(0.5 * 0.25, abs=0.01)
    latent = Counter((draw.scale, draw.quarter_turns) for draw in draws)
    pairs = [(scale, turns) for scale in (0.25, 0.5, 0.75, 1.0) for turns in range(4) if (scale, turns) != (1.0, 0)]
    assert set(latent) == {*pairs, (1.0, 0)}
    for pair in pairs:
        assert latent[pair] / num == pytest.approx(0.5 / 16, abs=0.006)


@pytest.mark.parametrize(("grid", "scales", "prior"), [((8, 8), {0.5, 1}, {0.5}), ((4, 4), {1}, set())])
def test_scales_that_the_decoder_cannot_take_are_left_out(grid, scales, prior):
    draws = [EquivarianceRegularizer().draw(images, grid) for images in range(500)]
    assert {draw.scale for draw in draws} == scales
    assert {draw.prior_scale for draw in draws} - {1.0} == prior


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"probability: .*1.5"):
        EquivarianceRegularizer(probability=1.5)
    with pytest.raises(ValueError, match=r"latent_grid: .*6"):
        EquivarianceRegularizer().draw(0, (8, 6))


def test_a_decoder_that_begins_at_half_the_latent_takes_more_scales():
    draws = [EquivarianceRegularizer().draw(images, (8, 6), side_multiple=2) for images in range(500)]
    assert {draw.scale for draw in draws} == {1.0}  # three quarters of 6 are no even number
    draws = [EquivarianceRegularizer().draw(images, (8, 8), side_multiple=2) for images in range(500)]
    assert {draw.scale for draw in draws} == {0.25, 0.5, 0.75, 1.0}


def test_resize_takes_half_precision_on_the_cpu_and_antialiases_only_what_shrinks():
    x = torch.randn(1, 3, 16, 16)
    small = resize(x.bfloat16(), (8, 8), "bicubic")
    assert small.dtype == torch.bfloat16
    assert torch.allclose(small.float(), resize(x, (8, 8), "bicubic"), atol=0.05)
    assert torch.equal(resize(x, (32, 32), "bicubic"), resize(x, (32, 32), "bicubic", antialias=False))
    assert not torch.equal(resize(x, (8, 8), "bicubic"), resize(x, (8, 8), "bicubic", antialias=False))
