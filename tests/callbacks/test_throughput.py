"""Operations of steps whose number is known in closed form, and what is logged of them."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from callbacks.throughput import PEAK_FLOPS, Throughput, flop_counter, peak_flops

B = 4
# Multiplications of one image: the generator forward (16 * 8 twice), its weights' gradients, the gradient between its
# layers; the opponent on the generator's image forward, with gradients of its weights and of the image (8 each), and
# once more on the detached image, forward and with its weights' gradient.
TWO_PLAYERS = 2 * B * (2 * 128 + 2 * 128 + 128 + 3 * 8 + 2 * 8)


class Players(LightningModule):
    """Two players, manual optimisation, as the tokenizer trains."""

    def __init__(self, accumulate: int = 1, compiled: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.accumulate = accumulate
        self.generator = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.opponent = nn.Linear(8, 1)
        if compiled:
            self.generator.compile(backend="aot_eager")

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.generator, self.opponent)]

    def training_step(self, batch, batch_idx):
        image = self.generator(batch.images[:, 0, 0].float() / 255)
        self.manual_backward(self.opponent(image).mean())
        self.manual_backward(self.opponent(image.detach()).square().mean())
        if (batch_idx + 1) % self.accumulate == 0:
            first, second = self.optimizers()
            first.step()
            second.optimizer.step()
            for optimizer in (first, second):
                optimizer.zero_grad()

    def validation_step(self, batch, batch_idx):
        self.generator(batch.images[:, 0, 0].float())


class Growing(LightningModule):
    """A step that costs more each time; automatic optimisation."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch, batch_idx):
        x = batch.images[:, 0, 0].float()
        return sum(self.layer(x).mean() for _ in range(batch_idx + 1))


@pytest.fixture
def events(tmp_path):
    """Reads what was logged in `version`, as `{key: {step: value}}`."""

    def read(version: str) -> dict[str, dict[int, float]]:
        accumulator = EventAccumulator(str(tmp_path / "runs" / version))
        accumulator.Reload()
        return {key: {e.step: e.value for e in accumulator.Scalars(key)} for key in accumulator.Tags()["scalars"]}

    return read


@pytest.fixture
def logged(trainer, tmp_path):
    def make(version: str, *callbacks, **kwargs):
        logger = TensorBoardLogger(tmp_path, "runs", version)
        options = {"log_every_n_steps": 1, "check_val_every_n_epoch": None, "max_epochs": -1}
        return trainer(*callbacks, logger=logger, **options | kwargs)

    return make


class Waiting(Callback):
    """A clock that goes a second per training batch and a hundred per batch of a validation, and nothing but that."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("callbacks.throughput.time.perf_counter", lambda: self.now)

    def on_train_batch_start(self, *_):
        self.now += 1

    def on_validation_batch_start(self, *_):
        self.now += 100


@pytest.mark.parametrize("accumulate", [1, 2])
def test_operations_of_two_players(logged, events, data, accumulate):
    module = Players(accumulate)
    logged("run", Throughput(window_size=3), max_steps=8 // accumulate, limit_val_batches=0).fit(module, data)
    assert module.flops_per_batch == TWO_PLAYERS  # of each batch, however many make a step
    scalars = events("run")
    samples, flops = (scalars[f"train/device/{name}_per_sec"] for name in ("samples", "flops"))
    assert samples.keys() == flops.keys() and len(samples) >= 3
    for step, rate in samples.items():
        assert flops[step] == pytest.approx(rate / B * TWO_PLAYERS)
    assert "train/device/mfu" not in scalars  # nobody knows what this CPU can do


def test_share_of_the_peak(logged, events, data):
    module = Players()
    logged("run", Throughput(window_size=3, peak_flops=1e9), max_steps=8, limit_val_batches=0).fit(module, data)
    scalars = events("run")
    for step, rate in scalars["train/device/flops_per_sec"].items():
        assert scalars["train/device/mfu"][step] == pytest.approx(rate / 1e9)


def test_rates_over_all_ranks_without_validations(monkeypatch, logged, events, data):
    clock, module = Waiting(monkeypatch), Players()
    monkeypatch.setattr(Trainer, "world_size", 2)
    fitting = logged("run", clock, Throughput(window_size=3, peak_flops=1e9), max_steps=12, val_check_interval=4)
    fitting.fit(module, data)
    scalars = events("run")
    rates = {
        "train/device/batches_per_sec": 1,
        "train/device/samples_per_sec": B,
        "train/device/flops_per_sec": TWO_PLAYERS,
        "train/device/mfu": TWO_PLAYERS / 1e9,
        "train/batches_per_sec": 2,
        "train/samples_per_sec": 2 * B,
        "train/flops_per_sec": 2 * TWO_PLAYERS,
    }
    for key, rate in rates.items():
        assert list(scalars[key]) == list(range(3, 12))  # the first was counted, and three make a window
        assert list(scalars[key].values()) == pytest.approx([rate] * 9), key
    assert scalars["train/time"] == scalars["train/batches"] == {step: step for step in range(1, 12)}
    assert list(scalars["validate/device/batches_per_sec"].values()) == pytest.approx([0.01] * 3)
    assert not any("flops" in key for key in scalars if key.startswith("validate"))


class Device(Callback):
    """Callbacks listed after it see this device at the end of a batch."""

    def __init__(self, kind):
        self.device = torch.device(kind)

    def on_train_batch_end(self, trainer, *_):
        trainer.strategy._root_device = self.device


def test_no_batch_waits_for_the_device(monkeypatch, logged, events, data):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("the host waits"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3_500_000_000)
    callbacks = (Device("cuda"), Throughput(window_size=2, peak_flops=1e9), Device("cpu"))
    logged("run", *callbacks, max_steps=4, limit_val_batches=0).fit(Players(), data)
    assert "train/device/mfu" in events("run")
    assert set(events("run")["train/device/memory_gb"].values()) == {3.5}


@pytest.mark.parametrize(("every", "steps"), [(1, [2, 3, 4, 5]), (3, [2, 5])])
def test_logged_where_others_are(logged, events, data, every, steps):
    throughput = Throughput(window_size=2)
    logged("run", throughput, max_steps=6, limit_val_batches=0, log_every_n_steps=every).fit(Players(), data)
    assert list(events("run")["train/device/samples_per_sec"]) == steps


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluations_are_measured(trainer, new_module, data, verb):
    throughput = Throughput(window_size=2)
    evaluating = trainer(throughput, log_every_n_steps=1, logger=True)
    getattr(evaluating, verb)(new_module(), data)
    assert evaluating.logged_metrics[f"{verb}/samples"] == 13
    assert evaluating.logged_metrics[f"{verb}/device/samples_per_sec"] > 0


def test_batches_that_differ_are_averaged(logged, data):
    module = Growing()
    logged("run", Throughput(count_batches=3), max_steps=4, limit_val_batches=0).fit(module, data)
    assert module.flops_per_batch == 2 * B * 8 * 2 * (1 + 2 + 3) / 3


def test_nothing_is_counted_unless_asked(logged, events, data):
    module = Players()
    logged("run", Throughput(window_size=3, count_batches=0), max_steps=6, limit_val_batches=0).fit(module, data)
    assert module.flops_per_batch is None
    assert {key for key in events("run") if "flops" in key} == set()
    assert "train/device/samples_per_sec" in events("run")


def test_compiled_parts_count(logged, data):
    module = Players(compiled=True)
    logged("run", Throughput(), max_steps=3, limit_val_batches=0).fit(module, data)
    assert module.flops_per_batch == TWO_PLAYERS


def test_attention_counts_on_the_cpu(logged, data):
    class Attention(Growing):
        def training_step(self, batch, batch_idx):
            x = self.layer(batch.images[:, 0].float()).expand(-1, -1, 16)  # [B, 8, 16]
            return scaled_dot_product_attention(*[x[:, None].contiguous()] * 3).mean()

    module = Attention()
    logged("run", Throughput(), max_steps=1, limit_val_batches=0).fit(module, data)
    linear, products = 2 * 2 * B * 8 * 8, 2 * 2 * B * 8 * 8 * 16  # forward and weights; q k^T and weights v
    assert module.flops_per_batch == linear + products * 3.5  # backward computes q k^T once more, then four products


@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 7, "groups": 8, "padding": 3},
        {"kernel_size": 3, "groups": 4, "stride": 2, "padding": 1},
        {"kernel_size": (1, 3), "groups": 2, "dilation": 2, "bias": False},
    ],
)
def test_convolutions(options, transposed, needs_input):
    inputs, outputs = 8, 16
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(inputs, outputs, **options)
    x = torch.randn(B, inputs, 13, 10, requires_grad=needs_input)
    with flop_counter() as forward:
        y = layer(x)
    positions = x[0, 0].numel() if transposed else y[0, 0].numel()  # at which the kernel lies
    operations = 2 * B * outputs * positions * layer.weight[0, 0].numel() * inputs // layer.groups
    assert forward.get_total_flops() == operations
    with flop_counter() as backward:
        y.sum().backward()
    assert backward.get_total_flops() == operations * (2 if needs_input else 1)


def test_a_frozen_convolution_hands_gradients_on():
    layer = nn.Conv2d(8, 8, 3, groups=8).requires_grad_(False)
    with flop_counter() as counter:
        layer(torch.randn(B, 8, 6, 6, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * B * 8 * 4 * 4 * 9)


def test_counting_changes_no_weight_and_survives_a_resume(trainer, logged, events, new_module, data, tmp_path):
    def fit(name, *callbacks, **kwargs):
        saves = ModelCheckpoint(tmp_path / name, save_last=True, save_top_k=0, every_n_train_steps=1)
        saves._enable_version_counter = False
        module = new_module()
        options = {"val_check_interval": 4, "enable_checkpointing": True} | kwargs
        logged(name, *callbacks, saves, **options).fit(module, data, ckpt_path="last", weights_only=True)
        return module

    plain, counted = fit("plain", max_steps=16), fit("whole", Throughput(window_size=3), max_steps=16)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(counted.parameters(), plain.parameters(), strict=True))
    fit("resumed", Throughput(window_size=3), max_steps=7)
    assert fit("resumed", Throughput(window_size=3), max_steps=16).flops_per_batch == counted.flops_per_batch > 0
    scalars = events("resumed")
    for key in ("train/device/samples_per_sec", "train/device/flops_per_sec", "validate/device/samples_per_sec"):
        assert scalars[key] and all(value > 0 for value in scalars[key].values())
    assert min(scalars["train/device/samples_per_sec"]) < 7 and max(scalars["train/device/samples_per_sec"]) >= 14


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "32-true", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "bf16-mixed", None),
        ("NVIDIA H200 NVL", "bf16-mixed", 835e12),
        ("NVIDIA A100-SXM4-80GB", "bf16-true", 312e12),
        ("NVIDIA GB200", "bf16-mixed", None),
        ("NVIDIA GeForce RTX 4090", "bf16-mixed", None),
    ],
)
def test_peaks(monkeypatch, trainer, name, precision, peak):
    any_trainer = trainer()
    monkeypatch.setattr(type(any_trainer), "precision", precision)
    monkeypatch.setattr(any_trainer.strategy, "_root_device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(any_trainer) == peak
    assert all(value > 1e14 for value in PEAK_FLOPS.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 1}, "window_size: must be at least 2"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        Throughput(**options)
