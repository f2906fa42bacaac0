"""The zoo: one row a model, one file a skeleton. A new paper adds its family and its rows."""

from . import cswin as cswin
from . import pyramid as pyramid
from . import swin as swin
