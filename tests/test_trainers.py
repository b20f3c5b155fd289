"""The optimizers inside Accelerate and Lightning, on the CPU: the same losses as with torch.optim.AdamW there.

Both look at `_step_supports_amp_scaling`, which makes GradScaler leave unscaling and skipping to step(). pyshard sets
it where torch does, with fused=True only: otherwise Accelerate would not see skipped steps, and Lightning would refuse
to clip gradients. A step is fused in any case.
"""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import assert_same_bits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyshard

LOSS = {"rel": 1e-5}  # a dozen fp32 steps of two implementations


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Trainers warn about workers, loggers and the like; one thread, since tiny tensors on two wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


def network(seed: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def data(seed: int, n: int = 48) -> TensorDataset:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x * x).sum(1, keepdim=True))


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters()):
        assert_same_bits(x.detach(), y.detach(), name)


# ---- Accelerate ----


@pytest.fixture
def accelerate() -> Iterator[Any]:
    module = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield module
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("clip", [False, True])
def test_accelerate_with_gradient_accumulation(seed: int, accelerate: Any, clip: bool, precision: str) -> None:
    runs = []
    for library in (pyshard, torch.optim):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
        model = network(seed)
        optimizer = library.AdamW(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        model, optimizer, loader, schedule = accelerator.prepare(
            model, optimizer, DataLoader(data(seed), batch_size=4), schedule
        )
        losses = []
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = (model(x) - y).square().mean()
                accelerator.backward(loss)
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        param = next(iter(accelerator.unwrap_model(model).parameters()))
        assert optimizer.state[param]["step"] == 6
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.9**6)
        runs.append(losses)
    # Under bf16 autocast a last bit of a weight may move an activation by 2^-9.
    assert runs[0] == pytest.approx(runs[1], **(LOSS if precision == "no" else {"rel": 2e-2}))


def test_accelerate_checkpoint(seed: int, accelerate: Any, tmp_path: Path) -> None:
    """save_state and load_state, with split weights: the same bits from there on."""

    def prepared(weights_seed: int) -> tuple[Any, ...]:
        accelerator = accelerate.Accelerator(cpu=True)
        model = network(weights_seed, torch.bfloat16)
        return accelerator, *accelerator.prepare(model, pyshard.AdamW(model.parameters(), lr=0.01))

    def steps(model: nn.Module, optimizer: Any, n: int) -> None:
        for x, y in DataLoader(data(n), batch_size=12):
            optimizer.zero_grad()
            (model(x.bfloat16()).float() - y).square().mean().backward()
            optimizer.step()

    accelerator, model, optimizer = prepared(seed)
    steps(model, optimizer, seed)
    accelerator.save_state(str(tmp_path))
    steps(model, optimizer, seed + 1)
    accelerator2, model2, optimizer2 = prepared(seed + 9)
    accelerator2.load_state(str(tmp_path))
    steps(model2, optimizer2, seed + 1)
    assert_same_weights(model, model2)


@pytest.mark.parametrize("fused", [None, True])
def test_accelerate_sees_skipped_steps(seed: int, accelerate: Any, fused: bool | None) -> None:
    """Accelerate itself wants a GPU for fp16; its optimizer wrapper with a scaler of the CPU is the same code."""
    from accelerate.optimizer import AcceleratedOptimizer

    accelerate.Accelerator(cpu=True)
    model = network(seed)
    inner = pyshard.AdamW(model.parameters(), lr=0.01, fused=fused)
    optimizer = AcceleratedOptimizer(inner, device_placement=True, scaler=torch.amp.GradScaler("cpu"))
    skipped = []
    for step, (x, y) in enumerate(DataLoader(data(seed), batch_size=12)):
        optimizer.zero_grad()
        optimizer.scaler.scale((model(x) - y).square().mean()).backward()
        if step == 1:
            model[0].bias.grad[0] = math.inf
        optimizer.step()
        skipped.append(optimizer.step_was_skipped)
    # With fused=True the step is called and skips itself, as torch's fused does: only skipped_steps tells.
    assert skipped == ([False] * 4 if fused else [False, True, False, False])
    assert inner.skipped_steps == (1 if fused else 0)
    assert inner.state[model[0].bias]["step"] == 3


# ---- Lightning ----


@pytest.fixture
def lightning() -> Any:
    return pytest.importorskip("lightning", reason="lightning is not installed")


def module_of(lightning: Any, model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> Any:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            x, y = batch
            loss = (self.model(x.to(next(self.model.parameters()).dtype)).float() - y).square().mean()
            losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return {
                "optimizer": optimizer,
                "lr_scheduler": {
                    "scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=40),
                    "interval": "step",
                },
            }

    return Module()


def trainer_of(lightning: Any, folder: Path, **options: Any) -> Any:
    return lightning.Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_epochs": 1, **options},
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5}, {"accumulate_grad_batches": 3}], ids=str)
def test_lightning_fit(seed: int, lightning: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    """Forward and backward run inside the closure that step() gets."""
    runs = []
    for library in (pyshard, torch.optim):
        model, losses = network(seed), []
        optimizer = library.AdamW(model.parameters(), lr=0.01)
        trainer = trainer_of(lightning, tmp_path, **options)
        trainer.fit(module_of(lightning, model, optimizer, losses), DataLoader(data(seed), batch_size=4))
        assert optimizer.state[model[0].weight]["step"] == (4 if "accumulate_grad_batches" in options else 12)
        runs.append(losses)
    assert len(runs[0]) == 12
    assert runs[0] == pytest.approx(runs[1], **LOSS)


def test_lightning_resumes_bf16_training(seed: int, lightning: Any, tmp_path: Path) -> None:
    """A checkpoint after one epoch, loaded by a new Trainer: the second epoch has the same losses, bit for bit."""
    loader = DataLoader(data(seed), batch_size=4)
    whole: list[float] = []
    model = network(seed, torch.bfloat16)
    trainer = trainer_of(lightning, tmp_path, max_epochs=2)
    trainer.fit(module_of(lightning, model, pyshard.AdamW(model.parameters(), lr=0.01), whole), loader)

    parts: list[float] = []
    model = network(seed, torch.bfloat16)
    trainer = trainer_of(lightning, tmp_path, max_epochs=1)
    trainer.fit(module_of(lightning, model, pyshard.AdamW(model.parameters(), lr=0.01), parts), loader)
    trainer.save_checkpoint(tmp_path / "epoch1.ckpt")
    model = network(seed + 9, torch.bfloat16)
    trainer = trainer_of(lightning, tmp_path, max_epochs=2)
    module = module_of(lightning, model, pyshard.AdamW(model.parameters(), lr=0.5), parts)
    trainer.fit(module, loader, ckpt_path=tmp_path / "epoch1.ckpt")
    assert parts == whole and len(whole) == 24


@pytest.mark.parametrize("fused", [None, True])
def test_lightning_clips_under_a_grad_scaler(seed: int, lightning: Any, tmp_path: Path, fused: bool | None) -> None:
    """It refuses to clip for optimizers that unscale by themselves: for us, as for torch, those with fused=True."""
    from lightning.pytorch.plugins import MixedPrecision

    def fit(**options: Any) -> tuple[pyshard.AdamW, nn.Module]:
        model, losses = network(seed), []
        optimizer = pyshard.AdamW(model.parameters(), lr=0.01, fused=fused)
        precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
        trainer = trainer_of(lightning, tmp_path, plugins=[precision], **options)
        trainer.fit(module_of(lightning, model, optimizer, losses), DataLoader(data(seed), batch_size=4))
        assert all(math.isfinite(loss) for loss in losses) and len(losses) == 12
        return optimizer, model

    if fused:
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            fit(gradient_clip_val=0.5)
    optimizer, model = fit() if fused else fit(gradient_clip_val=0.5)
    assert optimizer.state[model[0].weight]["step"] == 12
    assert not torch.equal(model[0].weight, network(seed)[0].weight)
