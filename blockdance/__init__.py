"""BlockDance (CVPR 2025): reuse the repeating features of diffusion transformers between denoising steps.

with accelerate(pipe, ReuseConfig(reuse_interval=2)) as trace:
    image = pipe("red apple").images[0]
"""

from blockdance.accelerate import accelerate
from blockdance.apply import Applied, BlockDanceConfig, apply_block_dance
from blockdance.demo import load_demo_pipeline, load_demo_profile, load_demo_styles_pipeline, load_demo_video_pipeline
from blockdance.errors import (
    BlockDanceError,
    BlockDanceWarning,
    ConfigError,
    PolicyError,
    ScheduleError,
    SessionError,
    UnsupportedModelError,
)
from blockdance.integrate import integrate
from blockdance.observe import Observation, observe
from blockdance.offload import Offloaded
from blockdance.plan import Plan, own_profile, plan
from blockdance.profile import Profile
from blockdance.replay import Recording, record
from blockdance.schedule import MIN_STEPS, ReuseConfig, Schedule, StepKind, fixed_schedule
from blockdance.starting_points import StartingPoint, starting_point
from blockdance.storage import Extrapolated
from blockdance.trace import OnStep, StepRecord, Trace

__version__ = "0.1.0"

__all__ = [
    "MIN_STEPS",
    "Applied",
    "BlockDanceConfig",
    "BlockDanceError",
    "BlockDanceWarning",
    "ConfigError",
    "Extrapolated",
    "Observation",
    "Offloaded",
    "OnStep",
    "Plan",
    "PolicyError",
    "Profile",
    "Recording",
    "ReuseConfig",
    "Schedule",
    "ScheduleError",
    "SessionError",
    "StartingPoint",
    "StepKind",
    "StepRecord",
    "Trace",
    "UnsupportedModelError",
    "accelerate",
    "apply_block_dance",
    "fixed_schedule",
    "integrate",
    "load_demo_pipeline",
    "load_demo_profile",
    "load_demo_styles_pipeline",
    "load_demo_video_pipeline",
    "observe",
    "own_profile",
    "plan",
    "record",
    "starting_point",
]
