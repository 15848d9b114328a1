"""BlockDance-Ada (Sec. 3.3): a decision network that gives each picture a schedule of its own.

policy = load_demo_policy(saving=0.5)
with accelerate(pipe, policy) as trace:
    image = pipe("red apple").images[0]
"""

from pathlib import Path

from blockdance.ada.policy import AdaPolicy

POLICY_FILE = Path(__file__).resolve().parents[2] / "assets" / "ada" / "policy.safetensors"
EARLY_FILE = POLICY_FILE.with_name("policy-early.safetensors")


def load_demo_policy(saving: float = 0.5, *, early: bool = False) -> AdaPolicy:
    """The policy that was trained for the model in the box.

    Args:
        saving: wanted share of reuse steps among those decided on, in [0, 1].
        early: one that decides after 15 % of the steps, and not after 40 % as the paper's.

    Raises:
        ConfigError: a saving outside its range.
    """
    return AdaPolicy.load(EARLY_FILE if early else POLICY_FILE, saving)


__all__ = ["EARLY_FILE", "POLICY_FILE", "AdaPolicy", "load_demo_policy"]
