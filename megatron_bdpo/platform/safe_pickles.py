"""Checkpoints hold pickles, and a pickle may name any function to call. Here they get what a checkpoint needs, no more.

torch's distributed checkpoints have two kinds of them:

- ``.metadata`` goes through ``pickle.load`` in torch's reader, whatever it names. That one name in torch's module is
  replaced by an unpickler that knows the classes of the metadata and refuses all others.
- What is no tensor (random states, Megatron's arguments) is read by ``torch.load``, in torch's own planner with
  ``weights_only=False``. torch's own switch makes that ``True`` everywhere; Megatron has registered its classes.

Both hold for the whole process: nothing in it needs more. The third kind, Transformer Engine's ``_extra_state``, is a
pickle within a tensor; no model loads it (see ``model.precision``).
"""

from __future__ import annotations

import os
import pickle
import types
from typing import IO, Any

from torch.distributed.checkpoint import filesystem

from megatron_bdpo.errors import UserError

_TORCH_SWITCH = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_OPPOSITE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"

_DCP = "torch.distributed.checkpoint"
_METADATA_CLASSES = {
    f"{_DCP}.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.filesystem": {"_StorageInfo", "StreamTransformExtensions"},
    f"{_DCP}.planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.serialization": {"_get_layout"},
    "torch": {
        "Size", "bfloat16", "bool", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "int16", "int32",
        "int64", "int8", "uint8",
    },
    "collections": {"OrderedDict"},
    "builtins": {"set"},
}  # fmt: skip


class MetadataUnpickler(pickle.Unpickler):
    """Builds the classes of a checkpoint's metadata and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """What the pickle calls by this name.

        Raises:
            UserError: it is no part of a checkpoint's metadata. Nothing has been called by then.
        """
        if name not in _METADATA_CLASSES.get(module, ()):
            raise UserError(
                f"the checkpoint's .metadata asks for {module}.{name}, which is no part of a checkpoint and could run "
                "code of a stranger's. Do not use this checkpoint; ask where it comes from."
            )
        return super().find_class(module, name)


def _load(file: IO[bytes], **options: Any) -> Any:
    return MetadataUnpickler(file, **options).load()


def restrict_pickles() -> None:
    """Restrict both kinds. Idempotent.

    Raises:
        UserError: torch's opposite switch is set.
    """
    if os.environ.get(_OPPOSITE, "0").lower() in ("1", "y", "yes", "true"):
        raise UserError(
            f"{_OPPOSITE} is set: torch would run code from checkpoints, which nothing here needs. Unset it."
        )
    os.environ[_TORCH_SWITCH] = "1"
    if filesystem.pickle is pickle:
        names = {name: getattr(pickle, name) for name in pickle.__all__}
        filesystem.pickle = types.SimpleNamespace(**names | {"load": _load})  # type: ignore[assignment]
