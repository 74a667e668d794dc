"""Wrong: imports a package that is not installed."""

import tritonx  # wrong

from plugins.cpu import load as load
from plugins.cpu import place_inputs as place_inputs
from plugins.cpu import plan as plan
from plugins.cpu import validate as validate

KERNELS = tritonx
