"""The zoo: one row a model, one file a skeleton. A new paper adds its family and its rows."""

from . import cswin as cswin
from . import deit as deit
from . import post_norm_pyramid as post_norm_pyramid
from . import pvt as pvt
from . import pyramid as pyramid
from . import swin as swin
