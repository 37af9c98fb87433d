from .types import BASE as BASE
from .types import TUNED as TUNED
