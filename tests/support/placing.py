"""Bringing a tiny model up, which `moorage doctor --self-test` does too, as tests know it."""

from service.testing.placing import IDS as IDS
from service.testing.placing import ROOMY as ROOMY
from service.testing.placing import bring_up as bring_up
from service.testing.placing import built_in as built_in
from service.testing.placing import config_of as config_of
from service.testing.placing import judged as judged
from service.testing.placing import logits as logits
from service.testing.placing import offloaded as offloaded
from service.testing.placing import planned as planned
from service.testing.placing import refusal as refusal
from service.testing.placing import scribble as scribble
from service.testing.placing import squeezed as squeezed
from service.testing.placing import variant as variant
