"""Answer a prompt with a model and, if one is named, its trained adapter.

    python -m mlx_gemma4.generate --model google/gemma-4-E2B-it --adapter runs/1/adapter \\
        --prompt "What is a list comprehension?"
"""

from __future__ import annotations

import argparse

from .errors import run_command


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mlx_gemma4.generate", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", required=True, help="a model folder or a Hugging Face id")
    parser.add_argument("--adapter", help="an adapter folder, such as runs/1/adapter")
    parser.add_argument("--prompt", required=True, help="what the user says")
    parser.add_argument("--system", help="what the system turn says")
    parser.add_argument("--max-tokens", type=int, default=256, help="(default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="(default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="(default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    options = vars(parser.parse_args(arguments))

    from .gemma import load

    gemma = load(options.pop("model"), options.pop("adapter"))
    for piece in gemma.stream(options.pop("prompt"), **options):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    run_command(main)
