"""What the student is trained to make small. B images, E embedding size, T student embeddings.

No term waits for the device: rows that take no part are masked, not cut out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.config import LossWeights

CENTRED = 0.9  # fraction of the mean that the relational term takes off both sides
SAME_TEXT = 1 - 1e-5  # cosine of two embeddings of one text, which float16 moves by 2.4e-7


def published_loss(student: Tensor, target: Tensor, norm: float = 100.0) -> Tensor:
    """Mean absolute difference over all values of the unit vectors, times norm: a scalar >= 0.

    student, target: (..., B, E), of any length; computed in float32. The published run used 100.
    """
    difference = F.normalize(student.float(), dim=-1) - F.normalize(target.float(), dim=-1)
    return norm * difference.abs().mean()


def cosine_loss(student: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cosine: 0 is perfect, 2 is opposite. (B, E) both, of any length."""
    return 1 - F.cosine_similarity(student.float(), target.float(), dim=-1).mean()


def contrastive_loss(
    student: Tensor, target: Tensor, scale: float, compared: Tensor | None = None
) -> Tensor:
    """CLIP's symmetric cross-entropy (Radford et al. 2021): row i of each side belongs to row i of
    the other. (B, E) both, of any length; scale is the inverse temperature; log B is chance.

    compared: (B, B) bool, symmetric: False where two rows are no negatives of each other. A row
    that is not compared with itself takes no part.
    """
    student, target = F.normalize(student.float(), dim=-1), F.normalize(target.float(), dim=-1)
    logits = scale * student @ target.T  # (B, B)
    own = torch.arange(len(logits), device=logits.device)
    if compared is None:
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    counted = compared.diagonal()
    logits = logits.masked_fill(
        ~(compared | torch.eye(len(logits), dtype=torch.bool, device=own.device)), float("-inf")
    )
    both = F.cross_entropy(logits, own, reduction="none")
    both = both + F.cross_entropy(logits.T, own, reduction="none")  # (B,), 0 of rows not counted
    return both.sum() / (2 * counted.sum().clamp(min=1))


def relational_loss(student: Tensor, target: Tensor, mean: Tensor, scale: float) -> Tensor:
    """Contrastive loss after most of the targets' mean (E,) is taken off both sides' unit vectors.

    Teacher vectors lie in a narrow cone around their mean. Without it, what tells images apart is
    what is left, and predicting the mean, which a plain cosine rewards, is chance.
    """
    student = F.normalize(student.float(), dim=-1) - CENTRED * mean
    target = F.normalize(target.float(), dim=-1) - CENTRED * mean
    return contrastive_loss(student, target, scale)


def caption_loss(student: Tensor, texts: Tensor, scale: float) -> Tensor:
    """Contrastive loss against captions, texts (B, E): zero where an image has none.

    Images that share a caption are no negatives of each other; 0 where no image has one.
    """
    captioned = (texts != 0).any(dim=1)
    unit = F.normalize(texts, dim=1)
    other = unit @ unit.T < SAME_TEXT
    other.fill_diagonal_(True)
    compared = other & captioned & captioned[:, None]
    return contrastive_loss(student, texts, scale, compared)


def loss_terms(
    weights: LossWeights,
    scale: float,
    student: Tensor,
    target: Tensor,
    texts: Tensor | None,
    mean: Tensor,
) -> dict[str, Tensor]:
    """Every term with a weight, unweighted. student (T, B, E); target, texts (B, E); mean (E,).

    The terms of several student embeddings are averaged. texts may be None where the caption term
    has no weight.
    """
    terms = {
        "l1": lambda s: published_loss(s, target),
        "cosine": lambda s: cosine_loss(s, target),
        "relational": lambda s: relational_loss(s, target, mean, scale),
        "caption": lambda s: caption_loss(s, texts, scale),  # ty: ignore[invalid-argument-type]
    }
    return {
        name: torch.stack([term(embedding) for embedding in student]).mean()
        for name, term in terms.items()
        if getattr(weights, name)
    }
