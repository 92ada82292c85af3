"""LoRA fine-tuning of pruned and other models, after which the result is again an ordinary checkpoint."""

from slimgraph.finetune.run import FinetuneResult, finetune
from slimgraph.finetune.settings import FinetuneSettings

__all__ = ["FinetuneResult", "FinetuneSettings", "finetune"]
