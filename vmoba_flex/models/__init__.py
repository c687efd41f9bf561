"""VMoBA inside video transformers of diffusers, by swapping their attention processors.

    steps.py        the denoising step of the pipeline that runs
    plan.py         what one forward asks of each layer, and how a compiled graph finds it
    state.py        the state of a model and of one forward pass: grid, step, which layers are dense
    parallel.py     the ranks that share a layer's tokens
    step_op.py      attention as an op that reads at run time what the step asks of a layer
    processor.py    a layer's attention: sparse, or dense by the stock processor
    families.py     how a layer of each model family makes query, key and value; the family's grid
    adapters.py     a model's class -> its adapter: processor, layers, grid
    applied.py      VMoBA on one model: its processors, and the hooks around each forward
    handle.py       what apply_vmoba returns
    apply.py        apply_vmoba

Models are recognised by their class names, so diffusers is not imported.
"""

from vmoba_flex.models.adapters import Adapter, register_adapter
from vmoba_flex.models.apply import apply_vmoba
from vmoba_flex.models.handle import VMoBAHandle
from vmoba_flex.models.processor import VMoBAProcessor

__all__ = ["Adapter", "VMoBAHandle", "VMoBAProcessor", "apply_vmoba", "register_adapter"]
