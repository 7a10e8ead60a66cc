"""Multi-Task Zipping: several pretrained networks become one that stores their shared weights once::

zipped = mtzip.zip_networks({"a": net_a, "b": net_b}, {"a": inputs_a, "b": inputs_b})
mtzip.retrain(zipped, {"a": loader_a, "b": loader_b}, steps=100)
mtzip.save(zipped, "zipped.safetensors")
"""

from .deploy.onnx import export_onnx
from .errors import ZipError
from .report import Report
from .retraining.retrain import retrain
from .save import load, save
from .share import ZippedNetwork
from .zip import zip_networks

__all__ = ["Report", "ZipError", "ZippedNetwork", "export_onnx", "load", "retrain", "save", "zip_networks"]
