"""Export the model of a finished run, and upload it to the Hugging Face hub.

The access token belongs to huggingface_hub, which finds it and sends it. mainrun never reads the token. The
messages of the library and of the server may repeat what was sent, so mainrun does not print them.
"""

from __future__ import annotations

import fnmatch
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mainrun.data.hub_files import REPOSITORY_RULE, causes, endpoint, is_repository
from mainrun.errors import HubError, RunError, UsageError
from mainrun.files import inputs
from mainrun.store.rundir import RunDir

WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]
ROUTERS = ["routing.json", "routing.safetensors"]
# The files of an earlier push that the new export replaces. Files of other names stay in the repository.
FILES_OF_AN_EXPORT = {
    "model": [
        *WEIGHTS, *ROUTERS, "config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
    ],
    "adapter": [*ADAPTER, *ROUTERS],
}  # fmt: skip
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"


def push_run(run: RunDir, repo: str, *, private: bool = False, adapter: bool = False) -> str:
    """Upload the model of a finished run to a repository, and return the URL of the repository.

    Everything that can be checked is checked before anything is sent.
    """
    check_repo(repo)
    check_finished(run)
    from mainrun.interop.export import export_run

    with tempfile.TemporaryDirectory(prefix="mainrun-push-") as parent:
        folder = Path(parent) / "export"
        source = export_run(run, folder, adapter=adapter, published=True)
        if source.summary is None:
            raise RunError(
                f"the newest usable checkpoint of {run.path} does not have the weights that summary.json "
                f"describes, so their scores are unknown; {run.fix}"
            )
        with hub_errors(repo):
            return upload(folder, repo, private, adapter)


def check_repo(repo: str) -> None:
    """Raise UsageError if a name is not the name of a repository on the hub."""
    if not is_repository(repo):
        raise UsageError(
            f"got {inputs.shown(repo, 100)}, which is not the name of a repository; {REPOSITORY_RULE}, "
            "such as alice/small-model"
        )


def check_finished(run: RunDir) -> None:
    """Raise RunError if a run is not finished, or if it failed a guard."""
    run.config()
    summary = run.summary()
    state = run.status().get("state", "unknown")
    if summary is None or state != "done":
        raise RunError(f"{run.path} is not finished (state: {state}); finish it with `mainrun train`")
    guards = summary.get("guards")
    if not guards:
        raise RunError(f"{run.path}/summary.json contains no guards; {run.fix}")
    failed = []
    for guard in guards:
        if guard["status"] == "fail":
            failed.append(f"{guard['name']} ({guard['detail']})")
    if failed:
        raise RunError(f"{run.path} failed guards, so its model is not published: {'; '.join(failed)}")


def upload(folder: Path, repo: str, private: bool, adapter: bool) -> str:
    """Create a repository if it does not exist, and upload a folder to it. Return the repository's URL.

    adapter: whether the folder contains an adapter, and not a full model.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(endpoint=endpoint(), token=True)  # require a token, which the library finds
    url = api.create_repo(repo, private=private or None, exist_ok=True)
    # `create_repo` leaves an existing repository as it is
    if private and not api.model_info(repo).private:
        raise UsageError(
            f"the repository {repo} exists and is public, but got --private; nothing was uploaded; make the "
            "repository private on the hub, or choose another name"
        )
    check_kind(api.list_repo_files(repo), repo, adapter)
    api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        commit_message="Upload a model of mainrun",
        delete_patterns=FILES_OF_AN_EXPORT["adapter" if adapter else "model"],
    )
    return str(url)


def check_kind(files: Iterable[str], repo: str, adapter: bool) -> None:
    """Raise UsageError if a repository contains an adapter, but a full model is pushed, or the reverse.

    `transformers` would load only one of the two, and the push would have to replace files of both.
    """
    pushed = "an adapter" if adapter else "a full model"
    other = "a full model" if adapter else "an adapter"
    patterns = WEIGHTS if adapter else ADAPTER
    for file in files:
        if any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns):
            raise UsageError(
                f"the repository {repo} contains {other} ({file}), but {pushed} is to be pushed; nothing was "
                f"uploaded; choose another name, or delete {other} on the hub"
            )


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Convert the errors of huggingface_hub to HubError, whose messages contain no text that was sent.

    `from None` also removes the library's message from the traceback of --debug.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as e:
        raise HubError(f"the upload to {repo} failed: {_reason(e, repo)}") from None


def _reason(error: BaseException, repo: str) -> str:
    """Explain an error of huggingface_hub, and say how to fix it."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    for cause in causes(error):
        if isinstance(cause, LocalTokenNotFoundError):
            return f"there is no access token for the hub; {LOG_IN}"
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set; unset it"
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            return _reason_of_status(cause.response.status_code, repo)
        if isinstance(cause, OSError):
            return f"the hub cannot be reached ({type(error).__name__}); check the network and HF_ENDPOINT"
    return (
        f"{type(error).__name__} in huggingface_hub; check the access token, the network and HF_ENDPOINT, "
        "and run the same command again"
    )


def _reason_of_status(status: int, repo: str) -> str:
    owner = repo.partition("/")[0]
    if status == 401:
        return f"the hub does not accept the access token (status 401); {LOG_IN}"
    if status == 403:
        return f"the access token may not write to {owner} (status 403); choose another owner, or {LOG_IN}"
    if status == 404:
        return f"the hub knows no such repository (status 404); check the name, or {LOG_IN}"
    if status == 429:
        return "the hub received too many requests (status 429); run the same command again later"
    if status >= 500:
        return f"the hub has a problem (status {status}); run the same command again later"
    return f"the hub refused the request (status {status}); check the name and the limits of {owner}"
