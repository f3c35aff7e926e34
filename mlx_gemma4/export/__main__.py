"""Export a trained run or an adapter for another library, and prove it there.

    python -m mlx_gemma4.export runs/1 --format peft --output out/

    mlx-lm, mlx-vlm, mlx-vlm-legacy (0.4)    an adapter folder for that library
    peft, peft-causal                        for transformers and PEFT, by the model's class
    fused                                    a model with the adapter merged into its weights
    gguf                                     one file for llama.cpp's --lora

The output is a folder, for gguf a file. The base model is the one that the adapter names;
--model names another place of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import ExportConfig, Part, RunConfig, build, read_arguments
from ..errors import ConfigError, run_command
from ..gemma import load
from ..lora.state import adapter_folder, base_model_of
from ..model.quantize import Policy
from ..train.checkpoint import Checkpoints
from . import export, require_format
from .hub import push_folder, require_repo_id, require_token, upload_files

_OF_A_RUN = ("model", "output")
_OF_A_FUSED_MODEL = ("quantize", "group_size", "floor", "force")


def main(arguments: list[str] | None = None) -> None:
    run, given, options = _settings(arguments)
    source, output = Path(given.source or "").expanduser(), Path(run.output or "").expanduser()
    if given.which == "last":
        adapter = adapter_folder(source)
    else:
        adapter = Checkpoints(source, 1, {}).named(given.which)
    model = run.model or base_model_of(adapter)
    if output.resolve() in [Path(path).resolve() for path in (source, adapter, model)]:
        raise ConfigError(
            f"--output is {output}, which is read", wanted="another folder", do="change --output"
        )
    if given.push:
        require_repo_id(given.push)
        require_token()
    gemma = load(model, adapter=adapter)
    print(gemma)
    for line in export(gemma, output, given.format, verify=given.verify, **options):
        print(line)
    print(f"exported: {output}")
    if given.push:
        names = ["README.md", *(path.name for path in upload_files(output))]
        print(f"pushing to {given.push}: {', '.join(names)}", flush=True)
        url = push_folder(output, given.push, source, private=not given.public)
        print(f"pushed: {url}")


def _settings(arguments: list[str] | None) -> tuple[RunConfig, ExportConfig, dict[str, Any]]:
    """What is read and where it goes, how, and the options of a fused model that were given."""
    values = read_arguments(
        "mlx_gemma4.export",
        __doc__,
        [
            Part(ExportConfig, "export", positional=("source",)),
            Part(
                RunConfig,
                "what is read and written",
                only=_OF_A_RUN,
                help={
                    "model": "the base model; default: the one that the adapter names",
                    "output": "the folder to write; for gguf a file",
                },
            ),
        ],
        arguments,
        usage="RUN_OR_ADAPTER --output PATH [--format FORMAT] [settings]",
    )
    [run] = build([RunConfig], {k: values.pop(k) for k in _OF_A_RUN if k in values}, "the flags")
    [given] = build([ExportConfig], values, "the flags")
    options = {key: getattr(given, key) for key in _OF_A_FUSED_MODEL if key in values}
    require_format(given.format, options)
    if options.get("quantize", "base") != "base":
        Policy.asked_for(options["quantize"], given.group_size)
    if run.output is None:
        raise ConfigError(
            "--output is not given", wanted="a folder, for gguf a file", do="give --output"
        )
    return run, given, options


if __name__ == "__main__":
    run_command(main)
