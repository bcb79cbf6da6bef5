"""The one import of open_clip, which imports torchvision, also beside a CPU-only torch.

    from pipeline.models.open_clip import open_clip

torchvision's wheel is built for CUDA. Beside a CPU-only torch its compiled operators cannot be
loaded, and its Python code then fails: `RuntimeError: operator torchvision::nms does not exist`.
Declaring the schemas of the two operators that it looks up is enough for its transforms, all that
open_clip uses. Where torchvision imports as it is, nothing is declared.
"""

import torch

SCHEMAS = [
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
]

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    library = torch.library.Library("torchvision", "FRAGMENT")  # forgotten once it is collected
    for schema in SCHEMAS:
        library.define(schema)
    import torchvision  # noqa: F401

import open_clip  # noqa: E402
import open_clip.transform  # noqa: E402
from open_clip.modified_resnet import ModifiedResNet  # noqa: E402
from open_clip.transformer import QuickGELU, VisionTransformer  # noqa: E402

__all__ = ["ModifiedResNet", "QuickGELU", "VisionTransformer", "open_clip"]
