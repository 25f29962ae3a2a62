"""Uploads a checkpoint to the hub, with its model card: `rlpost push`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils._validators import validate_repo_id

from rlpost import console
from rlpost.errors import DiskError, ModelError, RecipeError, RlpostError
from rlpost.inference.card import REFERENCE, Written, card
from rlpost.inference.checkpoint import frozen_policy
from rlpost.inference.merge import CARD, about, must_be_here, write_merged
from rlpost.inference.provenance import is_hub_name
from rlpost.policy.adapter_files import base_of, first_line, is_adapter
from rlpost.policy.load import must_be_policy
from rlpost.policy.model_files import stored_dtype
from rlpost.policy.saved import save_policy
from rlpost.run.files import disk_errors
from rlpost.run.interrupt import signals_raise
from rlpost.run.names import ABOUT

_TRANSPORT: type[Exception] = HfHubHTTPError.__bases__[0]
"""The error of the hub's HTTP library, which is another in other versions."""
_REMEDIES = {401: "log in with `hf auth login`", 403: "your token needs write access there"}


def push(checkpoint: str, repo: str, *, private: bool = False, merged: bool = False) -> str:
    """Upload a checkpoint into a repository on the hub, which is made if need be; returns its address.

    An adapter stays one, unless `merged`; a checkpoint that is whole is written as `rlpost merge` does; another
    model's folder is uploaded as it is. Nothing is changed on this machine.

    Args:
        checkpoint: a run, a stage, a checkpoint or a model's folder.
        repo: its name, `owner/name`, or `name` for one of your own.
        private: for you alone; an existing repository that is public is refused.
        merged: merge an adapter into its base first.

    Raises:
        RecipeError: `repo` is no name of a repository.
        ModelError: the checkpoint is no policy, or an adapter whose base is on this machine alone.
        DiskError: the hub refuses, or cannot be reached.
        Interrupted: SIGTERM or SIGHUP.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RecipeError(
            f"REPO: {repo!r} is no name of a repository - write owner/name, of letters, digits, '-', '_' and '.'"
        ) from error
    folder = must_be_here(checkpoint)
    as_adapter = is_adapter(folder) and not merged
    if as_adapter and not is_hub_name(base := base_of(folder)):
        raise ModelError(f"{folder}: an adapter of {base}, which is on this machine alone; push it with --merged")
    api = HfApi()
    with _hub_errors(repo):
        owner = api.whoami()["name"]
    repo = repo if "/" in repo else f"{owner}/{repo}"
    with signals_raise(), TemporaryDirectory(prefix="rlpost-push-") as made:
        with disk_errors(Path(made)):
            _gather(folder, Path(made), repo, as_adapter)
        with _hub_errors(repo):
            address = api.create_repo(repo, private=private or None, exist_ok=True)
            if private and not api.model_info(repo).private:
                raise DiskError(f"{repo}: it exists and is public, so nothing was uploaded; name another")
            console.say(f"uploading {', '.join(sorted(p.name for p in Path(made).iterdir()))}")
            api.upload_folder(repo_id=repo, folder_path=made, commit_message=f"Upload {folder.name} by rlpost")
    return str(address)


def _gather(folder: Path, out: Path, repo: str, as_adapter: bool) -> None:
    """Fill an empty folder with what is uploaded."""
    if as_adapter:
        policy = frozen_policy(str(folder))
        save_policy(policy, out)
        (out / CARD).write_text(card(folder, about(policy, Written.adapter, "float32"), repo), "utf-8")
    elif is_adapter(folder) or (folder / ABOUT).is_file():
        write_merged(folder, out, name=repo)
    else:
        must_be_policy(folder)
        for file in folder.iterdir():
            if file.is_file() and not file.name.startswith(".") and file.name != CARD:
                (out / file.name).symlink_to(file.resolve())
        if (folder / CARD).is_file():
            text = (folder / CARD).read_text("utf-8").replace(REFERENCE, repo)
        else:
            dtype = str(stored_dtype(str(folder), None)).removeprefix("torch.")
            text = card(folder, about(frozen_policy(str(folder)), Written.merged, dtype), repo)
        (out / CARD).write_text(text, "utf-8")


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn errors of the hub inside into one line.

    Raises:
        DiskError: there was one.
    """
    try:
        yield
    except RlpostError:
        raise
    except LocalTokenNotFoundError as error:
        raise DiskError(f"{repo}: not logged in to the hub; `hf auth login`, or set HF_TOKEN") from error
    except OfflineModeIsEnabled as error:
        raise DiskError(f"{repo}: HF_HUB_OFFLINE is set; unset it to upload") from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        reason = f"{code}: {error.server_message}" if error.server_message else first_line(error)
        remedy = _REMEDIES.get(code, "try again later")
        raise DiskError(f"{repo}: the hub refuses ({reason.rstrip('.')}); {remedy}") from error
    except (OSError, _TRANSPORT, ValueError) as error:
        raise DiskError(f"{repo}: {first_line(error)}; check the connection, and HF_ENDPOINT if it is set") from error
