"""Files of shared models: a local folder, or the Hugging Face hub, whose failures are one line with a remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from orderppl.errors import UserError, first_line

TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.py")
MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors", "*.yaml")


def fetch(
    name_or_path: str | Path,
    revision: str | None = None,
    *,
    files: Sequence[str] = MODEL_FILES,
    field: str = "model",
) -> Path:
    """Find a folder or a file here, or download it.

    Args:
        name_or_path: an existing folder or file; a hub name `owner/name`, of which `files` are downloaded once; or
            `owner/name/path/to/file.safetensors`, of which that file alone is.
        revision: branch, tag or commit on the hub; its default branch when left out.
        files: patterns of what is needed of a repository. Pickled weights are never among them.
        field: what messages call it.

    Returns:
        The path as it was given, or that of the downloaded folder or file.

    Raises:
        UserError: there is no such thing, or it cannot be reached, with what to do about it.
    """
    path = Path(name_or_path)
    try:
        path = path.expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:
        problem = f"{str(path)[:80]!r} can be no path ({first_line(error)[:60]})"
        raise UserError(field, problem, "give an existing folder or owner/name") from error
    from huggingface_hub import hf_hub_download, snapshot_download  # slow to import, and seldom needed

    name, parts = str(name_or_path), str(name_or_path).split("/")
    is_file = len(parts) > 2 and path.suffix == ".safetensors" and all(parts)
    repository = "/".join(parts[:2]) if is_file else name
    try:
        if is_file:
            return Path(hf_hub_download(repository, "/".join(parts[2:]), revision=revision))
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except Exception as error:
        known = _explain(error, repository, revision)
        if known is None:
            raise
        raise UserError(field, *known) from error


def _explain(error: Exception, name: str, revision: str | None) -> tuple[str, str] | None:
    """What went wrong with a download and its remedy; None for what is no failure of a download."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{name}"
    offline = f"download it where there is a network (hf download {name}) and give the folder"
    reason = first_line(error)
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated", f"accept its terms at {page}, then log in with: hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        problem = f"{name} is neither a folder here nor a public model on the hub"
        return problem, "check the spelling; for a private one log in with: hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision!r}", f"choose a branch, tag or commit of {page}/commits"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{name} has no such file ({reason})", f"choose one of {page}/tree/{revision or 'main'}"
    if isinstance(error, errors.HFValidationError):
        return f"{name!r} is neither a folder here nor a hub name", "give an existing folder or owner/name"
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # it was reached, and said so
        reason = first_line(error)
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
            problem = f"{name} is neither a folder here nor in the local cache, and HF_HUB_OFFLINE is set"
            return problem, f"unset it, or {offline}"
        return f"{name} is neither a folder here nor in the local cache, and the hub cannot be reached", offline
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the disk for {name}", "free some, or set HF_HOME to another disk"
    if isinstance(error, OSError | errors.HfHubHTTPError) or type(error).__module__.startswith("http"):  # its client
        return f"{name} cannot be downloaded ({reason})", f"try again, or {offline}"
    return None
