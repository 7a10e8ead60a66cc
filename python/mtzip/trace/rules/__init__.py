"""One rule per ATen operator: what it does to the axes of its inputs.

A rule takes the analysis and a node and returns the dimensions of the node's output, a list of them for an operator
with several outputs. An operator without a rule pins the atoms of its inputs, so that the layers around it stay
private, and is noted: never an error, never a silent guess.
"""

from . import attention, elementwise, layers, norms, pieces, reduce, reshape  # noqa: F401  (they register rules)
from .elementwise import pointwise, same_shape
from .registry import RULES, Rule, find, name_of, rule

__all__ = ["RULES", "Rule", "find", "name_of", "pointwise", "rule", "same_shape"]
