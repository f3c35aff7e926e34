"""The settings of runs and commands, each declared once (schema.py)."""

from .commands import (
    EvalConfig,
    ExportConfig,
    FitConfig,
    GenerateConfig,
    ReportConfig,
    RunConfig,
    ShowConfig,
)
from .data import DataConfig
from .lora import LoraConfig
from .schema import Part, build, flatten, read_arguments, read_yaml
from .train import TrainConfig

__all__ = [
    "DataConfig",
    "EvalConfig",
    "ExportConfig",
    "FitConfig",
    "GenerateConfig",
    "LoraConfig",
    "Part",
    "ReportConfig",
    "RunConfig",
    "ShowConfig",
    "TrainConfig",
    "build",
    "flatten",
    "read_arguments",
    "read_yaml",
]
