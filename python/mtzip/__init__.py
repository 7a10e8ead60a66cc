"""Multi-Task Zipping: several pretrained networks become one that stores their shared weights once::

zipped = mtzip.zip_networks({"a": net_a, "b": net_b}, {"a": inputs_a, "b": inputs_b})
mtzip.retrain(zipped, {"a": loader_a, "b": loader_b}, steps=100)
mtzip.save(zipped, "zipped.safetensors")
"""

from .adding.add import add_network
from .deploy.onnx import export_onnx
from .errors import ZipError
from .network.zipped import ZippedNetwork
from .planning.budget import Budget, Plan
from .reports.report import Report
from .retraining.retrain import retrain
from .saving.save import load, save
from .tradeoff import tradeoff
from .zip import plan, zip_networks

__all__ = [
    "Budget",
    "Plan",
    "Report",
    "ZipError",
    "ZippedNetwork",
    "add_network",
    "export_onnx",
    "load",
    "plan",
    "retrain",
    "save",
    "tradeoff",
    "zip_networks",
]
