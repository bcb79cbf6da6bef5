"""The training loop: batches from Parquet in, a student out; exact after any interruption.

Everything a step does is a function of the step's number and of the state in the checkpoint, so a
run that was killed and resumed ends with the bits of one that was not (CPU, float32). A step never
waits for the device: its losses and the length of its gradient stay there until `read`.
"""

import copy
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.config import DistillConfig
from pipeline.core.errors import PipelineError
from pipeline.core.provenance import write_file
from pipeline.models.sizes import ManySizes
from pipeline.models.student import Student
from pipeline.training.augment import ColorJitter, Mixup, fixed_stem
from pipeline.training.batches import Batch
from pipeline.training.compiling import compiled
from pipeline.training.distributed import Ranks
from pipeline.training.losses import loss_terms

VERSION = 2  # raise it when a change here changes the trained weights


class Network(nn.Module):
    """From bytes to what the loss sees, as one graph: no float picture is ever stored on a GPU."""

    def __init__(self, student: Student, image_sizes: list[int]):
        super().__init__()
        self.student, self.sized = student, ManySizes(student, image_sizes)

    def forward(self, pixels: Tensor, *changes: ColorJitter | Mixup) -> Tensor:
        """(b, S, S, 3) uint8, S one of the sizes -> (T or 1, b, E)."""
        x = self.student.normalise(pixels.permute(0, 3, 1, 2))
        for change in changes:
            x = change.images(x)
        return self.sized.embeddings_for_loss(x)


class Trainer:
    """A student, its optimiser and its averaged weights, at some step of a run.

    mean: (E,) mean of the training targets. Two trainers with the same configuration that were
    given the same batches are equal to the last bit on the same machine.
    """

    @torch.no_grad()
    def __init__(
        self, config: DistillConfig, student: Student, mean: np.ndarray, ranks: Ranks
    ) -> None:
        self.config, self.ranks = config, ranks
        self.student = student.to(ranks.device).train()
        if config.fixed_stem_frequencies:
            stem = student.conv1.weight.requires_grad_(False)  # (W, 3, p, p)
            shape = len(stem), stem.shape[-1]
            stem.copy_(fixed_stem(*shape, config.fixed_stem_frequencies, config.seed))
        if config.mixup and config.batch // ranks.size % 2:
            raise PipelineError(
                f"distill.mixup pairs images, and {config.batch // ranks.size} a rank is odd. "
                "Choose another distill.batch."
            )
        self.network = ranks.summing_gradients(Network(student, config.image_sizes))
        self.fast = compiled(self.network, ranks.device)  # for a complete part of a batch
        self.mean = torch.from_numpy(mean).to(ranks.device)  # (E,)
        self.average = {k: v.detach().clone() for k, v in self._named()} if config.ema else None
        self.optimizer = self._optimizer()
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, patience=2)
        self.step, self.undecodable, self.skipped = 0, 0, 0
        self.log: list[dict] = []
        self.best = Best()
        self._unread: list[tuple[Tensor, dict]] = []
        self._names: list[str] = []
        self._lost = 0  # of this rank, since the last `read`

    def _optimizer(self) -> torch.optim.Optimizer:
        decayed = [p for _, p in self._named() if p.ndim > 1]
        others = [p for _, p in self._named() if p.ndim <= 1]  # norms, biases, scale
        return torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": self.config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.config.learning_rate,
            betas=(0.9, 0.98),  # CLIP's, as for the teacher (Radford et al. 2021)
            fused=True,
        )

    def train_step(self, batch: Batch) -> None:
        """One step on this rank's part of a batch; `read` says how it went.

        A loss or a gradient that is not finite leaves weights and optimiser as they are. Raises
        PipelineError where nothing decodes, and where the device's memory is too small.
        """
        self._set_learning_rate()
        try:
            terms = self._terms(batch)
            loss = sum(getattr(self.config.loss, name) * term for name, term in terms.items())
            self.optimizer.zero_grad(set_to_none=True)
            self.ranks.sized(loss).backward()
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            raise self._too_large(len(batch.pixels)) from None
        parameters = self.student.parameters()
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        # the fused optimiser reads this on the device, and then does nothing
        found_inf = (~(norm + loss.detach()).isfinite()).float()
        vars(self.optimizer)["found_inf"] = found_inf
        self.optimizer.step()
        self._update_average()
        self._names = ["loss", *terms, "gradient_norm"]
        values = torch.stack([loss.detach(), *(term.detach() for term in terms.values()), norm])
        rate = self.optimizer.param_groups[0]["lr"]
        self._unread.append((values, {"step": self.step + 1, "learning_rate": rate}))
        self._lost += len(batch.undecodable)
        self.step += 1

    def _terms(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of the loss, of the batch of all ranks."""
        config, device = self.config, self.ranks.device
        pixels, targets = (torch.as_tensor(x).to(device) for x in (batch.pixels, batch.targets))
        where = config.seed, self.step, config.batch, batch.position, device
        mixup = Mixup.drawn(config.mixup, *where) if config.mixup else None
        jitter = ColorJitter.drawn(config.color_jitter, *where) if config.color_jitter else None
        own = self._embedded(pixels, [change for change in (jitter, mixup) if change])
        student = self.ranks.gather(own.transpose(0, 1)).transpose(0, 1)  # (T, B, E)
        target = self.ranks.gather(mixup.embeddings(targets) if mixup else targets)
        if not len(target):
            raise PipelineError(
                f"none of the {config.batch} images of step {self.step} decodes: data/images is "
                "damaged. Delete it and run `pipeline download`."
            )
        texts = None
        if config.loss.caption:
            texts = torch.as_tensor(batch.texts).to(device)
            texts = self.ranks.gather(mixup.embeddings(texts) if mixup else texts)
        return loss_terms(config.loss, config.relational_scale, student, target, texts, self.mean)

    def _embedded(self, pixels: Tensor, changes: list) -> Tensor:
        """(b, S, S, 3) uint8 -> (T, b, E). With no row a rank takes part in the sums all the same."""
        with self._autocast():
            if not len(pixels):
                return self.network(pixels.new_zeros(1, *pixels.shape[1:]))[:, :0]
            complete = len(pixels) == self.config.batch // self.ranks.size
            return (self.fast if complete else self.network)(pixels, *changes)

    def _autocast(self) -> torch.autocast:
        half = self.config.precision == "bfloat16"
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=half)

    def read(self) -> list[dict]:
        """What the steps since the last call did: step, loss, its terms, gradient_norm,
        learning_rate, and skipped (1 for a step that changed nothing).

        Raises PipelineError once more steps were skipped than distill.max_skipped_steps.
        """
        if not self._unread:
            return []
        table = torch.stack([values for values, _ in self._unread]).tolist()
        rows = [
            facts | dict(zip(self._names, values, strict=True))
            for values, (_, facts) in zip(table, self._unread, strict=True)
        ]
        self._unread = []
        for row in rows:
            row["skipped"] = int(not math.isfinite(row["loss"] + row["gradient_norm"]))
        self.undecodable += self.ranks.total(self._lost)
        self._lost = 0
        bad = [row for row in rows if row["skipped"]]
        self.skipped += len(bad)
        if self.skipped > self.config.max_skipped_steps:
            raise PipelineError(
                f"at step {bad[-1]['step'] - 1} the loss is {bad[-1]['loss']} and the gradient's "
                f"norm {bad[-1]['gradient_norm']}; {self.skipped} such steps were skipped, "
                f"distill.max_skipped_steps is {self.config.max_skipped_steps}. Lower "
                "distill.learning_rate, lengthen distill.warmup, or set distill.precision: "
                "float32. The weights before this step are as they were."
            )
        return rows

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Cosine to the targets of a split beside its floor, the mean training target.

        Keeps the student as the best one where none before came closer.
        """
        student, targets, vectors = self.averaged_student(), [], []
        with torch.inference_mode():
            for batch in batches:
                if len(batch.ids):
                    pixels = student.as_input(np.asarray(batch.pixels))
                    vectors.append(student(pixels)[0].float().cpu())
                    targets.append(torch.from_numpy(batch.targets))
        if not targets:
            raise PipelineError(
                "no image of the validation split decodes: data/images is damaged. Delete it and "
                "run `pipeline download`."
            )
        target = torch.cat(targets)
        floor = float(F.cosine_similarity(self.mean.cpu()[None], target).mean())
        cosine = float(F.cosine_similarity(torch.cat(vectors), target).mean())
        if self.config.schedule == "plateau":
            self.plateau.step(1 - cosine)
        self.best.see(self.step, cosine, student)
        return {"val_cosine": cosine, "val_floor": floor}

    @property
    def ended(self) -> bool:
        """After the last step, or once early_stopping validations brought nothing better."""
        patience = self.config.early_stopping
        return self.step >= self.config.steps or bool(patience and self.best.since >= patience)

    def averaged_student(self) -> Student:
        """The student with its averaged weights, where distill.ema asks for them; to evaluate."""
        return self._with(self.student.state_dict() | (self.average or {}))

    def best_student(self) -> Student:
        """The student of the best validation."""
        return self._with(self.best.weights or {})

    def _with(self, weights: dict[str, Tensor]) -> Student:
        student = Student(self.student.config, self.student.preprocessing).to(self.ranks.device)
        student.load_state_dict(weights)
        return student.eval()

    def save(self, path: Path) -> None:
        """Write the checkpoint: all that a resume needs, under its final name only when complete."""
        state = {
            "step": self.step,
            "undecodable": self.undecodable,
            "skipped": self.skipped,
            "log": self.log,
            "student": self.student.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "plateau": self.plateau.state_dict(),
            "best": vars(self.best),
        }
        write_file(path, lambda partial: torch.save(state, partial))

    def restore(self, path: Path) -> None:
        """Go back to a checkpoint. Raises PipelineError for a damaged one."""
        try:
            state = torch.load(path, map_location=self.ranks.device, weights_only=True)
            self.student.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.plateau.load_state_dict(state["plateau"])
            self.best = Best(**state["best"])
        except Exception as error:  # zip, pickle and key errors alike: the file is not ours or torn
            raise PipelineError(
                f"{path} cannot be resumed from ({type(error).__name__}). Delete it and run "
                "`pipeline distill` to start from step 0."
            ) from None
        self.step, self.undecodable, self.log = state["step"], state["undecodable"], state["log"]
        self.average, self.skipped = state["average"], state["skipped"]

    def _named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
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

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is not None:
            decay = min(self.config.ema, (self.step + 1) / (self.step + 10))  # soon near the start
            now = [parameter.detach() for _, parameter in self._named()]
            torch._foreach_lerp_(list(self.average.values()), now, 1 - decay)

    def _too_large(self, rows: int) -> PipelineError:
        """What to say when a part of a batch does not fit: its half, quarter, ... are tried."""
        states = [] if self.optimizer.state else [torch.empty_like(p) for _, p in self._named()] * 2
        while rows > 1 and not self._fits(rows := rows // 2):
            pass
        del states
        return PipelineError(
            f"distill.batch {self.config.batch} does not fit into the memory of "
            f"{self.ranks.device}; {rows * self.ranks.size} does. Lower it (that is another run), "
            "or use more GPUs."
        )

    def _fits(self, rows: int) -> bool:
        """Whether a forward and backward pass of so many rows does."""
        size = max(self.config.image_sizes)
        try:
            pixels = torch.zeros(rows, size, size, 3, dtype=torch.uint8, device=self.mean.device)
            with self._autocast():
                loss = Network(self.student, [size])(pixels).float().square().sum()
            loss.backward()
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            self.optimizer.zero_grad(set_to_none=True)


class Best:
    """The weights of the best validation so far."""

    def __init__(
        self, step: int = 0, cosine: float = -math.inf, since: int = 0, weights: dict | None = None
    ) -> None:
        self.step, self.cosine, self.since, self.weights = step, cosine, since, weights

    def see(self, step: int, cosine: float, student: Student) -> None:
        """since counts the validations that brought nothing better."""
        self.since += 1
        if cosine > self.cosine:
            self.step, self.cosine, self.since = step, cosine, 0
            self.weights = copy.deepcopy(student.state_dict())
