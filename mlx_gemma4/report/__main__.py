"""A page of one run, or of several side by side.

    python -m mlx_gemma4.report runs/*

While a run goes on, its own report.html is written at every report; this command writes one of runs
that are there, finished or not. What holds no run is passed over.
"""

from __future__ import annotations

from pathlib import Path

from ..config import Part, ReportConfig, RunConfig, build, read_arguments
from ..errors import ConfigError, run_command
from ..storage import write_text
from ..train.folder import is_run
from ..train.run import story_of
from .page import page


def main(arguments: list[str] | None = None) -> None:
    place = {"output": "the file to write; default: report.html here"}
    values = read_arguments(
        "mlx_gemma4.report",
        __doc__,
        [
            Part(ReportConfig, "what is shown", positional=("runs",)),
            Part(RunConfig, "what is written", only=("output",), help=place),
        ],
        arguments,
        usage="RUN [RUN ...] [--output FILE]",
    )
    given, run = build([ReportConfig, RunConfig], values, "the flags")
    folders = [Path(name).expanduser() for name in given.runs or ()]
    stories = [story_of(folder) for folder in folders if folder.is_dir() and is_run(folder)]
    if not stories:
        found = f"{', '.join(map(str, folders))}: no run"
        raise ConfigError(found, wanted="output folders of runs", do="check the paths")
    output = Path(run.output or "report.html")
    try:
        write_text(output, page(stories))
    except OSError as error:
        found = f"cannot write {output}: {error}"
        raise ConfigError(found, wanted="a file to write", do="change --output") from None
    print(f"report: {output}")


if __name__ == "__main__":
    run_command(main)
