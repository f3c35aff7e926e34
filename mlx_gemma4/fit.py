"""Will it fit? What fine-tuning a Gemma 4 takes, from its config.json alone.

python -m mlx_gemma4.fit google/gemma-4-E2B-it
python -m mlx_gemma4.fit google/gemma-4-31B-it --data my_data/ --memory 64GB
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .config import LoraConfig
from .errors import ConfigError, DataError, ModelError, run_command

_LENGTHS = (1024, 2048, 4096, 8192)


def main(arguments: list[str] | None = None) -> None:
    given = _parser().parse_args(arguments)

    from .model.plan import Plan
    from .train.choose import choose, machine_memory, parse_memory
    from .train.memory import size

    memory = parse_memory(given.memory) if given.memory else machine_memory()
    config = _config(given.model)
    plan = Plan.from_config(config)
    bits, group_size = _quantization(config)
    if given.bits:
        bits = given.bits
    lora = LoraConfig(rank=given.lora_rank, targets=tuple(given.lora_targets))
    how: dict[str, Any] = {
        "lora": lora,
        "fine_tune_type": given.fine_tune_type,
        "group_size": group_size,
        "dtype": _dtype(config),
    }
    where = "given" if given.memory else "of this machine"
    print(f"Gemma 4 {plan.member} ({plan.model_type}) in {size(memory)} {where}")
    trained = "every weight" if given.fine_tune_type == "full" else f"LoRA rank {lora.rank} on "
    print(f"trained: {trained}{'' if given.fine_tune_type == 'full' else ', '.join(lora.targets)}")
    wanted = given.max_seq_length
    if given.data:
        longest, count = _longest(given.data)
        wanted = min(longest, wanted) if wanted else longest
        print(f"data: the longest of {count} rows has about {longest} tokens")
    wanted = wanted or 2048
    if not given.no_table:
        _table(plan, memory, bits, how)
    choice = choose(
        plan,
        memory,
        max_seq_length=wanted,
        batch_size=given.batch_size,
        bits=bits,
        may_quantize=not given.bits,
        may_shorten=True,
        **how,
    )
    _print_choice(choice, given, wanted, bits)


def _print_choice(choice: Any, given: argparse.Namespace, wanted: int, bits: int | None) -> None:
    """The best that fits, and the command that trains so."""
    usual, lora = list(LoraConfig().targets), given.fine_tune_type == "lora"
    print(f"\nbest that fits: {choice.forecast}")
    if choice.max_seq_length < wanted:
        print(f"max_seq_length is {choice.max_seq_length}: {wanted} tokens do not fit")
    model = given.model
    if choice.bits is not None and choice.bits != bits:
        model = f"{Path(given.model).name}-{choice.bits}bit"
        print(f"first: mlx_lm.convert --hf-path {given.model} --mlx-path {model} "
              f"-q --q-bits {choice.bits}")  # fmt: skip
    words = [
        f"--model {model}",
        f"--data {given.data or 'my_data/'}",
        *([] if lora else ["--fine-tune-type full"]),
        *([f"--lora-rank {given.lora_rank}"] if lora else []),
        *(
            [f"--lora-targets {' '.join(given.lora_targets)}"]
            if lora and list(given.lora_targets) != usual
            else []
        ),
        choice.flags(),
    ]
    print(f"python -m mlx_gemma4.train {' '.join(words)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mlx_gemma4.fit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    lora = LoraConfig()
    parser.add_argument("model", help="a model folder or a Hugging Face id; config.json is read")
    parser.add_argument("--data", help="a data folder or file: its longest row counts")
    parser.add_argument("--memory", help="such as 16GB (default: this machine's)")
    parser.add_argument("--max-seq-length", type=int, help="(default: 2048, or the longest row)")
    parser.add_argument("--batch-size", type=int, default=4, help="(default: 4)")
    parser.add_argument("--fine-tune-type", choices=("lora", "full"), default="lora")
    parser.add_argument("--lora-rank", type=int, default=lora.rank, help=f"(default: {lora.rank})")
    parser.add_argument("--lora-targets", nargs="+", default=list(lora.targets), metavar="NAME")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="as if quantized to so many")
    parser.add_argument("--no-table", action="store_true", help="only the best that fits")
    return parser


def _table(plan: Any, memory: int, bits: int | None, how: dict[str, Any]) -> None:
    """Peaks by length and precision, of a batch of one row."""
    from .train.memory import forecast, resident_bytes, size

    lora = how["lora"] if how["fine_tune_type"] == "lora" else None
    precisions = [bits] if bits or lora is None else [None, 8, 4]
    resident = {
        b: resident_bytes(plan, lora, b, how["group_size"], how["dtype"]) for b in precisions
    }
    heads = "".join(f"{_precision(b, how['dtype']):>12}" for b in precisions)
    print(
        f"\npeak with batch_size 1 (* does not fit)\n{'max_seq_length':>14}    rematerialize{heads}"
    )
    for lean in (False, True):
        for length in _LENGTHS:
            step = forecast(
                plan, batch_size=1, length=length, rematerialize=lean, bits=bits, **how
            ).step
            cells = [resident[b] + step for b in precisions]
            shown = "".join(f"{size(n) + ('*' if n > memory else ' '):>12}" for n in cells)
            print(f"{length:>14}  {'layer' if lean else 'none':>15}{shown}", flush=True)


def _precision(bits: int | None, dtype: str) -> str:
    return dtype if bits is None else f"{bits}-bit"


def _config(model: str) -> dict[str, Any]:
    """config.json of a folder or Hub id; nothing else is downloaded."""
    from .model.plan import read_config

    folder = Path(model).expanduser()
    if folder.is_dir():
        return read_config(folder)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import HfHubHTTPError

    try:
        return read_config(Path(hf_hub_download(model, "config.json")).parent)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{model} is no folder, and the Hub did not give its config.json: {reason}",
            wanted="a model folder or a Hugging Face id, such as google/gemma-4-E2B-it",
            do="check the spelling, the network, and `hf auth login` for gated models",
        ) from None


def _quantization(config: dict[str, Any]) -> tuple[int | None, int]:
    from .model.quantize import stored_quantization

    stored = stored_quantization(config)
    return (stored["bits"], stored["group_size"]) if stored else (None, 64)


def _dtype(config: dict[str, Any]) -> str:
    """The dtype that the weights are stored in."""
    text = config.get("text_config") or {}
    names = (text.get("dtype"), config.get("dtype"), text.get("torch_dtype"))
    found = next((n for n in (*names, config.get("torch_dtype")) if n), "bfloat16")
    if found not in ("bfloat16", "float16", "float32"):
        raise ConfigError(
            f"config.json has dtype {found!r}",
            wanted="bfloat16, float16 or float32",
            do="take config.json from the original checkpoint",
        )
    return str(found)


def _longest(data: str) -> tuple[int, int]:
    """(about how many tokens the longest row has, rows), at 3 bytes a token and 8 a turn."""
    from .data.files import find_files
    from .data.formats import read_rows

    longest = count = 0
    for files in find_files(data).values():
        for row in (row for file in files for row in read_rows(file.path)):
            turns = sum(len(str(turn["content"]).encode()) + 24 for turn in row.messages)
            longest, count = max(longest, (len(row.text.encode()) + turns) // 3 + 1), count + 1
    if not count:
        raise DataError(f"{data} has no rows", wanted="at least one", do="name another file")
    return longest, count


if __name__ == "__main__":
    run_command(main)
