"""Tensors on disk: whole ones in one file, those in shards in a folder with a file a rank.

Shards are written and read by torch's distributed checkpoint, any number of ranks reads what each needs. All files are
safetensors, those of shards name the place of each part: nothing in them is executed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rlpost.errors import DiskError
from rlpost.run.files import disk_errors

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.checkpoint.api import CheckpointException

SUFFIX = ".shards"
"""Of a folder in a checkpoint, besides or instead of NAME.safetensors."""
ShardedAs = Callable[[str], "Tensor | None"]
"""The name of a tensor on disk -> a tensor that is sharded as it is to be; None where it is to be whole."""


def sharded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of which this rank has a part only."""
    from torch.distributed.tensor import DTensor

    return {name: x.detach() for name, x in tensors.items() if isinstance(x, DTensor)}


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in shards; all ranks call this, with the same folder.

    Raises:
        DiskError: one of them could not write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    with disk_errors(folder):
        try:
            save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
        except CheckpointException as error:
            raise _first(error, folder) from error


def read_shards(folder: Path, sharded_as: ShardedAs) -> dict[str, Tensor]:
    """The tensors in a folder that `write_shards` wrote, of each what this rank is to have.

    Raises:
        DiskError: they cannot be read.
    """
    import torch
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.tensor import DTensor

    with disk_errors(folder):
        found: dict[str, Tensor] = {}
        for name, about in HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items():
            assert isinstance(about, TensorStorageMetadata), name
            other, dtype = sharded_as(name), about.properties.dtype
            if isinstance(other, DTensor) and other.shape == about.size:
                found[name] = torch.empty_like(other, dtype=dtype)
            else:
                found[name] = torch.empty(about.size, dtype=dtype)
        try:
            # Each reads by itself: what it needs depends on nobody.
            load(found, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        except CheckpointException as error:
            raise _first(error, folder) from error
    return found


def _first(error: CheckpointException, folder: Path) -> Exception:
    """The first rank's failure among those of a distributed checkpoint."""
    first = next((failure for failure, _ in error.failures.values()), error)
    return first if isinstance(first, OSError) else DiskError(f"{folder}: {first}; check the disk and run it again")


def write_whole(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors to one safetensors file; views of one storage are copied, since it holds each apart."""
    from safetensors.torch import save_file

    storages: set[int] = set()
    ready: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    save_file(ready, path)


def first_not_finite(folder: Path) -> str | None:
    """The first tensor in the files of a folder that holds a NaN or an infinity."""
    from safetensors import safe_open

    for path in sorted(folder.rglob("*.safetensors")):
        with disk_errors(path), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    return f"{name} in {path.name} is not finite"
    return None
