"""VMoBA inside video transformers of diffusers, by swapping their attention processors.

    adapters.py     what each model family is: its layers, its grid, how it makes query, key and value
    processor.py    a layer's attention: sparse, or the stock processor's where it is dense
    run.py          what the layers of one model share: the grid that arrived, the step, what is dense
    apply.py        apply_vmoba, and the handle that it returns

diffusers is not imported: a model is known by the name of its class.
"""

from vmoba_flex.models.adapters import Adapter, register_adapter
from vmoba_flex.models.apply import VMoBAHandle, apply_vmoba
from vmoba_flex.models.processor import VMoBAProcessor

__all__ = ["Adapter", "VMoBAHandle", "VMoBAProcessor", "apply_vmoba", "register_adapter"]
