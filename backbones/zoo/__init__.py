"""The zoo: one row a model, one file a skeleton. A new paper adds its family and its rows."""

from . import post_norm_pyramid as post_norm_pyramid
from . import pyramid as pyramid
