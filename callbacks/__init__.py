"""What watches a run: callbacks for training and evaluation."""

from callbacks.checkpoint import LastCheckpoint
from callbacks.cknna import CKNNACallback
from callbacks.clip_score import CLIPScoreCallback
from callbacks.distribution import DistributionCallback
from callbacks.ema import EMA
from callbacks.images import ReconstructionImages, SampleImages
from callbacks.post_hoc_ema import PostHocEMA
from callbacks.preemption import StopOnSignal
from callbacks.probe import ClassAccuracyCallback, LinearProbeCallback
from callbacks.rank_failure import EndTogether
from callbacks.report import Report
from callbacks.robustness import RobustnessCallback
from callbacks.samples import SampleWriter
from callbacks.throughput import Throughput
from callbacks.writers import LatentWriter, ReconstructionWriter

__all__ = [
    "EMA",
    "CKNNACallback",
    "CLIPScoreCallback",
    "ClassAccuracyCallback",
    "DistributionCallback",
    "EndTogether",
    "LastCheckpoint",
    "LatentWriter",
    "LinearProbeCallback",
    "PostHocEMA",
    "ReconstructionImages",
    "ReconstructionWriter",
    "Report",
    "RobustnessCallback",
    "SampleImages",
    "SampleWriter",
    "StopOnSignal",
    "Throughput",
]
