"""How fast the student is, as ratios against a plain implementation measured in the same run.

Run:   python benchmarks/student_speed.py [--batch 32] [--rounds 5] [--threads 2] [--device cpu]
Cost:  about two minutes on two CPU cores.

The plain reference is the same network as one writes it from the standard parts, and as the
published implementation does: nn.MultiheadAttention with an additive mask, a convolution for the
patches, LayerNorm computed in float32, x * sigmoid(1.702 x). Same weights, same batch, same type;
the rounds of all contestants alternate, and the median of the rounds' ratios is printed. Both
outputs are compared first. The bound is the time of the bare matrix products of one step.
"""

import argparse
import statistics
from collections import OrderedDict

import torch
import torch.nn.functional as F
from by_turns import median_ratio, seconds_by_turns
from published import PUBLISHED, bare_products
from torch import Tensor, nn

from pipeline.models.student import MAX_SCALE, Student
from pipeline.training.losses import published_loss


class Float32LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int, need_weights: bool):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = Float32LayerNorm(width), Float32LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=QuickGELU(),
                c_proj=nn.Linear(4 * width, width),
            )
        )
        self.need_weights = need_weights

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # (N, B, W)
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=self.need_weights, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class PlainStudent(nn.Module):
    """The published configuration only."""

    def __init__(self, student: Student, need_weights: bool):
        super().__init__()
        config = student.config
        width = config.embedding_size + config.heads
        self.heads = config.heads
        self.conv1 = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(config.grid**2, width))
        self.ln_pre = Float32LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(
            PlainBlock(width, config.heads, need_weights) for _ in range(config.layers)
        )
        self.scale = nn.Parameter(torch.empty(1))
        self.register_buffer("mask", student.attention_bias.clone(), persistent=False)
        self.load_state_dict(student.state_dict())

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)  # (B, N, W)
        x = self.ln_pre(x + self.positional_embedding).transpose(0, 1)  # (N, B, W)
        for block in self.transformer.resblocks:
            x = block(x, self.mask.to(x.dtype))
        heads = x.transpose(0, 1).unflatten(2, (self.heads, -1))  # (B, N, H, C + 1)
        weights = heads[..., -1].mean(dim=2).softmax(dim=1)  # (B, N)
        patches = heads[..., :-1].flatten(2)  # (B, N, E)
        patches = patches / patches.norm(dim=2, keepdim=True) * self.scale.clamp(max=MAX_SCALE)
        return (weights[..., None] * patches).sum(dim=1), weights


def train_step(model: nn.Module, pixels: Tensor, target: Tensor, dtype: torch.dtype):
    """Forward, loss and backward; the optimiser is the same for everybody and left out."""

    def step():
        for parameter in model.parameters():
            parameter.grad = None
        with torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
            loss = published_loss(model(pixels)[0], target)
        loss.backward()

    return step


def inference(model: nn.Module, pixels: Tensor, dtype: torch.dtype):
    @torch.inference_mode()
    def step():
        with torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
            model(pixels)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    student = Student(PUBLISHED).to(args.device)
    plain = {
        "plain": PlainStudent(student, need_weights=False).to(args.device),
        "plain, need_weights": PlainStudent(student, need_weights=True).to(args.device),
    }
    size = PUBLISHED.image_size
    pixels = torch.randn(args.batch, 3, size, size, device=args.device)
    target = torch.randn(args.batch, PUBLISHED.embedding_size, device=args.device)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    print(
        f"{parameters / 1e6:.2f} M parameters, batch {args.batch}, {args.threads} threads,",
        args.device,
    )

    for dtype in (torch.float32, torch.bfloat16):
        for task, make in (("training", train_step), ("inference", inference)):
            extra = (target,) if make is train_step else ()
            models = {"student": student.train(task == "training"), **plain}
            steps = {name: make(model, pixels, *extra, dtype) for name, model in models.items()}
            steps["products"] = bare_products(
                args.batch, PUBLISHED, dtype, args.device, task == "training"
            )
            report(f"{task} {str(dtype).removeprefix('torch.')}", steps, args)
        agreement(student.eval(), plain["plain"], pixels, dtype)


def report(title: str, steps: dict, args: argparse.Namespace) -> None:
    times = seconds_by_turns(steps, args.rounds, warm_up=True, device=args.device)

    def ratio(name: str) -> float:
        return median_ratio(times[name], times["student"])

    rate = args.batch / statistics.median(times["student"])
    print(
        f"{title:20s} {rate:7.1f} images/s | {ratio('plain'):.2f} x plain | "
        f"{ratio('plain, need_weights'):.2f} x plain with need_weights | "
        f"{ratio('products'):.2f} of the matrix products' speed"
    )


@torch.inference_mode()
def agreement(student: Student, plain: PlainStudent, pixels: Tensor, dtype: torch.dtype) -> None:
    """Cosine of both implementations' embeddings, and of each with the student in float32."""
    exact = student(pixels)[0]
    with torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
        ours, theirs = student(pixels)[0].float(), plain(pixels)[0].float()
    for name, a, b in (("both", ours, theirs), ("ours", ours, exact), ("plain", theirs, exact)):
        print(f"    1 - cos, {name}: {(1 - F.cosine_similarity(a, b)).max():.1e}", end="")
    print()


if __name__ == "__main__":
    main()
