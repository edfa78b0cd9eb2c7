"""Slow, plain, float64 answers to compare with: one example at a time, every definition written out. Nothing of ours.

A *row* is what the model is called with for one example (its keyword inputs, leading dimension 1) and its labels.
"""

import numpy as np
import torch


def cut(batch, index):
    """Row `index` of a dict of tensors, as a batch of one."""
    return {key: value[index : index + 1] for key, value in batch.items()}


def size(batch):
    return next(iter(batch.values())).shape[0]


def trainable(model):
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def gradient(model, scalar):
    """Gradient of a scalar with respect to every trainable parameter; zeros where it does not depend on it."""
    parameters = trainable(model)
    found = torch.autograd.grad(scalar, list(parameters.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(value) if g is None else g
        for (name, value), g in zip(parameters.items(), found, strict=True)
    }


def per_example_gradients(model, batch, loss):
    """A list with one dict of gradients per example; loss(model, row) -> scalar."""
    model.eval()
    return [gradient(model, loss(model, cut(batch, n))) for n in range(size(batch))]


def mean_of_squares(gradients):
    """(1/n) sum_n g_n^2."""
    return {name: sum(g[name] ** 2 for g in gradients) / len(gradients) for name in gradients[0]}


def sum_of(gradients):
    return {name: sum(g[name] for g in gradients) for name in gradients[0]}


def standard_error_of_squares(gradients):
    """Usual standard error of the mean of g_n^2 over examples."""
    n = len(gradients)
    stacked = {name: torch.stack([g[name] ** 2 for g in gradients]) for name in gradients[0]}
    return {name: value.std(0) / n**0.5 for name, value in stacked.items()}


def expected_squares(model, batch, logits, covariance):
    """(1/n) sum_n E_y[g_n^2] with one gradient per class or output: sum_ij J_i Lambda_ij J_j, coordinate by coordinate.

    logits(model, row) -> (K,); covariance(logits) -> (K, K), of d(-log p)/d logits under the model's own labels.
    """
    model.eval()
    total = None
    for n in range(size(batch)):
        values = logits(model, cut(batch, n))
        lam = covariance(values.detach())
        jacobian = [gradient(model, value) for value in values]
        square = {
            name: sum(
                lam[i, j] * jacobian[i][name] * jacobian[j][name]
                for i in range(len(values))
                for j in range(len(values))
            )
            for name in jacobian[0]
        }
        total = square if total is None else {name: total[name] + square[name] for name in total}
    return {name: value / size(batch) for name, value in total.items()}


def softmax_covariance(logits):
    """diag(p) - p p'."""
    p = torch.softmax(logits, 0)
    return torch.diag(p) - torch.outer(p, p)


def relative_l1(found, expected):
    """sum |found - expected| / sum |expected| over all tensors."""
    wrong = sum((found[name].double() - expected[name].double()).abs().sum() for name in expected)
    return float(wrong / sum(value.double().abs().sum() for value in expected.values()))


def tsv_m(theta0, taus, scale=1.0):
    """TSV-M of one matrix, one rank-one term at a time; polar factors by (X X')^(-1/2) X. Vectors: the mean."""
    if theta0.dim() < 2:
        return theta0 + scale * sum(taus) / len(taus)
    flat = [tau.reshape(len(theta0), -1) for tau in taus]
    rank = min(flat[0].shape) // len(taus)
    left, right, sizes = [], [], []
    for tau in flat:
        for kept, found in zip((left, right, sizes), largest(tau, rank), strict=True):
            kept += found
    u, v = (orthonormal(torch.stack(vectors, 1)) for vectors in (left, right))
    merged = sum(size * torch.outer(u[:, i], v[:, i]) for i, size in enumerate(sizes))
    return theta0 + scale * merged.reshape(theta0.shape)


def largest(matrix, count):
    """The first singular triplets, each as a list: left vectors, right vectors, values."""
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)  # ascending
    sizes = [values[-i].sqrt() for i in range(1, count + 1)]
    right = [vectors[:, -i] for i in range(1, count + 1)]
    return [matrix @ v / size for v, size in zip(right, sizes, strict=True)], right, sizes


def orthonormal(x):
    """X (X'X)^(-1/2), the nearest matrix of orthonormal columns."""
    values, vectors = torch.linalg.eigh(x.T @ x)
    return x @ vectors @ torch.diag(values**-0.5) @ vectors.T


def iso_c(theta0, taus, scale=1.0):
    """Iso-C of one matrix of full rank: the mean singular value times the orthonormal factor. Vectors: the mean."""
    if theta0.dim() < 2:
        return theta0 + scale * sum(taus) / len(taus)
    total = sum(taus).reshape(len(theta0), -1)
    wide = total.shape[1] > total.shape[0]
    total = total.T if wide else total
    size = torch.linalg.eigvalsh(total.T @ total).clamp(min=0).sqrt().mean()
    merged = size * orthonormal(total)
    return theta0 + scale * (merged.T if wide else merged).reshape(theta0.shape)


def iso_cts(theta0, taus, scale=1.0, common=0.8):
    """Iso-CTS of one matrix of full rank: common directions, and of every task those outside. Vectors: the mean."""
    if theta0.dim() < 2:
        return theta0 + scale * sum(taus) / len(taus)
    flat = [tau.reshape(len(theta0), -1) for tau in taus]
    rank = min(flat[0].shape)
    own = round((rank - int(common * rank)) / len(taus))
    left, right, sizes = largest(sum(flat), rank - own * len(taus))
    inside = torch.stack(left, 1)
    for tau in flat if own else ():
        outside = (torch.eye(len(theta0), dtype=tau.dtype) - inside @ inside.T) @ tau
        for kept, found in zip((left, right, sizes), largest(outside, own), strict=True):
            kept += found
    merged = orthonormal(torch.stack(left, 1)) @ orthonormal(torch.stack(right, 1)).T
    return theta0 + scale * sum(sizes) / len(sizes) * merged.reshape(theta0.shape)


def svc(update, taus, least=None):
    """Singular value calibration of a matrix of full rank, one direction at a time."""
    flat = update.reshape(len(update), -1)
    result = torch.zeros_like(flat)
    for u, v, size in zip(*largest(flat, min(flat.shape)), strict=True):
        responses = [u @ tau.reshape(len(update), -1) for tau in taus]
        told = [float((u @ flat) @ one / (one @ one)) for one in responses]
        result += len(taus) / sum(max(least or 1 / len(taus), one) for one in told) * size * torch.outer(u, v)
    return result.reshape(update.shape)


def sce(theta0, taus, select_topk=1.0):
    """SCE, entry by entry."""
    entries = list(zip(*(tau.flatten().tolist() for tau in taus), strict=True))
    means = [sum(values) / len(values) for values in entries]
    spread = [sum((v - m) ** 2 for v in values) for values, m in zip(entries, means, strict=True)]
    if select_topk < 1:
        kept = int(select_topk * sum(s != 0 for s in spread))
        chosen = sorted(range(len(spread)), key=lambda i: -spread[i])[:kept]
        entries = [values if i in chosen else [0.0] * len(taus) for i, values in enumerate(entries)]
    sizes = [sum(v * v for v in column) / len(entries) for column in zip(*entries, strict=True)]
    merged = []
    for values in entries:
        sign = 1 if sum(values) >= 0 else -1
        agree = [(w, v) for w, v in zip(sizes, values, strict=True) if v * sign > 0]
        merged.append(sum(w * v for w, v in agree) / sum(w for w, _ in agree) if agree else 0.0)
    return theta0 + torch.tensor(merged, dtype=torch.float64).reshape(theta0.shape)


def multislerp(xs, weights):
    """The tangent-space way: project the unit vectors at their mean direction, average, and go back to the sphere."""
    weights = [w / sum(weights) for w in weights]
    unit = [x.flatten() / x.norm() for x in xs]
    mean = sum(w * u for w, u in zip(weights, unit, strict=True))
    mean = mean / mean.norm()
    tangent = sum(w * (u - (u @ mean) * mean) for w, u in zip(weights, unit, strict=True))
    angle = tangent.norm()
    direction = mean * angle.cos() + (tangent * angle.sin() / angle if angle > 1e-12 else 0)
    return (direction * sum(w * x.norm() for w, x in zip(weights, xs, strict=True))).reshape(xs[0].shape)


def nearswap(theta0, theta, t):
    """Entry by entry."""
    moved = [
        a if a == b else (1 - min(1, t / abs(a - b))) * a + min(1, t / abs(a - b)) * b
        for a, b in zip(theta0.flatten().tolist(), theta.flatten().tolist(), strict=True)
    ]
    return torch.tensor(moved, dtype=torch.float64).reshape(theta0.shape)


def arcee_fusion(theta0, theta):
    """Row by row and entry by entry."""
    rows, importance = theta0.reshape(-1, theta0.shape[-1]) if theta0.dim() else theta0.reshape(1, 1), []
    for one, two in zip(rows, theta.reshape(rows.shape), strict=True):
        p, q = torch.softmax(two, 0) + 1e-8, torch.softmax(one, 0) + 1e-8
        divergence = float((p * (p / q).log()).sum())
        importance += [abs(float(b - a)) * divergence for a, b in zip(one, two, strict=True)]
    ordered = sorted(importance)
    first, median, third = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    least = median + 1.5 * (third - first)
    taken = torch.tensor([value >= least for value in importance]).reshape(theta0.shape)
    return torch.where(taken, theta, theta0)


def one_system(beliefs, b=None):
    """x of (sum_k w_k H_k) x = sum_k w_k H_k c_k - b, with dense matrices in numpy; beliefs: (w, H (n, n), c (n,)). Returns (n,)."""
    left = sum(w * h for w, h, _ in beliefs)
    right = sum(w * h @ c for w, h, c in beliefs) - (0 if b is None else b)
    return np.linalg.solve(left, right)


def family(
    method, theta0, taus, alphas, h0, hs, gs=None, anchor=None, lam=0.0, delta0=0.0, anchor_weight=0.0
):
    """theta of a rule of the family from dense curvatures of everything flattened by rows; all arrays are numpy's, in float64."""
    eye = np.eye(len(theta0))
    total = sum(a * t for a, t in zip(alphas, taus, strict=True))
    tasks = [(a, h, t) for a, h, t in zip(alphas, hs, taus, strict=True)]
    if method == "task_arithmetic":
        return theta0 + total
    if method in ("fisher", "mats"):
        return theta0 + one_system([*tasks, (1, delta0 * eye, total)])
    if method in ("gradient_matching", "kronecker"):
        return theta0 + one_system([*tasks, (1, h0, total)])
    if method == "fisher_base":  # written for theta itself, as published
        return np.linalg.solve(
            h0 + sum(a * h for a, h, _ in tasks), h0 @ theta0 + sum(a * h @ t for a, h, t in tasks)
        )
    if method == "measured":
        return theta0 + one_system(
            [*tasks, (1, h0, 0 * theta0)], sum(a * g for a, g in zip(alphas, gs, strict=True))
        )
    if method == "removal":
        left = h0 - sum(a * h for a, h, _ in tasks)
        return theta0 - np.linalg.solve(left, sum(a * (h0 + h) @ t for a, h, t in tasks))
    if method == "guarded":
        return theta0 - lam * np.linalg.solve(h0 + lam * eye, total)
    if method == "signed":
        plus = [one for one in tasks if one[0] > 0]
        centre = sum((a * t for a, _, t in plus), 0 * theta0)
        return theta0 + one_system([*plus, (1, h0, centre), (1, lam * eye, total)])
    if method == "ascent":
        return theta0 + np.linalg.solve(h0 + lam * eye, sum(a * g for a, g in zip(alphas, gs, strict=True)))
    if method == "anchored":
        return theta0 + one_system([*tasks, (1, h0, total), (anchor_weight, eye, anchor - theta0)])
    raise KeyError(method)


def by_task_vectors(method, theta0, taus, alphas, ridge=1e-6, prior=0.01):
    """actmat, wudi and ace of one matrix (out, in), in numpy: every row solves the same (in, in) system."""
    width = theta0.shape[1]
    left, right = np.zeros((width, width)), np.zeros_like(theta0)
    for alpha, tau in zip(alphas, taus, strict=True):
        rows = tau - tau.mean(0) if method == "ace" else tau
        a = sum(np.outer(row, row) for row in rows)
        weight = {"actmat": 1.0, "wudi": 1 / (tau**2).sum(), "ace": 1 / np.trace(a)}[method]
        a = alpha * weight * (a + ridge * np.trace(a) / width * np.eye(width))
        left, right = left + a, right + tau @ a
    if method == "ace":
        share = prior / width
        left, right = (
            left + sum(alphas) * share * np.eye(width),
            right + share * sum(a * t for a, t in zip(alphas, taus, strict=True)),
        )
    return theta0 + np.linalg.solve(left, right.T).T


def tsv_basis(theta0, taus, alphas, h0, hs):
    """Eq. 12 for Z in theta0 + U Z V', numpy: dense curvatures on rows of (out, in), singular vectors by numpy, polar factors too."""
    kept, found = min(theta0.shape) // len(taus), [np.linalg.svd(tau, full_matrices=False) for tau in taus]
    u, v = (
        np.concatenate(parts, 1)
        for parts in zip(*((u[:, :kept], vt[:kept].T) for u, _, vt in found), strict=True)
    )
    u, v = (w @ r for w, _, r in (np.linalg.svd(x, full_matrices=False) for x in (u, v)))
    inside = np.kron(u, v)  # Z by rows -> U Z V' by rows
    z = [np.zeros((kept * len(taus),) * 2) for _ in taus]
    for t, (_, s, _) in enumerate(found):
        for i in range(kept):
            z[t][t * kept + i, t * kept + i] = s[i]
    low = [inside.T @ h @ inside for h in (h0, *hs)]
    total = sum(a * one.ravel() for a, one in zip(alphas, z, strict=True))
    beliefs = [(a, h, one.ravel()) for a, h, one in zip(alphas, low[1:], z, strict=True)]
    return theta0 + u @ one_system([*beliefs, (1, low[0], total)]).reshape(z[0].shape) @ v.T
