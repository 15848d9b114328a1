"""The errors a caller can cause. Each message names the value and what is allowed."""


class BlockDanceError(ValueError):
    """Base of every error this library raises for bad input."""


class ConfigError(BlockDanceError):
    """A setting lies outside its range."""


class ScheduleError(BlockDanceError):
    """A schedule is malformed, or does not fit the model or the number of steps."""


class UnsupportedModelError(BlockDanceError):
    """The pipeline or its transformer cannot be accelerated; the message says why and what to do instead."""


class PolicyError(BlockDanceError):
    """A policy cannot be loaded, or was trained for another model."""


class SessionError(BlockDanceError):
    """The pipeline is used in a way that would break exactness: nested accelerate, an unknown step, a wrong replay."""


class BlockDanceWarning(UserWarning):
    """Something was asked for and did not happen; the message says why."""
