"""The papers' algorithm boxes as slow float64 loops over rows and tokens.

Written from the papers' equations. Nothing here comes from the package, and the methods share no
more than the papers themselves do (GRPO's advantage and surrogate, softmax, KL), so that a mistake
in the package has no way in. Every oracle maps a `Case` to the loss as a function of
`case.student`, whose gradient finite differences then give, and to the credit of every token.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """One tiny batch. Rows are group-major, B = P * group_size."""

    student: np.ndarray  # f64[B, T, V] logits that are trained
    old: np.ndarray  # f64[B, T, V] logits at the start of the step
    teacher: np.ndarray  # f64[B, T, V] logits of the teacher that is shown something
    reference: np.ndarray  # f64[B, T, V] logits of the initial policy
    token: np.ndarray  # i[B, T]
    mask: np.ndarray  # bool[B, T]
    correct: np.ndarray  # bool[B]
    graded: np.ndarray  # bool[B]
    shown: np.ndarray  # bool[B], False: the teacher is silent
    source: np.ndarray  # i[B], the row whose response the teacher is shown, -1 none
    group_size: int
    step: int = 0  # finished steps
    truncated: np.ndarray | None = None  # bool[B], no stop token within max_length; None: no row
    length: np.ndarray | None = None  # i[B], sampled tokens, also of rows that are masked out
    max_length: int | None = None  # tokens
    detached: np.ndarray | None = None  # f64[B, T, V], `student` as sg[.] sees it; None: the same

    @property
    def score(self) -> np.ndarray:
        return np.where(self.correct & self.graded, 1.0, 0.0)


class Result(NamedTuple):
    loss_t: np.ndarray  # f64[B, T], its sum is the loss; row i depends on the student's row i only
    adv: np.ndarray  # f64[B, T], what multiplies the policy gradient
    distill: np.ndarray  # f64[B, T], what multiplies the divergence to the teacher


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


def kl(z_a: np.ndarray, z_b: np.ndarray) -> float:
    """kl(softmax(z_a) || softmax(z_b))."""
    a, b = log_softmax(z_a), log_softmax(z_b)
    return float((np.exp(a) * (a - b)).sum())


def logp(logits: np.ndarray, case: Case, i: int, t: int) -> float:
    return log_softmax(logits[i, t])[case.token[i, t]]


def group(case: Case, i: int) -> list[int]:
    """The graded rows of row i's group."""
    first = i - i % case.group_size
    return [j for j in range(first, first + case.group_size) if case.graded[j]]


def num_correct(case: Case, i: int) -> int:
    return sum(bool(case.correct[j]) for j in group(case, i))


def tokens(case: Case) -> list[tuple[int, int]]:
    return [(i, t) for i in range(len(case.mask)) for t in np.flatnonzero(case.mask[i])]


def z_score(values: dict[int, float], i: int) -> float:
    """(x_i - mean) / (std + 1e-6), std with n - 1; 0 for a row without a value or equal values."""
    if i not in values or len(set(values.values())) == 1:
        return 0.0
    x = np.array(list(values.values()))
    return (values[i] - x.mean()) / (x.std(ddof=1) + 1e-6)


def group_advantage(case: Case, i: int) -> float:
    return z_score({j: float(case.correct[j]) for j in group(case, i)}, i)


def log_ratio(case: Case, i: int, t: int) -> float:
    return logp(case.student, case, i, t) - logp(case.old, case, i, t)


def clipped(rho: float, A: float, low: float, high: float) -> float:
    return -min(rho * A, min(max(rho, 1 - low), 1 + high) * A)


def surrogate(case: Case, i: int, t: int, A: float, low: float, high: float) -> float:
    return clipped(np.exp(log_ratio(case, i, t)), A, low, high)


def as_constant(case: Case) -> Case:
    """What sg[.] sees: the student where the gradient is taken."""
    return case if case.detached is None else case._replace(student=case.detached)


def rows_only(case: Case, rows: np.ndarray) -> Case:
    """The tokens of rows bool[B]; the others still count in their groups."""
    return case._replace(mask=case.mask & rows[:, None])


def not_truncated(case: Case) -> Case:
    return case if case.truncated is None else rows_only(case, ~case.truncated)


def mean_of_rows(case: Case, loss: np.ndarray) -> np.ndarray:
    """Terms of the mean over rows of the mean over each row's tokens."""
    length = case.mask.sum(axis=1)
    rows = (length > 0).sum()
    terms = empty(case)
    for i, t in tokens(case):
        terms[i, t] = loss[i, t] / length[i] / rows
    return terms


def mean_of_tokens(case: Case, loss: np.ndarray) -> np.ndarray:
    """Terms of the mean over all tokens."""
    terms = empty(case)
    for i, t in tokens(case):
        terms[i, t] = loss[i, t] / case.mask.sum()
    return terms


def mean_of_sums(case: Case, loss: np.ndarray) -> np.ndarray:
    """Terms of the mean over rows of the sum over each row's tokens."""
    terms = empty(case)
    for i, t in tokens(case):
        terms[i, t] = loss[i, t] / (case.mask.sum(axis=1) > 0).sum()
    return terms


def empty(case: Case) -> np.ndarray:
    return np.zeros(case.mask.shape)


def grpo(case: Case, clip_low=0.2, clip_high=0.2, kl_coef=0.04, average="sequence") -> Result:
    """DeepSeekMath Eq. 3 and 4."""
    loss, adv = empty(case), empty(case)
    for i, t in tokens(case):
        adv[i, t] = group_advantage(case, i)
        log_w = logp(case.student, case, i, t) - logp(case.reference, case, i, t)
        penalty = np.exp(-log_w) + log_w - 1
        loss[i, t] = surrogate(case, i, t, adv[i, t], clip_low, clip_high) + kl_coef * penalty
    terms = {"sequence": mean_of_rows, "token": mean_of_tokens}[average](case, loss)
    return Result(terms, adv, empty(case))


def rlsd(case: Case, lam_0=0.5, decay_steps=50, eps_w=0.2, clip_low=0.2, clip_high=0.28) -> Result:
    """RLSD Algorithm 1 with the surrogate of its Sec. 4.2; updates count from 1."""
    lam = lam_0 * max(1 - (case.step + 1) / decay_steps, 0)
    loss, adv = empty(case), empty(case)
    for i, t in tokens(case):
        A = group_advantage(case, i)
        delta = logp(case.teacher, case, i, t) - logp(case.old, case, i, t)
        w = np.exp(np.sign(A) * delta)
        adv[i, t] = A * ((1 - lam) + lam * min(max(w, 1 - eps_w), 1 + eps_w))
        loss[i, t] = surrogate(case, i, t, adv[i, t], clip_low, clip_high)
    return Result(mean_of_tokens(case, loss), adv, empty(case))


SDPG_ANCHORS: dict[str, Callable[[float], float]] = {
    "ufkl": lambda w: 1 / w + np.log(w) - 1,  # the paper's, without its constant 1
    "urkl": lambda w: np.log(w) ** 2 / 2,
    "fkl": lambda w: 1 / w,
    "rkl": lambda w: (np.log(w) + 1) ** 2 / 2,
}


def sdpg(
    case: Case,
    beta=1e-3,
    alpha=1e-3,
    warmup=50,
    decay=350,
    total_steps=400,
    anchor="ufkl",
    gate=True,
    clip_low=0.2,
    clip_high=0.28,
    dual_clip=10.0,
) -> Result:
    """SDPG Algorithm 1 and Eq. 3.1 in the form of App. A.3; updates count from 1."""
    k = case.step + 1
    beta_k = beta * min(1, k / warmup) * min(1, max(total_steps - k, 0) / decay)
    loss, adv, distill = empty(case), empty(case), empty(case)
    for i, t in tokens(case):
        A = group_advantage(case, i)
        m = float(A > 0) if gate else 1.0
        w = np.exp(logp(case.student, case, i, t) - logp(case.reference, case, i, t))
        rho = np.exp(log_ratio(as_constant(case), i, t))
        l_clip = clipped(rho, A, clip_low, clip_high)
        if A < 0:
            l_clip = min(l_clip, -A * dual_clip)
        adv[i, t], distill[i, t] = A, beta_k * m
        loss[i, t] = l_clip * logp(case.student, case, i, t) + rho * (
            beta_k * m * kl(case.student[i, t], case.teacher[i, t])
            + alpha * SDPG_ANCHORS[anchor](w)
        )
    return Result(mean_of_tokens(case, loss), adv, distill)


def cast_advantage(B: float, g: float, lam, positive, negative, max_adv, flip) -> float:
    """One token of CAST Algorithm 1, Eq. 7-15."""
    if B == 0:
        return 0.0
    low, high = positive if B > 0 else negative
    raw = B * (1 + lam * (np.clip(np.exp(np.sign(B) * g), low, high) - 1))
    if flip and B > 0 and g < 0:
        low, high = negative
        raw = -abs(B) * (1 + lam * (np.clip(np.exp(-g), max(1, low), high) - 1))
    if flip and B < 0 and g > 0:
        low, high = positive
        raw = abs(B) * (1 + lam * (np.clip(np.exp(g), max(1, low), high) - 1))
    return min(max(raw, -max_adv), max_adv)


def cast(
    case: Case,
    lam=1.0,
    clip_positive=(0.8, 1.05),
    clip_negative=(0.95, 1.2),
    max_adv=1.2,
    flip=True,
    cutoff=None,
    clip_low=0.2,
    clip_high=0.28,
) -> Result:
    """CAST Algorithm 1 and Eq. 16-19; flips end with shaping at the cutoff."""
    case = not_truncated(case)
    on = cutoff is None or case.step < cutoff
    loss, adv = empty(case), empty(case)
    for i, t in tokens(case):
        uniform = {0: -1.0, len(group(case, i)): 1.0}.get(num_correct(case, i))
        B = group_advantage(case, i) if uniform is None else uniform * on
        B *= case.graded[i]
        g = logp(case.teacher, case, i, t) - logp(case.old, case, i, t)
        adv[i, t] = cast_advantage(
            B, g, lam * on, clip_positive, clip_negative, max_adv, flip and on
        )
        loss[i, t] = surrogate(case, i, t, adv[i, t], clip_low, clip_high)
    return Result(mean_of_tokens(case, loss), adv, empty(case))


def sc_grpo(
    case: Case, alpha=0.1, quantile=0.75, c_min=1e-4, clip_low=0.2, clip_high=0.2
) -> Result:
    """SC-GRPO Algorithm 1, with the s_i of its Sec. 5.1 and the percentile over the batch."""
    D = {(i, t): kl(case.teacher[i, t], case.old[i, t]) for i, t in tokens(case) if case.shown[i]}
    c = max(np.percentile(list(D.values()), 100 * quantile), c_min) if D else c_min
    f = {it: d / (d + c) for it, d in D.items()}
    loss, adv = empty(case), empty(case)
    for i, t in tokens(case):
        A = group_advantage(case, i)
        if num_correct(case, i) == 0:
            scored = {j: distinctness(case, f, j) for j in group(case, i) if case.shown[j]}
            A = alpha * z_score(scored, i) if case.shown[i] else 0.0
        adv[i, t] = f.get((i, t), 1.0) * A
        loss[i, t] = f.get((i, t), 1.0) * surrogate(case, i, t, A, clip_low, clip_high)
    return Result(mean_of_rows(case, loss), adv, empty(case))


def distinctness(case: Case, f: dict[tuple[int, int], float], i: int) -> float:
    """SC-GRPO's s_i: the mean weight over the first min(|o_i|, |o_r|) tokens."""
    length = min(case.mask[i].sum(), case.mask[case.source[i]].sum())
    positions = np.flatnonzero(case.mask[i])[:length]
    return float(np.mean([f[i, t] for t in positions])) if length else 0.0


def sc_grpo_route(correct: list[bool | None], i: int) -> tuple[str, set[int]]:
    """SC-GRPO's routing table: what row i's teacher is shown, and the rows it may come from."""
    solved = {j for j, c in enumerate(correct) if c is True}
    failed = {j for j, c in enumerate(correct) if c is False}
    if not solved and len(failed) > 1:
        return "failure", failed
    if 2 <= len(solved) and failed:
        return "sibling", solved - {i}
    return "silent", set()


def sc_grpo_hints(correct: list[bool | None], group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(shown bool[B], source i[B]) of the routing table, always with the first row allowed."""
    shown, source = np.zeros(len(correct), bool), np.full(len(correct), -1)
    for i in range(len(correct)):
        first = i - i % group_size
        _, rows = sc_grpo_route(correct[first : first + group_size], i - first)
        if rows and min(rows) != i - first:
            shown[i], source[i] = True, first + min(rows)
    return shown, source


def verified_siblings(correct: list[bool | None], group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(shown bool[B], source i[B]): the group's first correct row that is not the row itself."""
    shown, source = np.zeros(len(correct), bool), np.full(len(correct), -1)
    for i in range(len(correct)):
        first = i - i % group_size
        for j in range(first, first + group_size):
            if correct[j] is True and j != i and not shown[i]:
                shown[i], source[i] = True, j
    return shown, source


def hsd(case: Case, beta=1e-3) -> Result:
    """HSD Eq. 10 and 13 and the penalty to the initial policy."""
    loss, distill = empty(case), empty(case)
    for i, t in tokens(case):
        distill[i, t] = float(case.shown[i])
        loss[i, t] = distill[i, t] * kl(case.teacher[i, t], case.student[i, t]) + beta * kl(
            case.student[i, t], case.reference[i, t]
        )
    return Result(mean_of_rows(case, loss), empty(case), distill)


def opsd(case: Case, tau=0.05) -> Result:
    """OPSD Eq. 6-8 with the pointwise cap of its Sec. 3."""
    loss, distill = empty(case), empty(case)
    for i, t in tokens(case):
        log_p, log_q = log_softmax(case.teacher[i, t]), log_softmax(case.student[i, t])
        distill[i, t] = float(case.shown[i])
        for lp, lq in zip(log_p, log_q, strict=True):
            loss[i, t] += distill[i, t] * min(np.exp(lp) * (lp - lq), tau)
    return Result(mean_of_rows(case, loss), empty(case), distill)


def dr_grpo(case: Case, max_tokens=None, clip_low=0.2, clip_high=0.2) -> Result:
    """Dr.GRPO: neither the standard deviation nor the length of a row divides."""
    budget = case.mask.shape[1] if max_tokens is None else max_tokens
    loss, adv = empty(case), empty(case)
    for i, t in tokens(case):
        adv[i, t] = case.correct[i] - num_correct(case, i) / len(group(case, i))
        loss[i, t] = surrogate(case, i, t, adv[i, t], clip_low, clip_high)
    return Result(mean_of_sums(case, loss) / budget, adv, empty(case))


def overlong(length: int, max_length: int, buffer: int) -> float:
    """DAPO Eq. 13."""
    if length <= max_length - buffer:
        return 0.0
    return (max_length - buffer - length) / buffer if length <= max_length else -1.0


def mixed(case: Case) -> np.ndarray:
    """bool[B], rows of the groups with 0 < correct < graded, the only ones that DAPO samples."""
    rows = range(len(case.mask))
    return np.array([0 < num_correct(case, i) < len(group(case, i)) for i in rows])


def dapo(case: Case, overlong_buffer=None, clip_low=0.2, clip_high=0.28) -> Result:
    """DAPO Eq. 8-13."""
    buffer = case.max_length // 5 if overlong_buffer is None else overlong_buffer
    case = rows_only(case, mixed(case))
    loss, adv = empty(case), empty(case)
    for i, t in tokens(case):
        reward = {
            j: (1 if case.correct[j] else -1) + overlong(case.length[j], case.max_length, buffer)
            for j in group(case, i)
        }
        adv[i, t] = z_score(reward, i)
        loss[i, t] = surrogate(case, i, t, adv[i, t], clip_low, clip_high)
    return Result(mean_of_tokens(case, loss), adv, empty(case))


def gspo(case: Case, clip_low=3e-4, clip_high=4e-4) -> Result:
    """GSPO Eq. 5-7: one ratio a row, here said again at each of its tokens."""
    loss, adv = empty(case), empty(case)
    for i, t in tokens(case):
        adv[i, t] = group_advantage(case, i)
        s = np.exp(np.mean([log_ratio(case, i, u) for u in np.flatnonzero(case.mask[i])]))
        loss[i, t] = clipped(s, adv[i, t], clip_low, clip_high)
    return Result(mean_of_rows(case, loss), adv, empty(case))


def cispo(case: Case, max_ratio=5.0) -> Result:
    """CISPO Eq. 4 and 5 without its lower bound."""
    loss, adv = empty(case), empty(case)
    for i, t in tokens(case):
        adv[i, t] = group_advantage(case, i)
        rho = np.exp(log_ratio(as_constant(case), i, t))
        loss[i, t] = -min(rho, max_ratio) * adv[i, t] * logp(case.student, case, i, t)
    return Result(mean_of_tokens(case, loss), adv, empty(case))


def old_k1(case: Case, i: int, t: int) -> float:
    return logp(case.old, case, i, t) - logp(case.reference, case, i, t)


def rloo(case: Case, kl_coef=0.03) -> Result:
    """RLOO: the whole answer is one action, its reward holds the penalty to the reference."""
    reward = [
        float(case.correct[i])
        - kl_coef * sum(old_k1(case, i, t) for t in np.flatnonzero(case.mask[i]))
        for i in range(len(case.mask))
    ]
    loss, adv = empty(case), empty(case)
    for i, t in tokens(case):
        others = [reward[j] for j in group(case, i) if j != i]
        adv[i, t] = reward[i] - np.mean(others) if others else 0.0
        loss[i, t] = -adv[i, t] * logp(case.student, case, i, t)
    return Result(mean_of_sums(case, loss), adv, empty(case))


def reinforce_pp(
    case: Case, kl_coef=1e-3, clip_low=0.2, clip_high=0.2, group_baseline=False
) -> Result:
    """REINFORCE++: returns of rewards with a penalty in each token, whitened over the batch."""
    returns = {}
    for i in range(len(case.mask)):
        positions = np.flatnonzero(case.mask[i])
        reward = float(case.correct[i])
        if group_baseline and len(positions):
            reward -= num_correct(case, i) / len(group(case, i))
        for n, t in enumerate(positions):
            returns[i, t] = reward - kl_coef * sum(old_k1(case, i, u) for u in positions[n:])
    x = np.array(list(returns.values()))
    loss, adv = empty(case), empty(case)
    for i, t in tokens(case):
        if len(x) > 1:
            adv[i, t] = (returns[i, t] - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-8)
        loss[i, t] = surrogate(case, i, t, adv[i, t], clip_low, clip_high)
    return Result(mean_of_tokens(case, loss), adv, empty(case))


def opd(case: Case) -> Result:
    """On-policy distillation with the exact reverse KL; the teacher is another model."""
    loss, distill = empty(case), empty(case)
    for i, t in tokens(case):
        distill[i, t] = 1.0
        loss[i, t] = kl(case.student[i, t], case.teacher[i, t])
    return Result(mean_of_rows(case, loss), empty(case), distill)


def opd_sampled(case: Case, scale=1.0, clip_low=1.0, clip_high=np.inf) -> Result:
    """On-policy distillation as a policy gradient, and ExOPD (G-OPD Eq. 11-14) beyond scale 1."""
    loss, adv = empty(case), empty(case)
    for i, t in tokens(case):
        log_T, log_old, log_ref = (
            logp(z, case, i, t) for z in (case.teacher, case.old, case.reference)
        )
        adv[i, t] = (log_T - log_old) + (scale - 1) * (log_T - log_ref)
        loss[i, t] = surrogate(case, i, t, adv[i, t], clip_low, clip_high)
    return Result(mean_of_tokens(case, loss), adv, empty(case))


def divergence(log_p: np.ndarray, log_q: np.ndarray, alpha: float) -> float:
    """JSD_alpha of teacher p and student q; its ends are kl(p||q) and kl(q||p), not limits."""
    p, q = np.exp(log_p), np.exp(log_q)
    log_m = {0: log_q, 1: log_p}.get(alpha, np.log(alpha * p + (1 - alpha) * q))
    weight = {0: (1, 0), 1: (0, 1)}.get(alpha, (alpha, 1 - alpha))
    return weight[0] * (p * (log_p - log_m)).sum() + weight[1] * (q * (log_q - log_m)).sum()


def with_tail(log_x: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The classes `ids`, and one class of all others if there are any."""
    if len(ids) == len(log_x):
        return log_x
    return np.append(log_x[ids], np.log(np.exp(np.delete(log_x, ids)).sum()))


def opd_top_k(case: Case, top_k=32) -> Result:
    """kl(teacher||student) on the teacher's likeliest tokens and one class of all others."""
    loss, distill = empty(case), empty(case)
    for i, t in tokens(case):
        ids = np.argsort(-case.teacher[i, t])[:top_k]
        log_p, log_q = (with_tail(log_softmax(z[i, t]), ids) for z in (case.teacher, case.student))
        distill[i, t] = 1.0
        loss[i, t] = divergence(log_p, log_q, alpha=0)
    return Result(mean_of_rows(case, loss), empty(case), distill)


def sdpo(case: Case, alpha=0.5, top_k=100, is_clip=2.0) -> Result:
    """SDPO Eq. 11 as released: rows without a teacher are not there."""
    case = rows_only(case, case.shown)
    loss, distill = empty(case), empty(case)
    for i, t in tokens(case):
        ids = np.argsort(-case.student[i, t])[:top_k]
        log_p, log_q = (with_tail(log_softmax(z[i, t]), ids) for z in (case.teacher, case.student))
        rho = np.exp(np.clip(log_ratio(as_constant(case), i, t), -20, 20))
        distill[i, t] = 1.0
        loss[i, t] = min(rho, is_clip) * divergence(log_p, log_q, alpha)
    return Result(mean_of_tokens(case, loss), empty(case), distill)


def sdft(case: Case, alpha=0.0, skip=3) -> Result:
    """SDFT as released: the first `skip` tokens of a row are not there."""
    case = case._replace(mask=case.mask & (np.arange(case.mask.shape[1]) >= skip))
    loss, distill = empty(case), empty(case)
    for i, t in tokens(case):
        log_p, log_q = log_softmax(case.teacher[i, t]), log_softmax(case.student[i, t])
        distill[i, t] = float(case.shown[i])
        loss[i, t] = distill[i, t] * divergence(log_p, log_q, alpha)
    return Result(mean_of_rows(case, loss), empty(case), distill)


def rlrt(case: Case, lam=0.5, eps_w=1.0, clip_low=0.2, clip_high=0.28) -> Result:
    """RLRT as in CAST App. 8.4."""
    case = not_truncated(case)
    loss, adv = empty(case), empty(case)
    for i, t in tokens(case):
        adv[i, t] = A = group_advantage(case, i)
        if case.correct[i] and case.shown[i]:
            d = logp(case.old, case, i, t) - logp(case.teacher, case, i, t)
            w = min(max(np.exp(np.sign(A) * d), 1 - eps_w), 1 + eps_w)
            adv[i, t] = A * ((1 - lam) + lam * w)
        loss[i, t] = surrogate(case, i, t, adv[i, t], clip_low, clip_high)
    return Result(mean_of_tokens(case, loss), adv, empty(case))


def grpo_opsd(
    case: Case, coef=0.2, decay_steps=50, tau=0.05, clip_low=0.2, clip_high=0.28
) -> Result:
    """GRPO and OPSD added up, as CAST weighs them; updates count from 1."""
    case = not_truncated(case)
    a = coef * max(1 - (case.step + 1) / decay_steps, 0)
    return add_up(case, a, opsd(case, tau), grpo(case, clip_low, clip_high, kl_coef=0))


def grpo_opsd_hsd(case: Case, coef=0.5, beta=1e-3, clip_low=0.2, clip_high=0.2) -> Result:
    """GRPO and OPSD added up, as HSD weighs them and with HSD's penalty."""
    penalty = empty(case)
    for i, t in tokens(case):
        penalty[i, t] = beta * kl(case.student[i, t], case.reference[i, t])
    total = add_up(case, coef, opsd(case, np.inf), grpo(case, clip_low, clip_high, kl_coef=0))
    return total._replace(loss_t=total.loss_t + mean_of_rows(case, penalty))


def add_up(case: Case, a: float, distilled: Result, policy: Result) -> Result:
    """Both are means over rows."""
    return Result(policy.loss_t + a * distilled.loss_t, policy.adv, a * distilled.distill)


ORACLES: dict[str, Callable[..., Result]] = {
    "grpo": grpo,
    "rlsd": rlsd,
    "sdpg": sdpg,
    "cast": cast,
    "sc_grpo": sc_grpo,
    "hsd": hsd,
    "opsd": opsd,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "opd": opd,
    "opd_top_k": opd_top_k,
    "opd_sampled": opd_sampled,
    "sdpo": sdpo,
    "sdft": sdft,
    "rlrt": rlrt,
    "grpo_opsd": grpo_opsd,
    "grpo_opsd_hsd": grpo_opsd_hsd,
}


def gradient(oracle: Callable[[Case], Result], case: Case, h: float = 1e-5) -> np.ndarray:
    """Central differences of the loss with respect to `case.student`, f64[B, T, V].

    A row's terms depend on its own logits only, so all rows are moved at once.
    """
    case = case._replace(detached=case.student)
    out = np.zeros_like(case.student)
    for t, v in np.ndindex(out.shape[1:]):
        step = np.zeros(out.shape[1:])
        step[t, v] = h
        ahead, behind = (case._replace(student=case.student + s * step) for s in (1, -1))
        out[:, t, v] = (oracle(ahead).loss_t - oracle(behind).loss_t).sum(axis=1) / (2 * h)
    return out


def decoder_logits(params: dict, ids: list[int], config) -> np.ndarray:
    """float64 logits [N, num_tokens] of one unpadded sequence under a Qwen3 decoder.

    Args:
      params: the package's tree of arrays.
      config: the package's ModelConfig.
    """
    N, half = len(ids), config.head_dim // 2
    angle = np.outer(np.arange(N), config.rope_theta ** (-np.arange(half) / half))[:, None]
    embed = np.asarray(params["embed"], np.float64)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * scale

    def rotate(x):
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag], -1)

    x = embed[ids]
    for n in range(config.num_layers):
        layer = {name: np.asarray(w[n], np.float64) for name, w in params["layers"].items()}
        h = norm(x, layer["attn_norm"])
        q, k, v = (np.tensordot(h, layer[name], 1) for name in "qkv")
        q, k = rotate(norm(q, layer["q_norm"])), rotate(norm(k, layer["k_norm"]))
        for head in range(config.num_heads):
            shared = head // (config.num_heads // config.num_kv_heads)
            for i in range(N):
                scores = k[: i + 1, shared] @ q[i, head] / np.sqrt(config.head_dim)
                share = np.exp(log_softmax(scores))
                x[i] += share @ v[: i + 1, shared] @ layer["o"][head]
        h = norm(x, layer["mlp_norm"])
        gate = h @ layer["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["up"])) @ layer["down"]
    head = embed if config.tie_embeddings else np.asarray(params["head"], np.float64)
    out = norm(x, np.asarray(params["final_norm"], np.float64)) @ head.T
    return out[:, : config.num_tokens]


def response_logits(params: dict, prompt: list[int], response: list[int], config) -> np.ndarray:
    """float64 logits [len(response), num_tokens] that predict each token of a response."""
    logits = decoder_logits(params, [*prompt, *response], config)
    return logits[len(prompt) - 1 : -1]
