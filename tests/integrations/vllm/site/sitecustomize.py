"""On PYTHONPATH of the engine's processes: lets a torchvision whose kernels do not fit torch (built for CUDA) be imported.

Image processors of transformers import it for functions that need no kernel; the import itself describes two of them.
"""

import importlib.abc
import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision._meta_registrations":  # behind the attempt to load the kernels
            sys.meta_path.remove(self)
            import torch

            if not hasattr(torch.ops.torchvision, "nms"):
                self.library = torch.library.Library("torchvision", "DEF")
                for schema in SCHEMAS:
                    self.library.define(schema)
                torch.crop_keeps = self.library  # its definitions end with it
        return None


sys.meta_path.insert(0, _Finder())
