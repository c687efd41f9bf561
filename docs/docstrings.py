"""Reads the docstrings' `Example:` as the section of examples that it is; called by mkdocstrings (mkdocs.yml)."""

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Google style has `Examples:`, and griffe takes the singular for a note, in which `>>>` means quotes."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Renames the section before it is parsed."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
