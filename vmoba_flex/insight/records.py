"""Query and key of one layer at one step, and files of them."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from block_masks.checks import check_tensor
from vmoba_flex.checks import check_choice, check_count, check_ids, check_positive
from vmoba_flex.config import KINDS
from vmoba_flex.groups import valid_keys
from vmoba_flex.inputs import check_is_device, check_query_key
from vmoba_flex.partition import BlockPartition
from vmoba_flex.rules import TopK
from vmoba_flex.user_error import UserError, check_extra, checked_path, new_file, one_line

_VERSION = 1
_FACTS = (
    *("model", "layer", "num_layers", "step", "num_steps", "kind", "heads", "text_length"),
    *("grid", "block", "prefix", "suffix"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """Query and key of some heads of one sample, as a layer's attention had them.

    Attributes:
        query: floating ``(heads, S, D)`` in raster order, prefix and suffix included.
        key: floating ``(heads, S, D)``, one head for each query head.
        partition: the layer's blocks; ``S`` is its ``num_tokens``.
        kind: ``"temporal"``, ``"spatial"`` or ``"spatiotemporal"``.
        layer: its index, from 0.
        num_layers: layers of the model; None if unknown. Needed where a config counts dense layers from the end.
        step: the denoising step, from 0.
        num_steps: denoising steps in all; None if unknown. Needed where a config changes at shares of them.
        heads: indices of these heads in the layer; the first ones by default.
        text_length: how many prefix and suffix tokens are valid, the first ones; all if None.
        model: the pipeline's name for the model.

    Raises:
        TypeError: if a value has a wrong type.
        ValueError: if values do not fit each other.
    """

    query: Tensor
    key: Tensor
    partition: BlockPartition
    kind: str = dataclasses.field(default="spatiotemporal", kw_only=True)
    layer: int = dataclasses.field(default=0, kw_only=True)
    num_layers: int | None = dataclasses.field(default=None, kw_only=True)
    step: int = dataclasses.field(default=0, kw_only=True)
    num_steps: int | None = dataclasses.field(default=None, kw_only=True)
    heads: tuple[int, ...] = dataclasses.field(default=(), kw_only=True)
    text_length: int | None = dataclasses.field(default=None, kw_only=True)
    model: str = dataclasses.field(default="model", kw_only=True)

    def __post_init__(self) -> None:
        check_tensor("query", self.query, "float", ("heads", "S", "D"))
        check_tensor("key", self.key, "float", ("heads", "S", "D"))
        check_query_key(self.query[None], self.key[None], self.partition, TopK(1))
        if self.key.shape != self.query.shape:
            raise ValueError(f"key must have query's shape {tuple(self.query.shape)}, got {tuple(self.key.shape)}")
        check_choice("kind", self.kind, KINDS)
        for name in ("num_layers", "num_steps"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if not isinstance(self.model, str):
            raise TypeError(f"model must be a str, got {self.model!r}")
        check_count("layer", self.layer, self.num_layers, "num_layers")
        check_count("step", self.step, self.num_steps, "num_steps")
        distinct = check_ids("heads", self.heads)
        object.__setattr__(self, "heads", tuple(self.heads) or tuple(range(len(self.query))))
        if len(self.heads) != len(self.query) or (distinct and len(distinct) != len(self.query)):
            raise ValueError(f"heads must name the {len(self.query)} heads of query, got {self.heads}")
        if self.text_length is not None:
            text = self.partition.prefix + self.partition.suffix
            check_count("text_length", self.text_length, text + 1, "prefix + suffix + 1")

    def key_valid(self) -> Tensor | None:
        """Which keys are valid, bool ``(S,)``; None if all are."""
        if self.text_length is None:
            return None
        valid = valid_keys(self.partition, torch.tensor([self.text_length], device=self.key.device))
        return None if valid is None else valid[0]

    def to(self, device: torch.device | str) -> "Record":
        """The same record on another device; raises ``TypeError`` unless ``device`` is one."""
        check_is_device("device", device)
        return dataclasses.replace(self, query=self.query.to(device), key=self.key.to(device))

    def num_bytes(self) -> int:
        """Bytes of query and key."""
        return self.query.nbytes + self.key.nbytes

    def __repr__(self) -> str:
        """All fields, with the dtype and shape of query and key in place of their values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        words = (f"{name}={_short(value)}" for name, value in values.items())
        return f"Record({', '.join(words)})"


def check_records(records: Any) -> None:
    """Raises ``TypeError`` unless ``records`` is a list or tuple of records."""
    if not isinstance(records, list | tuple):
        raise TypeError(f"records must be a list of Records, got {type(records).__name__}")
    for record in records:
        if not isinstance(record, Record):
            raise TypeError(f"records must hold Records, got {record!r}")


def save(records: Sequence[Record], path: Path | str) -> None:
    """Writes records to a safetensors file, which appears whole or not at all.

    Record i has the tensors ``<i>.query`` and ``<i>.key``; its other fields are JSON in the metadata.

    Raises:
        TypeError: if ``records`` are none, or ``path`` is neither a str nor a Path.
        UserError: a ``ValueError``, if there is nothing to write, or the file cannot be written.
    """
    check_records(records)
    check_extra("insight", "safetensors")
    from safetensors.torch import save_file

    if not records:
        raise UserError("there are no records to write: run the model while capture(model) is on")
    tensors: dict[str, Tensor] = {}
    facts, written = [], set[int]()
    for i, record in enumerate(records):
        for name, x in (("query", record.query), ("key", record.key)):
            memory, whole = x.untyped_storage().data_ptr(), x.contiguous()
            tensors[f"{i}.{name}"] = whole.clone() if memory in written else whole  # the format wants no shared memory
            written.add(memory)
        values = {name: getattr(record, name, None) for name in _FACTS}
        facts.append(values | {name: getattr(record.partition, name) for name in _FACTS[-4:]})
    metadata = {"vmoba_flex": json.dumps({"version": _VERSION, "records": facts})}
    with new_file(checked_path(path), ".safetensors", "records are a safetensors file") as draft:
        save_file(tensors, draft, metadata)


def load(path: Path | str) -> list[Record]:
    """The records of a file that ``save`` wrote.

    Raises:
        TypeError: if ``path`` is neither a str nor a Path.
        UserError: a ``ValueError``, if there is no such file, or it holds something else.
    """
    check_extra("insight", "safetensors")
    from safetensors import SafetensorError, safe_open

    path = checked_path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}: make one with capture(model).save(...)")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("vmoba_flex")
            if text is None:
                raise UserError(f"{path} holds no captured query and key: make it with capture(model).save(...)")
            data = json.loads(text)
            if data["version"] != _VERSION:
                raise UserError(f"{path} has version {data['version']!r} of its format, not {_VERSION}: capture again")
            if not data["records"]:
                raise UserError(f"{path} holds no records: capture again")
            return [
                _record(facts, file.get_tensor(f"{i}.query"), file.get_tensor(f"{i}.key"))
                for i, facts in enumerate(data["records"])
            ]
    except UserError:
        raise
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {path} as safetensors ({one_line(error)}): capture again") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} holds records that do not fit together ({one_line(error)}): capture again") from error


def _record(facts: dict[str, Any], query: Tensor, key: Tensor) -> Record:
    grid, block, prefix, suffix = (facts[name] for name in _FACTS[-4:])
    partition = BlockPartition(tuple(grid), tuple(block), prefix=prefix, suffix=suffix)
    for name in ("num_layers", "num_steps"):  # absent from files of earlier versions
        facts.setdefault(name, None)
    values: dict[str, Any] = {name: facts[name] for name in _FACTS[:-4]}
    return Record(query, key, partition, **values)


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"<{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}>"
    return repr(value)
