"""Slow, obvious oracles: Python loops and math, no torch operations but indexing. Written from the
formulas, not from the code.
"""

import cmath
import itertools
import math


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = sum(math.exp(x - top) for x in row)
    return [x - top - math.log(total) for x in row]


def cross_entropy(logits: list[list[float]], targets: list[int]) -> list[float]:
    return [-log_softmax(row)[y] for row, y in zip(logits, targets)]


def kl_divergence(teacher: list[list[float]], student: list[list[float]], tau: float,
                  shared: list[int]) -> list[float]:
    out = []
    for z, s in zip(teacher, student):
        p, q = (log_softmax([row[i] / tau for i in shared]) for row in (z, s))
        out.append(tau * tau * sum(math.exp(a) * (a - b) for a, b in zip(p, q)))
    return out


def topk_kl(teacher: list[list[float]], student: list[list[float]], k: int, tau: float
            ) -> list[float]:
    """KL over k + 1 classes: the teacher's k likeliest tokens, and all others as one."""
    out = []
    for z, s in zip(teacher, student):
        p, q = ([math.exp(x) for x in log_softmax([x / tau for x in row])] for row in (z, s))
        top = sorted(range(len(z)), key=lambda i: -z[i])[:k]
        rest = [i for i in range(len(z)) if i not in top]
        classes = [(p[i], q[i]) for i in top] + [(sum(p[i] for i in rest), sum(q[i] for i in rest))]
        out.append(tau * tau * sum(a * math.log(a / b) for a, b in classes if a > 0))
    return out


def safety_kl(student: list[list[float]], aligned: list[list[float]], tokens: list[int]
              ) -> list[float]:
    """KL over |S| + 1 classes: the tokens of S, and all others as one. Both are logits."""
    out = []
    for s, z in zip(student, aligned):
        q, p = ([math.exp(x) for x in log_softmax(row)] for row in (s, z))
        rest = [i for i in range(len(s)) if i not in tokens]
        classes = [(p[i], q[i]) for i in tokens]
        classes.append((sum(p[i] for i in rest), sum(q[i] for i in rest)))
        out.append(sum(a * math.log(a / b) for a, b in classes))
    return out


def pact_kl(student: list[list[float]], full: list[list[float]], post: list[list[float]],
            places: list[int], tokens: list[int], weights: list[float], tau: float) -> list[float]:
    """PACT's term, from its code."""
    def softmax(row: list[float]) -> list[float]:
        return [math.exp(x) for x in log_softmax(row)]

    def spread(row: list[float]) -> float:
        total, count = 0.0, 0
        for p in sorted(softmax(row), reverse=True):
            if total >= 0.9:
                break
            total, count = total + p, count + 1
        return count / len(row)

    out = []
    for s, f, o, t in zip(student, full, post, places):
        s = [s[i] for i in tokens]
        c = math.exp(-max(t - 8, 0) / 8) / (1 + math.exp(-2 * (spread(s) - spread(o))))
        mixed = softmax([((1 - c) * a + c * b) / tau for a, b in zip(f, o)])
        q = [w * p for w, p in zip(weights, mixed)]
        q = [x / sum(q) for x in q]
        log_s = log_softmax([x / tau for x in s])
        out.append(tau**2 * sum(a * (math.log(a) - b) for a, b in zip(q, log_s) if a > 0))
    return out


def gated_cross_entropy(logits: list[list[float]], targets: list[int], weights: list[float]
                        ) -> list[float]:
    return [w * -log_softmax(row)[y] for row, y, w in zip(logits, targets, weights)]


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """The two p at which |hits/n - p| = 1.96 standard errors of p, found by bisection."""
    z, observed = 1.959963984540054, hits / n

    def distance(p: float) -> float:
        return abs(observed - p) - z * math.sqrt(p * (1 - p) / n)

    def bisect(outside: float, inside: float) -> float:
        for _ in range(200):
            middle = (outside + inside) / 2
            outside, inside = (middle, inside) if distance(middle) > 0 else (outside, middle)
        return inside

    return bisect(0.0, observed) if hits else 0.0, bisect(1.0, observed) if hits < n else 1.0


def overhead_reduction(tokens: list[float], refusal: list[float], deliberative: list[float],
                       groups: list[int], t: float) -> list[float]:
    """[value, low, high], group by group."""
    G = max(groups) + 1
    x, y = [0.0] * G, [0.0] * G
    for a, b, c, g in zip(tokens, refusal, deliberative, groups):
        x[g], y[g] = x[g] + a - b, y[g] + c - b
    ratio = sum(x) / sum(y)
    variance = G / (G - 1) * sum((x[g] - ratio * y[g]) ** 2 for g in range(G)) / sum(y) ** 2
    return [1 - ratio, 1 - ratio - t * math.sqrt(variance), 1 - ratio + t * math.sqrt(variance)]


def sign_flip_test(differences: list[float], groups: list[str]) -> float:
    """All 2^G flips, one by one."""
    names, n, far = sorted(set(groups)), 0, 0
    seen = abs(sum(differences))
    for signs in itertools.product((1, -1), repeat=len(names)):
        total = sum(signs[names.index(g)] * d for d, g in zip(differences, groups))
        n, far = n + 1, far + (abs(total) > seen - 1e-6)
    return far / n


def LoRALinear_forward(W: list[list[float]], A: list[list[float]], B: list[list[float]],
                       b: list[float], scale: float, x: list[float]) -> list[float]:
    hidden = [sum(a * v for a, v in zip(row, x)) for row in A]
    return [sum(w * v for w, v in zip(W[i], x)) + b[i]
            + scale * sum(c * h for c, h in zip(B[i], hidden)) for i in range(len(W))]


def RMSNorm_forward(x: list[float], weight: list[float], eps: float) -> list[float]:
    size = math.sqrt(sum(v * v for v in x) / len(x) + eps)
    return [w * v / size for w, v in zip(weight, x)]


def rotate(x: list[list[list[float]]], positions: list[int], theta: float
           ) -> list[list[list[float]]]:
    out = []
    for heads, position in zip(x, positions):
        out.append([])
        for head in heads:
            d = len(head)
            turned = [complex(head[i], head[i + d // 2])
                      * cmath.exp(1j * position * theta ** (-2 * i / d)) for i in range(d // 2)]
            out[-1].append([z.real for z in turned] + [z.imag for z in turned])
    return out


def undo(family: str, fragment: str) -> str:
    """Read a hidden verb of the toy world back from its fragment."""
    words = fragment.split()
    letters = [w for w in words if len(w) == 1]
    if family == "spell":
        return "".join(letters)
    if family == "back":
        return "".join(reversed(letters))
    if family == "inter":
        return "".join(letters[1::2])  # letters[0] is the x of "drop x"
    if family == "turnx":
        return "".join(reversed(letters[1::2]))
    if family == "swap":
        cut = words.index("behind")
        return "".join(words[cut + 1 :] + words[1:cut])
    cut = words.index("but")  # decoy: the part without "not"
    first, second = words[1:cut], words[cut + 1 :]
    return "".join(second if first[0] == "not" else first)
