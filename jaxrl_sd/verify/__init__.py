"""Verifiers decide, on the host, whether a response solves its problem.

A verifier is a pure function `verify(prompt: str, answer: str, response: str) -> bool`, True when
the response is correct. It may return `(bool, text)` instead, where the text tells the model what
went wrong (SDPO shows it to a teacher). It raises when it cannot decide; it never raises because a
response is malformed. Verifiers run in the worker processes of `pool.VerifierPool`: a response may
hang or crash whatever tries to understand it.
"""

# Targets rather than functions, so that the training process never imports sympy.
VERIFIERS: dict[str, str] = {
    "math": "jaxrl_sd.verify.math:verify",
    "countdown": "jaxrl_sd.verify.countdown:verify",
    "chains": "jaxrl_sd.verify.chains:verify",
    "code": "jaxrl_sd.verify.code:verify",
}

# What a verifier may need for one answer; killed before, it would not have judged a slow program.
SECONDS: dict[str, float] = {"code": 8.0}

# Functions that raise RuntimeError where the machine lacks what a verifier needs.
MACHINE_CHECKS: dict[str, str] = {"code": "jaxrl_sd.verify.sandbox:check"}

# Functions of a prompt and an answer that raise ValueError where no response could be judged.
PROBLEM_CHECKS: dict[str, str] = {
    "countdown": "jaxrl_sd.verify.countdown:check_problem",
    "chains": "jaxrl_sd.verify.chains:check_problem",
    "code": "jaxrl_sd.verify.code:check_problem",
}

# Functions `final_answer(response: str) -> str | None` that give equal answers equal texts. Where a
# verifier has none, its answers cannot be put to a vote (maj@k).
FINAL_ANSWERS: dict[str, str] = {
    "math": "jaxrl_sd.verify.math:final_answer",
    "chains": "jaxrl_sd.verify.chains:final_answer",
}
