"""An export on the Hugging Face Hub, in one commit: all of it is there, or nothing is.

The token is the one of `hf auth login` or of HF_TOKEN. It is handed to nobody but huggingface_hub,
and taken out of whatever an error says.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import ConfigError, ExportError
from .card import kind_of, model_card

__all__ = ["push_folder", "require_repo_id"]


def push_folder(
    output: str | Path, repo_id: str, source: str | Path | None = None, *, private: bool = True
) -> str:
    """Upload an export with a model card.

    Args:
        output: the export: a folder, for GGUF a file. Nothing is written there.
        repo_id: user/name; made if it is not there.
        source: the run or adapter that was exported, for the card's data, settings and losses.
        private: for a repository that is made now.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: a name that no repository can have, no token, or nothing to upload.
        ExportError: the Hub refused, the repository is public already though `private` was asked
            for, or the upload was cut. The repository is as it was then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    require_repo_id(repo_id)
    output, source = Path(output).expanduser(), Path(source).expanduser() if source else None
    files = _files(output)
    token = get_token()
    if token is None:
        raise ConfigError(
            "there is no token for the Hub",
            wanted="one with the right to write",
            do="hf auth login, or set HF_TOKEN",
        )
    card = model_card(output, repo_id, source).encode()
    operations = [CommitOperationAdd("README.md", card)]
    operations += [CommitOperationAdd(name, path) for name, path in files.items()]
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ExportError(
                f"{repo_id} exists and is public",
                wanted="a private repository; nothing was uploaded",
                do="name another, or make it private in its settings on the Hub",
            )
        done = api.create_commit(
            repo_id, operations, commit_message=f"Export of mlx_gemma4: {kind_of(output)}"
        )
    except ExportError:
        raise
    except Exception as error:  # anything: it is another library's
        raise _refusal(error, repo_id, token) from None
    return str(done.commit_url)


def require_repo_id(repo_id: str) -> None:
    """Refuse a name that no repository can have.

    Raises:
        ConfigError: not user/name in the Hub's letters.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    reason = "it has no user" if "/" not in repo_id else ""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = str(error).splitlines()[0]
    if reason:
        raise ConfigError(
            f"{repo_id!r} is no name of a repository: {reason}",
            wanted="user/name, of letters, digits, -, _ and .",
            do="change the name",
        )


def _files(output: Path) -> dict[str, Path]:
    """What is uploaded, by name; the card takes the place of a README."""
    if kind_of(output) is None:
        raise ConfigError(
            f"{output} is no export",
            wanted="a folder with an adapter or a model, or a .gguf file",
            do="export first",
        )
    if output.is_file():
        return {output.name: output}
    return {
        path.name: path
        for path in sorted(output.iterdir())
        if path.is_file() and path.name != "README.md" and not path.name.startswith(".")
    }


_ADVICE = {
    401: ("a token that the Hub knows", "hf auth login, or set HF_TOKEN to a valid token"),
    403: ("a token with the right to write there", "use a token of that user with write access"),
    None: ("an upload that arrives whole", "check the network and push again"),
}


def _refusal(error: Any, repo_id: str, token: str) -> ExportError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    chain = [error] if error.__cause__ is None else [error, error.__cause__]
    reasons = [str(part).strip().splitlines() or [type(part).__name__] for part in chain]
    reason = re.sub(r"hf_\w+", "<token>", ": ".join(lines[0] for lines in reasons))
    what = f"the Hub answered {status}" if status else "the upload was cut"
    wanted, do = _ADVICE.get(status, ("a name and files that the Hub takes", "change the name"))
    return ExportError(
        f"{repo_id} was not pushed: {what}: {reason.replace(token, '<token>')}",
        wanted=f"{wanted}; nothing was committed",
        do=do,
    )
