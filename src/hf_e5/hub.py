"""A dataset or model folder goes to the Hub in one commit.

Large files are stored first, then one commit makes all changes at once: a push that breaks leaves the repository as
it was, and the next one sends only what is not stored yet. That is why this calls `create_commit`: `upload_folder` may
make several commits where Xet is installed. The token is where `hf auth login` or HF_TOKEN put it.
"""

from __future__ import annotations

import json
import logging
import time
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from .errors import InputError


logger = logging.getLogger(__name__)

# Files of an earlier push that would be read along with the new ones: deleted if the folder no longer has them.
STALE_PATTERNS = {"dataset": ("data/*.parquet", "figures/*"), "model": ("*.safetensors", "*.json", "*.gguf")}
RETRY_WAITS = (1, 2, 4, 8)  # seconds


def push_to_hub(folder: str | Path, repo_id: str, *, public: bool = False) -> tuple[str, bool]:
    """Make a Hub repository hold what a folder holds.

    Files that are already there are not sent again. Shards and configs of an earlier push that the folder no longer
    has are deleted, in the same commit; other files of the repository stay.

    Args:
        folder: a dataset written by `hf-e5 build` or a model written by `hf-e5 export`.
        repo_id: `USER/NAME`; created if it does not exist.
        public: whether everyone may see the repository. An existing one keeps its visibility.

    Returns:
        The repository's URL, and whether anything changed.

    Raises:
        InputError: no such folder, neither a dataset nor a model, no token, or the Hub refuses; also where the
            repository exists and is public and `public` is not set.
    """
    folder = Path(folder)
    repo_type = detect_repo_type(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id}: {error}") from None
    if "/" not in repo_id:
        raise InputError(f"{repo_id}: expected USER/NAME")
    if not get_token():
        raise InputError("no Hugging Face token: run `hf auth login`, or set HF_TOKEN")
    for wait in (*RETRY_WAITS, None):
        try:
            return _push(folder, repo_id, repo_type, public)
        except InputError:
            raise
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            reason = _reason(error)
            if isinstance(reason, ValueError) and "Invalid metadata" not in str(reason):
                raise
            if not _is_transient(reason):
                raise InputError(f"{repo_id}: the push failed: {_one_line(reason)}") from None
            if wait is None:
                raise InputError(f"{repo_id}: the push failed: {_one_line(reason)}; push again to go on") from None
            logger.warning("the push broke (%s); trying again in %d s", _one_line(reason), wait)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _reason(error: Exception) -> BaseException:
    """Return the Hub's answer behind a file that could not be sent, which comes as a RuntimeError; else the error."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, HTTPError):
        return error.__cause__
    return error


def _is_transient(reason: BaseException) -> bool:
    if isinstance(reason, HfHubHTTPError):
        return reason.response.status_code >= 500 or reason.response.status_code in (408, 429)
    if isinstance(reason, OfflineModeIsEnabled):
        return False
    return isinstance(reason, (HTTPError, ConnectionError, TimeoutError, RuntimeError))


def _one_line(reason: BaseException) -> str:
    text = getattr(reason, "server_message", None) or str(reason) or type(reason).__name__
    return " ".join(text.split())


def detect_repo_type(folder: Path) -> str:
    """Return `dataset` or `model`, by what a folder holds.

    Raises:
        InputError: it is neither, or a model that could not be loaded from the Hub.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if (folder / "trainer_state.json").exists():
        raise InputError(f"{folder}: a training checkpoint; make a model of it with `hf-e5 export` first")
    is_dataset = any(folder.glob("data/**/*.parquet"))
    is_model = any((folder / name).exists() for name in ("modules.json", "config.json", "adapter_config.json"))
    if is_dataset == is_model:
        raise InputError(
            f"{folder}: expected a dataset (data/*.parquet) or a model (config.json), found {_found(folder)}"
        )
    adapter = folder / "adapter_config.json"
    base = json.loads(adapter.read_bytes()).get("base_model_name_or_path") if adapter.exists() else None
    if base and Path(base).exists():
        raise InputError(f"{folder}: an adapter on the local {base} loads nowhere else; export it with `merge`")
    return "dataset" if is_dataset else "model"


def _found(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"


def _push(folder: Path, repo_id: str, repo_type: str, public: bool) -> tuple[str, bool]:
    api = HfApi(library_name="hf-e5")
    url = api.create_repo(repo_id, repo_type=repo_type, private=not public, exist_ok=True)
    info = api.repo_info(repo_id, repo_type=repo_type)
    if not public and not info.private:
        raise InputError(f"{repo_id}: exists and is public; set `public`, or make it private first")
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    stale = [
        name
        for name in api.list_repo_files(repo_id, repo_type=repo_type, revision=info.sha)
        if name not in files and any(fnmatch(name, pattern) for pattern in STALE_PATTERNS[repo_type])
    ]
    commit = api.create_commit(
        repo_id,
        repo_type=repo_type,
        operations=[
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ],
        commit_message=f"Upload {repo_type} with hf-e5",
        parent_commit=info.sha,
    )
    return str(url), commit.oid != info.sha
