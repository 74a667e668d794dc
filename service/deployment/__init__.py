"""One deployment, from its words to a model that answers, and its state."""

from service.deployment.deployment import Deployment
from service.deployment.serving import Serving

__all__ = ["Deployment", "Serving"]
