"""VMoBA inside video transformers of diffusers, where their attention processors hand over query, key and value.

    steps.py        the denoising step of the pipeline that runs
    memory.py       what layers keep of steps that choose by exact masses, until the run ends
    plan.py         what one forward asks of each layer, and how a compiled graph finds it
    state.py        the state of a model and of one forward pass: grid, step, which layers are dense
    parallel.py     the ranks that share a layer's tokens
    step_op.py      attention as an op that reads at run time what the step asks of a layer
    processor.py    a layer's attention: sparse, or dense by the stock processor
    dispatcher.py   what is used of diffusers' insides: its dispatcher of attention, and how layers are skipped
    hook.py         processors whose stock one runs up to the attention, and hands query, key and value over
    families.py     processors of families that do not use diffusers' dispatcher
    grids.py        a forward's arguments -> the grid, and tokens before it
    adapter.py      what an adapter is: layers, grid, other tokens
    table.py        the models of diffusers, each with its adapter
    adapters.py     a model's class -> its adapter, of the table or registered
    applied.py      VMoBA on one model: its processors, and the hooks around each forward
    handle.py       what apply_vmoba returns
    apply.py        apply_vmoba

Models are recognised by their class names, so diffusers is not imported.
"""

from vmoba_flex.models.adapter import Adapter
from vmoba_flex.models.adapters import register_adapter
from vmoba_flex.models.apply import apply_vmoba
from vmoba_flex.models.grids import patched_grid
from vmoba_flex.models.handle import VMoBAHandle
from vmoba_flex.models.processor import VMoBAProcessor

__all__ = ["Adapter", "VMoBAHandle", "VMoBAProcessor", "apply_vmoba", "patched_grid", "register_adapter"]
