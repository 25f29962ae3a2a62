"""Composes a recipe's files into one plain tree, with Hydra."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

from rlpost.recipe.files import Part
from rlpost.usercode.places import packaged_folder

_LOCK = threading.RLock()  # Hydra's state and its config store are global to the process
_NAME = "_rlpost"


@cache
def _bare_settings() -> Any:
    """Hydra's own configuration without the ten logger and launcher files that it would otherwise read each time."""
    from hydra.conf import HydraConf
    from hydra.core.config_store import ConfigNode
    from omegaconf import OmegaConf

    return ConfigNode("config.yaml", OmegaConf.structured(HydraConf(defaults=[])), "hydra", None, "hydra")


def compose(parts: Sequence[Part]) -> dict[str, Any]:
    """Merge the parts in order: mappings merge, anything else replaces, a chosen group replaces its whole section."""
    if len(parts) == 1:
        return copy.deepcopy(parts[0].keys)  # nothing to merge: importing Hydra would take a third of `rlpost show`
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore

    # Values go through as numbers of this list: OmegaConf would parse references in them, and be slow with long lists.
    values: list[Any] = []

    def numbered(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: numbered(inner) for key, inner in tree.items()}
        values.append(tree)
        return len(values) - 1

    def valued(tree: Any) -> Any:
        return {k: valued(v) for k, v in tree.items()} if isinstance(tree, dict) else values[tree]

    with _LOCK:
        store = ConfigStore.instance()
        names = [f"{_NAME}_{i}" for i in range(len(parts))]
        settings = store.repo["hydra"]["config.yaml"]
        try:
            store.repo["hydra"]["config.yaml"] = _bare_settings()
            for i, (name, part) in enumerate(zip(names, parts, strict=True)):
                replaced = {later.group for later in parts[i + 1 :]}
                node = {key: value for key, value in part.keys.items() if key not in replaced}
                store.store(name=name, node=numbered(node))
            store.store(name=_NAME, node={"defaults": [*names, "_self_"]})
            # Of a folder: without one, Hydra would read the sources of all callers to find out who calls.
            with initialize_config_dir(str(packaged_folder()), version_base="1.3"):
                composed = compose(_NAME)
        finally:
            for name in (_NAME, *names):
                store.repo.pop(f"{name}.yaml", None)
            store.repo["hydra"]["config.yaml"] = settings
    from omegaconf import OmegaConf

    return cast(dict[str, Any], valued(OmegaConf.to_container(composed)))
