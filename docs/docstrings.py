"""What the API pages make of docstrings and signatures; called by mkdocstrings (mkdocs.yml)."""

import importlib
import re
from typing import Any

import griffe

PACKAGES = ("vmoba_flex", "vmoba_flex.models", "vmoba_flex.insight", "vmoba_flex.distributed", "block_masks")
_NAMES = {
    name: f"{package}.{name}"
    for package in PACKAGES
    for name in importlib.import_module(package).__all__
    if not name.startswith("_")
}
# Headings of docs/concepts.md, by the dispatch that they explain.
_DISPATCHES = {"packed": "packed-rows", "shared": "shared-choices"}
_CODE = re.compile(r"(see )?``(\w+)``")


class Pages(griffe.Extension):
    """Examples, links between public names, and the values of defaults."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Renames a section before it is parsed, and links the public names that the text mentions."""
        if obj.docstring is None:
            return

        def link(code: re.Match[str]) -> str:
            see, name = code[1] or "", code[2]
            if see and name in _DISPATCHES:
                return f"{see}[`{name}`][{_DISPATCHES[name]}]"
            return f"{see}[`{name}`][{_NAMES[name]}]" if name in _NAMES and name != obj.name else code[0]

        # Google style has `Examples:`; griffe takes the singular for a note, in which `>>>` means quotes.
        text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
        obj.docstring.value = _CODE.sub(link, text)

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Puts the value of a constant in place of its name, where that is a parameter's default."""
        for parameter in func.parameters:
            default = parameter.default
            if isinstance(default, griffe.ExprName) and default.name.isupper():
                module, _, name = default.canonical_path.rpartition(".")
                value = getattr(importlib.import_module(module), name)
                parameter.default = f"{value:_}" if isinstance(value, int) else repr(value)
