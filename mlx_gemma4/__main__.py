"""`python -m mlx_gemma4`: the commands there are."""

from __future__ import annotations

from . import __version__

_COMMANDS = {
    "mlx_gemma4.data": "look at what would be trained on",
    "mlx_gemma4.train": "fine-tune Gemma 4; without arguments, a small one on real text",
    "mlx_gemma4.report": "one run as a page, or several side by side",
    "mlx_gemma4.eval": "loss, accuracy, answers and tasks: the base beside its adapter",
    "mlx_gemma4.fit": "will it fit: memory by settings, from config.json alone",
    "mlx_gemma4.generate": "answer a prompt with a model and its adapter",
    "mlx_gemma4.export": "adapters and models for other libraries, each proved there",
}


def main() -> None:
    print(f"mlx_gemma4 {__version__}: fine-tune Gemma 4 on Apple Silicon\n")
    for command, purpose in _COMMANDS.items():
        print(f"  python -m {command:20}  {purpose}")
    print("\nEach explains itself with --help.")


if __name__ == "__main__":
    main()
