"""Import this before open_clip: it imports torchvision, also beside a CPU-only torch.

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
