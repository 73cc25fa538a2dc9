"""The methods by name. Each entry makes a `Method` from its hyper-parameters (keyword arguments).

Adding a method: one file with one function, and one line here.
"""

from functools import partial

from jaxrl_sd.methods.base import Method
from jaxrl_sd.methods.cast import cast
from jaxrl_sd.methods.cispo import cispo
from jaxrl_sd.methods.dapo import dapo
from jaxrl_sd.methods.dr_grpo import dr_grpo
from jaxrl_sd.methods.grpo import grpo
from jaxrl_sd.methods.grpo_opsd import grpo_opsd, grpo_opsd_hsd
from jaxrl_sd.methods.gspo import gspo
from jaxrl_sd.methods.hsd import hsd
from jaxrl_sd.methods.opd import opd, opd_sampled, opd_top_k
from jaxrl_sd.methods.opsd import opsd
from jaxrl_sd.methods.reinforce_pp import reinforce_pp
from jaxrl_sd.methods.rloo import rloo
from jaxrl_sd.methods.rlrt import rlrt
from jaxrl_sd.methods.rlsd import rlsd
from jaxrl_sd.methods.sc_grpo import sc_grpo
from jaxrl_sd.methods.sdft import sdft
from jaxrl_sd.methods.sdpg import sdpg
from jaxrl_sd.methods.sdpo import sdpo

__all__ = ["METHODS", "PRESETS", "Method"]

METHODS = {
    "grpo": grpo,
    "rlsd": rlsd,
    "sdpg": sdpg,
    "cast": cast,
    "sc_grpo": sc_grpo,
    "hsd": hsd,
    # The baselines that these are compared with.
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "opd": opd,
    "opd_top_k": opd_top_k,
    "opd_sampled": opd_sampled,
    "opsd": opsd,
    "sdpo": sdpo,
    "sdft": sdft,
    "rlrt": rlrt,
    "grpo_opsd": grpo_opsd,
    "grpo_opsd_hsd": grpo_opsd_hsd,
}

# Variants that somebody published under the same name as a method, with other settings.
PRESETS = {
    # What most trainers run as GRPO today.
    "grpo_modern": partial(grpo, clip_high=0.28, kl_coef=0.0, average="token"),
    # RLSD's released script.
    "rlsd_released": partial(rlsd, decay_steps=60, sync_every=20),
    # SDPG's released script as it is: no gate, constant beta, the other anchor.
    "sdpg_released": partial(sdpg, gate=False, warmup=1, decay=1, total_steps=10**9, anchor="urkl"),
    # SDPO's experiments with feedback and at test time.
    "sdpo_feedback": partial(sdpo, alpha=1.0, top_k=20, rate=0.01),
    # SDFT's text, before its erratum.
    "sdft_text": partial(sdft, alpha=1.0),
    # ExOPD, the recommended extrapolation.
    "exopd": partial(opd_sampled, scale=1.25, clip_low=0.2, clip_high=0.2),
}
