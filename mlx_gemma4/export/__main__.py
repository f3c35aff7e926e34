"""Export a trained run or an adapter for other libraries, and prove it there.

python -m mlx_gemma4.export runs/1 --format peft --output out/
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import AdapterError, ConfigError, run_command
from . import FORMATS, export


def main(arguments: list[str] | None = None) -> None:
    given = vars(_parser().parse_args(arguments))
    source, output = Path(given.pop("source")).expanduser(), given.pop("output")
    push, private = given.pop("push"), not given.pop("public")
    adapter = source / "adapter" if (source / "adapter").is_dir() else source
    model = given.pop("model") or _base_of(adapter)
    options = {key: value for key, value in given.items() if value is not None}
    if output is None:
        raise ConfigError(
            "--output is not given", wanted="a folder, for gguf a file", do="give --output"
        )
    _require_apart(Path(output), source, adapter, model)

    from ..gemma import load
    from .hub import push_folder, require_repo_id

    if push:
        require_repo_id(push)

    gemma = load(model, adapter=adapter)
    print(gemma)
    for line in export(gemma, output, **options):
        print(line)
    print(f"exported: {output}")
    if push:
        print(f"pushed: {push_folder(output, push, source, private=private)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mlx_gemma4.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        metavar="RUN_OR_ADAPTER",
        help="the output folder of a run, or an adapter of ours, mlx-lm, mlx-vlm or PEFT",
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="mlx-lm", help="who receives it (default: mlx-lm)"
    )
    parser.add_argument("--output", metavar="PATH", help="the folder to write; for gguf a file")
    parser.add_argument(
        "--model", metavar="TEXT", help="the base model; default: the one that the adapter names"
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="load the export where it is for and compare logits (default: yes)",
    )
    parser.add_argument(
        "--push", metavar="USER/NAME", help="upload it to the Hugging Face Hub, private by default"
    )
    parser.add_argument(
        "--public", action="store_true", help="make the repository for everyone to see"
    )
    fused = parser.add_argument_group("fused models")
    fused.add_argument(
        "--quantize",
        type=lambda text: text if text == "base" else int(text),
        metavar="BITS",
        help="bits per weight, or base for the base's own; default: full precision",
    )
    fused.add_argument("--group-size", type=int, metavar="N", help="weights that share a scale")
    fused.add_argument(
        "--floor", type=float, metavar="X", help="the least cosine of a change that is kept"
    )
    fused.add_argument(
        "--force", action="store_true", default=None, help="write it below the floor too"
    )
    return parser


def _base_of(adapter: Path) -> str:
    """The base model that an adapter's config names."""
    config: Any = {}
    path = adapter / "adapter_config.json"
    try:
        config = json.loads(path.read_text())
        model = config.get("model") or config.get("base_model_name_or_path")
    except FileNotFoundError:
        raise AdapterError(
            f"{adapter} has no adapter_config.json",
            wanted="the output folder of a run, or an adapter folder",
            do="check the path",
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise AdapterError(
            f"cannot read {path}: {error}", wanted="a JSON object", do="copy the adapter again"
        ) from None
    if not isinstance(model, str) or not model:
        raise AdapterError(f"{path} names no base model", wanted="one", do="give it with --model")
    return model


def _require_apart(output: Path, *inputs: Path | str) -> None:
    where = output.expanduser().resolve()
    for path in inputs:
        if Path(path).exists() and where == Path(path).resolve():
            raise ConfigError(
                f"--output is {output}, which is read",
                wanted="another folder, so that nothing is lost",
                do="change --output",
            )


if __name__ == "__main__":
    run_command(main)
