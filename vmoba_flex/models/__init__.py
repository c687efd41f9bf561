"""VMoBA inside video transformers of diffusers, by swapping their attention processors.

    state.py        what the layers of one model share: the grid that arrived, the step, what is dense
    parallel.py     the ranks that share a layer's tokens
    step_op.py      attention as an op that reads as it runs whether the step is dense
    processor.py    a layer's attention: sparse, or the stock processor's where it is dense
    families.py     how a layer of each model family makes query, key and value; the family's grid
    adapters.py     a model's class -> its adapter: processor, layers, grid
    applied.py      VMoBA on one model: its processors, and what readies them before each forward
    handle.py       what apply_vmoba returns
    apply.py        apply_vmoba

diffusers is not imported: a model is known by the name of its class.
"""

from vmoba_flex.models.adapters import Adapter, register_adapter
from vmoba_flex.models.apply import apply_vmoba
from vmoba_flex.models.handle import VMoBAHandle
from vmoba_flex.models.processor import VMoBAProcessor

__all__ = ["Adapter", "VMoBAHandle", "VMoBAProcessor", "apply_vmoba", "register_adapter"]
