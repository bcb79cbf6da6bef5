"""The training loop: batches from Parquet in, a student out; exact after any interruption.

Everything a step does is a function of the step's number and of the state in the checkpoint, so a
run that was killed and resumed ends with the bits of one that was not (CPU, float32).
"""

import csv
import io
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.config import DistillConfig
from pipeline.core.errors import PipelineError
from pipeline.core.provenance import write_file
from pipeline.models.blocks import smooth_filters
from pipeline.models.student import Student
from pipeline.training.batches import Batch
from pipeline.training.distributed import Ranks
from pipeline.training.losses import loss_terms

VERSION = 1  # raise it when a change here changes the trained weights


class Trainer:
    """A student, its optimiser and its averaged weights, at some step of a run.

    mean: (E,) mean of the training targets. Two trainers with the same configuration that were
    given the same batches are equal to the last bit on the same machine.
    """

    @torch.no_grad()
    def __init__(self, config: DistillConfig, student: Student, mean: np.ndarray, ranks: Ranks):
        self.config, self.ranks = config, ranks
        self.student = student.to(ranks.device).train()
        if config.fixed_stem_frequencies:
            stem = student.conv1.weight.requires_grad_(False)  # (W, 3, p, p)
            stem.copy_(
                smooth_filters(
                    len(stem), stem.shape[-1], config.fixed_stem_frequencies, config.seed
                )
            )
        if config.mixup and config.batch // ranks.size % 2:
            raise PipelineError(
                f"distill.mixup pairs images, and {config.batch // ranks.size} a rank is odd. "
                "Choose another distill.batch."
            )
        self.mean = torch.from_numpy(mean).to(ranks.device)  # (E,)
        self.average = {k: v.detach().clone() for k, v in self._named()} if config.ema else None
        decayed = [p for _, p in self._named() if p.ndim > 1]
        others = [p for _, p in self._named() if p.ndim <= 1]  # norms, biases, scale
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.98),  # CLIP's, as for the teacher (Radford et al. 2021)
            fused=True,
        )
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, patience=2)
        self.step, self.lost = 0, 0
        self.log: list[dict] = []

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One step on this rank's share of a batch; returns the terms of the loss.

        Raises PipelineError on a loss that is not finite, before the weights change.
        """
        ranks, config = self.ranks, self.config
        self._set_learning_rate()
        pixels = self._noisy(self.normalised(batch.pixels), batch.places)
        targets = torch.from_numpy(batch.targets).to(ranks.device)
        if config.mixup:
            pixels, targets = self._mixed(pixels, targets, batch.places)
        with torch.autocast(
            ranks.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"
        ):
            # a rank none of whose rows decodes takes part in the sums all the same
            shown = pixels if len(pixels) else pixels.new_zeros(1, *pixels.shape[1:])
            own = self.student.embeddings_for_loss(shown)[:, : len(pixels)]  # (T, b, E)
        student = ranks.gather(own.transpose(0, 1)).transpose(0, 1)  # (T, B, E)
        target = ranks.gather(targets)
        texts = ranks.gather(torch.from_numpy(batch.texts).to(ranks.device))
        if not len(target):
            raise PipelineError(
                f"none of the {config.batch} images of step {self.step} decodes: data/images is "
                "damaged. Delete it and run `pipeline download`."
            )
        terms = loss_terms(config.loss, config.relational_scale, student, target, texts, self.mean)
        loss = sum(getattr(config.loss, name) * term for name, term in terms.items())
        values = {"loss": loss.item()} | {name: term.item() for name, term in terms.items()}
        if not math.isfinite(values["loss"]):
            raise PipelineError(
                f"the loss is {values['loss']} at step {self.step} (terms: {values}). Lower "
                "distill.learning_rate, lengthen distill.warmup, or set distill.precision: "
                f"float32. The checkpoint before this step is kept."
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        ranks.sum_gradients(self.student.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self._update_average()
        self.step += 1
        self.lost += ranks.total(len(batch.lost))
        rate = self.optimizer.param_groups[0]["lr"]
        return values | {"gradient_norm": float(norm), "learning_rate": rate}

    def normalised(self, pixels: np.ndarray) -> Tensor:
        """(b, S, S, 3) uint8 -> (b, 3, S, S) float32: bytes cross to the device, floats do not."""
        tensor = torch.from_numpy(pixels)
        if self.ranks.device.type == "cuda":
            tensor = tensor.pin_memory().to(self.ranks.device, non_blocking=True)
        return self.student.normalise(tensor.permute(0, 3, 1, 2))

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Cosine to the targets of a split beside its floor, the mean training target."""
        student, targets = self.averaged_student(), []
        with torch.inference_mode():
            found = []
            for batch in batches:
                if len(batch.ids):
                    found.append(student(self.normalised(batch.pixels))[0].float().cpu())
                    targets.append(torch.from_numpy(batch.targets))
        target = torch.cat(targets)
        floor = F.cosine_similarity(self.mean.cpu()[None], target).mean()
        cosine = F.cosine_similarity(torch.cat(found), target).mean()
        if self.config.schedule == "plateau":
            self.plateau.step(1 - float(cosine))
        return {"val_cosine": float(cosine), "val_floor": float(floor)}

    def averaged_student(self) -> Student:
        """The student with its averaged weights, where distill.ema asks for them; to evaluate."""
        student = Student(self.student.config, self.student.preprocessing).to(self.ranks.device)
        student.load_state_dict(self.student.state_dict() | (self.average or {}))
        return student.eval()

    def save(self, path: Path) -> None:
        """Write the checkpoint: all that a resume needs, under its final name only when whole."""
        state = {
            "step": self.step,
            "lost": self.lost,
            "log": self.log,
            "student": self.student.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "plateau": self.plateau.state_dict(),
        }
        write_file(path, lambda partial: torch.save(state, partial))

    def restore(self, path: Path) -> None:
        """Go back to a checkpoint. Raises PipelineError for a damaged one."""
        try:
            state = torch.load(path, map_location=self.ranks.device, weights_only=True)
            self.student.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.plateau.load_state_dict(state["plateau"])
        except Exception as error:  # zip, pickle and key errors alike: the file is not ours or torn
            raise PipelineError(
                f"{path} cannot be resumed from ({type(error).__name__}). Delete it and run "
                "`pipeline distill` to start from step 0."
            ) from None
        self.step, self.lost, self.log = state["step"], state["lost"], state["log"]
        self.average = state["average"]

    def _named(self):
        return self.student.named_parameters()

    def _set_learning_rate(self) -> None:
        """Linear warm-up, then half a cosine to zero, or what the plateau rule has left of it."""
        config = self.config
        warm = min(1.0, (self.step + 1) / max(1, config.warmup))
        if config.schedule == "plateau":
            if self.step < config.warmup:
                self._rate(config.learning_rate * warm)
            return
        over = max(0, self.step - config.warmup) / max(1, config.steps - config.warmup)
        self._rate(config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * over)))

    def _rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _noisy(self, pixels: Tensor, places: np.ndarray) -> Tensor:
        """Brightness and contrast noise for the student: a function of seed, step and place."""
        amount = self.config.color_jitter
        if not amount:
            return pixels
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        drawn = torch.rand(self.config.batch, 2, generator=generator)[places]  # (b, 2)
        drawn = (2 * drawn - 1).to(pixels.device) * amount
        contrast, brightness = drawn[:, :1, None, None] + 1, drawn[:, 1:, None, None]
        return pixels * contrast + brightness

    def _mixed(self, pixels: Tensor, targets: Tensor, places: np.ndarray) -> tuple[Tensor, Tensor]:
        """Rows overlaid with their neighbours of the step, and so their targets: mixup (Zhang et
        al. 2018), whose shares, Beta(mixup, mixup), are a function of seed, step and place.

        A row keeps the larger share of itself; one whose neighbour did not decode stays as it is.
        """
        config, neighbours = self.config, places ^ 1
        drawn = np.random.default_rng([config.seed, self.step]).beta(
            *2 * [config.mixup], config.batch
        )
        own = np.maximum(drawn, 1 - drawn)[places].astype(np.float32)
        at = np.searchsorted(places, neighbours).clip(max=len(places) - 1)
        at = torch.from_numpy(np.where(places[at] == neighbours, at, np.arange(len(places))))
        at, own = at.to(pixels.device), torch.from_numpy(own).to(pixels.device)[:, None]
        mixed = torch.lerp(pixels[at], pixels, own[..., None, None])
        return mixed, F.normalize(torch.lerp(targets[at], targets, own), dim=1)

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is not None:
            decay = min(self.config.ema, (self.step + 1) / (self.step + 10))  # soon near the start
            for name, parameter in self._named():
                self.average[name].lerp_(parameter, 1 - decay)


def write_log(path: Path, log: list[dict]) -> None:
    """The training log as CSV: a row per logged step, every column in every row."""
    columns = list(dict.fromkeys(key for row in log for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(log)
    path.write_text(text.getvalue())
