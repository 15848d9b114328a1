"""BlockDance-Ada (Sec. 3.3): a decision network that gives each picture a schedule of its own.

policy = load_demo_policy(saving=0.5)
with accelerate(pipe, policy) as trace:
    image = pipe("red apple").images[0]
"""

from pathlib import Path

from blockdance.ada.policy import AdaPolicy

POLICY_FILE = Path(__file__).resolve().parents[2] / "assets" / "ada" / "policy.safetensors"


def load_demo_policy(saving: float = 0.5) -> AdaPolicy:
    """The policy that was trained for the model in the box.

    Args:
        saving: wanted share of reuse steps among those decided on, in [0, 1].

    Raises:
        ConfigError: a saving outside its range.
    """
    return AdaPolicy.load(POLICY_FILE, saving)


__all__ = ["POLICY_FILE", "AdaPolicy", "load_demo_policy"]
