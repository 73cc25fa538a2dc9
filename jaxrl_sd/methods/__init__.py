"""The methods by name. Each entry makes a `Method` from its hyper-parameters (keyword arguments).

Adding a method: one file with one function, and one line here.
"""

from jaxrl_sd.methods.base import Method
from jaxrl_sd.methods.cast import cast
from jaxrl_sd.methods.grpo import grpo
from jaxrl_sd.methods.hsd import hsd
from jaxrl_sd.methods.opsd import opsd
from jaxrl_sd.methods.rlsd import rlsd
from jaxrl_sd.methods.sc_grpo import sc_grpo
from jaxrl_sd.methods.sdpg import sdpg

__all__ = ["METHODS", "Method"]

METHODS = {
    "grpo": grpo,
    "rlsd": rlsd,
    "sdpg": sdpg,
    "cast": cast,
    "sc_grpo": sc_grpo,
    "hsd": hsd,
    "opsd": opsd,
}
