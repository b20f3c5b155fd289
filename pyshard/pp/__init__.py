"""Pipeline parallelism: a model cut into stages by its blocks, run by torch.distributed.pipelining."""

from .build import causal_lm_loss, pipeline
from .parts import Plan
from .pipeline import Output, Pipeline
from .schedules import KINDS as SCHEDULES

__all__ = ["SCHEDULES", "Output", "Pipeline", "Plan", "causal_lm_loss", "pipeline"]
