"""Overlapping loads, which `moorage doctor --self-test` makes too, as tests know them."""

from service.testing.overlapping import PATIENCE_S as PATIENCE_S
from service.testing.overlapping import ForeignLoad as ForeignLoad
from service.testing.overlapping import during_construction as during_construction
from service.testing.overlapping import overlapping_loads as overlapping_loads
from service.testing.overlapping import waited as waited
