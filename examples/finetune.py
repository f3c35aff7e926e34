"""Fine-tune Gemma 4 with LoRA, from Python.

python examples/finetune.py                                       # the small default
python examples/finetune.py google/gemma-4-E2B-it my_data/        # a real model
"""

from __future__ import annotations

import sys

import mlx_gemma4 as g4
from mlx_gemma4.train.embedded import prepare


def main(model: str, data_folder: str, output: str, iters: int = 100) -> g4.Run:
    gemma = g4.load(model)
    print(gemma)

    data = g4.read(data_folder, gemma, g4.DataConfig(max_seq_length=512, overlong="truncate"))
    print(data)

    run = g4.finetune(
        gemma,
        data,
        g4.TrainConfig(iters=iters, batch_size=2, learning_rate=2e-3, lr_schedule="linear"),
        lora=g4.LoraConfig(rank=8),
        output=output,
    )
    print(run)
    print(gemma.generate("What does get_name(self) do?", max_tokens=40))
    return run


if __name__ == "__main__":
    model, data_folder = sys.argv[1:3] if len(sys.argv) > 2 else map(str, prepare())
    main(model, data_folder, output=sys.argv[3] if len(sys.argv) > 3 else "runs/finetune")
