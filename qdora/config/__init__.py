"""Every option of qdora as typed dataclasses. YAML in `conf/` overlays these defaults, the command line both.

Values are checked when a dataclass is made, across groups in the three of the commands. All raise `ConfigError`.
"""

from qdora.config.commands import DoctorConfig, EvaluateConfig, MergeConfig, RunConfig
from qdora.config.groups import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    QuantConfig,
    TrackerConfig,
    TrainConfig,
)
from qdora.config.words import (
    ActivationCheckpointing,
    AdapterMethod,
    Attention,
    DataFormat,
    Dtype,
    MergeBase,
    OnBadStep,
    Overlong,
    Plan,
    Protocol,
    QuantMethod,
    Report,
    Schedule,
    TrackerKind,
    TrackerMode,
)

__all__ = [
    "ActivationCheckpointing",
    "AdapterConfig",
    "AdapterMethod",
    "Attention",
    "DataConfig",
    "DataFormat",
    "DoctorConfig",
    "Dtype",
    "EvaluateConfig",
    "MergeBase",
    "MergeConfig",
    "ModelConfig",
    "OnBadStep",
    "OptimConfig",
    "Overlong",
    "ParallelConfig",
    "Plan",
    "Protocol",
    "QuantConfig",
    "QuantMethod",
    "Report",
    "RunConfig",
    "Schedule",
    "TrackerConfig",
    "TrackerKind",
    "TrackerMode",
    "TrainConfig",
]
