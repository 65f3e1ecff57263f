"""Output layers that break the softmax bottleneck at the cost of a plain softmax."""

from uncork.logit_functions import *  # noqa: F403
from uncork.loss import *  # noqa: F403
