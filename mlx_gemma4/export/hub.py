"""An export on the Hugging Face Hub: its model card, and its upload in one commit.

A card tells settings and results. Paths of the machine that trained it stay at home: of a local
model or data file only the name is given. The token is the one of `hf auth login` or of HF_TOKEN;
it is handed to nobody but huggingface_hub, and taken out of whatever an error says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, ExportError
from ..lora.formats import ADAPTERS, base_of, format_of
from ..lora.formats import gguf as gguf_format
from ..lora.formats.format import CONFIG, OPTION, PROMPT
from ..model.checkpoint import INDEX
from ..model.download import SIDE_FILES
from ..trust import require_inside

_PATHS = ("model", "data", "output", "resume")

_FUSED = f"""\
```python
from mlx_lm import generate, load  # text

model, tokenizer = load("{{repo}}")
{PROMPT}
print(generate(model, tokenizer, prompt))
```

```bash
mlx_lm.generate --model {{repo}} --prompt "..." {OPTION}
```

```python
from mlx_vlm import apply_chat_template, generate, load  # with images and audio

model, processor = load("{{repo}}")
prompt = apply_chat_template(processor, model.config, "...", enable_thinking=False)
print(generate(model, processor, prompt).text)
```"""
_TRANSFORMERS = f"""

```python
from transformers import AutoTokenizer, {{architecture}}

model = {{architecture}}.from_pretrained("{{repo}}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{{repo}}")
{PROMPT}
```"""
_PROMPTS = """\
Training told the chat template `enable_thinking` false, and true where answers have reasoning. Do
so too: mlx-lm says true when it is told nothing, which makes another prompt and other answers."""


def kind_of(output: Path) -> str | None:
    """The format of an export by its files; None if it is none.

    The GGUF format is a file; the others are folders. PEFT's two have one name here.
    """
    if output.is_file():
        return "gguf" if output.suffix == ".gguf" else None
    format = format_of(_read(output / CONFIG))
    if (output / format.file).exists():
        return format.name
    return "fused" if any(output.glob("model*.safetensors")) else None


# ---------------------------------------------------------------- the card


def model_card(output: Path, repo_id: str, source: Path | None = None) -> str:
    """README.md for an export.

    Args:
        output: the export; a folder, for GGUF a file.
        repo_id: where it will lie, for the code that loads it.
        source: the run or adapter that it was made from, for data, settings and losses.
    """
    kind = kind_of(output) or "fused"
    # A run's folder, or the adapter in one.
    folders = (source, source.parent) if source else ()
    run = next((folder for folder in folders if (folder / "summary.json").exists()), output)
    summary, settings = _read(run / "summary.json"), _read(run / "config.yaml")
    configs = [_read(folder / CONFIG) for folder in (run / "adapter", source or run, output)]
    bases = [summary.get("model"), *map(base_of, configs), "the base model"]
    base = str(next(filter(None, bases)))
    is_on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    shown = base if is_on_hub else Path(base).name
    head: dict[str, Any] = {"base_model": base} if is_on_hub else {}
    if kind != "gguf":
        head["library_name"] = ADAPTERS[kind].hub_library if kind in ADAPTERS else "transformers"
    head["tags"] = ["gemma4", "mlx-gemma4", *(["lora"] if kind != "fused" else []), kind]
    what = "Fine-tuned model" if kind == "fused" else "Adapter"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {repo_id.split('/')[-1]}",
        f"{what} made from {shown} with mlx_gemma4; format {kind}.",
    ]
    if summary:
        data = {
            "source": Path(str(summary.get("data"))).name,
            "target tokens": settings.get("train_on"),
            "longest example": settings.get("max_seq_length"),
            "steps": summary.get("steps"),
        }
        losses = {
            "training, last report": summary.get("train_loss"),
            "validation, before": summary.get("val_loss_before"),
            "validation, after": summary.get("val_loss"),
            "test": summary.get("test_loss"),
        }
        measured = {key: f"{loss:.4f}" for key, loss in losses.items() if loss is not None}
        parts += ["## Data", _table("data", data)]
        losses_table = _table("nats per target token", measured)
        parts += ["## Losses", losses_table if measured else "None were measured."]
    if not settings:
        given = {**configs[-1], **(configs[-1].get("lora_parameters") or {})}
        settings = {key: value for key, value in given.items() if isinstance(value, (int, float))}
    if settings:
        rows = {key: value for key, value in settings.items() if key not in _PATHS}
        parts += ["## Settings", _table("setting", rows)]
    parts += ["## How to load it", _use(kind, output, shown, repo_id), _PROMPTS]
    return "\n\n".join(parts) + "\n"


def _use(kind: str, output: Path, base: str, repo: str) -> str:
    config, mapped = _read(output / "config.json"), _read(output / CONFIG).get("auto_mapping")
    names = [*config.get("architectures", ()), (mapped or {}).get("base_model_class")]
    architecture = next(filter(None, names), "Gemma4ForConditionalGeneration")
    words = {"base": base, "repo": repo, "architecture": architecture, "file": output.name}
    if kind in ADAPTERS:
        use = ADAPTERS[kind].use
    elif kind == "gguf":
        use = gguf_format.USE
    else:
        use = _FUSED + ("" if "quantization" in config else _TRANSFORMERS)
    return use.format(**words)


def _table(title: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {title} | |", "|---|---|"]
    for key, value in rows.items():
        if value is not None:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            lines.append(f"| {key} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    """A mapping of a JSON or YAML file; an empty one where there is none to read."""
    try:
        text = path.read_text()
        content = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


# ---------------------------------------------------------------- the upload


def push_folder(
    output: str | Path, repo_id: str, source: str | Path | None = None, *, private: bool = True
) -> str:
    """Upload an export with a model card; all of it is there then, or nothing is.

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
    from huggingface_hub import CommitOperationAdd, HfApi

    require_repo_id(repo_id)
    output, source = Path(output).expanduser(), Path(source).expanduser() if source else None
    kind, token = kind_of(output), require_token()
    if kind is None:
        wanted = "a folder with an adapter or a model, or a .gguf file"
        raise ConfigError(f"{output} is no export", wanted=wanted, do="export first")
    card = model_card(output, repo_id, source).encode()
    operations = [CommitOperationAdd("README.md", card)]
    operations += [CommitOperationAdd(path.name, path) for path in upload_files(output)]
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if not private or api.model_info(repo_id).private:
            message = f"Export of mlx_gemma4: {kind}"
            done = api.create_commit(repo_id, operations, commit_message=message)
            return str(done.commit_url)
    except Exception as error:  # anything: it is another library's
        raise _refusal(error, repo_id, token) from None
    wanted, do = "a private repository; nothing was uploaded", "name another, or make it private"
    raise ExportError(f"{repo_id} exists and is public", wanted=wanted, do=do)


def upload_files(output: Path) -> list[Path]:
    """What is sent of an export beside its card: the files of its format, which are no links.

    Raises:
        ConfigError: a link in the place of such a file.
    """
    if output.is_file():
        return [output]
    kind = kind_of(output)
    names = (CONFIG, ADAPTERS[kind].file) if kind in ADAPTERS else (*SIDE_FILES, INDEX)
    found = [output / name for name in names if (output / name).exists()]
    found += output.glob("model*.safetensors") if kind == "fused" else []
    for path in found:
        require_inside(path, output, ConfigError)
    return sorted(found)


def require_token() -> str:
    """The token of `hf auth login` or HF_TOKEN.

    Raises:
        ConfigError: there is none.
    """
    from huggingface_hub import get_token

    if token := get_token():
        return token
    wanted, do = "one with the right to write", "hf auth login, or set HF_TOKEN"
    raise ConfigError("there is no token for the Hub", wanted=wanted, do=do)


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
