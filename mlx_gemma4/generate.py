"""Answer a prompt with a model and, if one is named, its trained adapter.

    python -m mlx_gemma4.generate --model google/gemma-4-E2B-it --adapter runs/1/adapter \\
        --prompt "What is a list comprehension?"
"""

from __future__ import annotations

from .config import GenerateConfig, Part, RunConfig, TrainConfig, build, read_arguments
from .errors import ConfigError, run_command


def main(arguments: list[str] | None = None) -> None:
    """Print the answer while it is made."""
    values = read_arguments(
        "mlx_gemma4.generate",
        __doc__,
        [
            Part(RunConfig, "the model", only=("model",)),
            Part(GenerateConfig, "the answer"),
            Part(TrainConfig, "sampling", only=("seed",)),
        ],
        arguments,
        usage="--model MODEL --prompt PROMPT [--adapter ADAPTER] [settings]",
    )
    run, answer, train = build([RunConfig, GenerateConfig, TrainConfig], values, "the flags")
    for flag, given in (("--model", run.model), ("--prompt", answer.prompt)):
        if not given:
            wanted = "a model and a prompt"
            raise ConfigError(f"{flag} is not given", wanted=wanted, do=f"give {flag}")

    from .gemma import load

    for piece in load(run.model, answer.adapter).stream(
        answer.prompt,
        system=answer.system,
        max_tokens=answer.max_tokens,
        temperature=answer.temperature,
        top_p=answer.top_p,
        seed=train.seed,
    ):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    run_command(main)
