"""The formulas as naive float64 loops, to hold beside the fast paths."""

import numpy as np


def encode(x, W_enc, b_enc):
    batch, d_sae = len(x), len(b_enc)
    pre = np.zeros((batch, d_sae))
    for i in range(batch):
        for j in range(d_sae):
            pre[i, j] = (
                sum(x[i, m, k] * W_enc[m, k, j] for m in range(x.shape[1]) for k in range(x.shape[2]))
                + b_enc[j]
            )
    return pre


def decode(acts, W_dec, b_dec):
    out = np.zeros((len(acts), *b_dec.shape))
    for i in range(len(acts)):
        out[i] = b_dec
        for j in range(acts.shape[1]):
            out[i] += acts[i, j] * W_dec[j]
    return out


def keep_largest(pre, norms, count):
    """The ``count`` largest positive scores ``relu(pre) · norms`` of the whole matrix; of equal ones the first."""
    scores = [
        (-pre[i, j] * norms[j], i, j)
        for i in range(pre.shape[0])
        for j in range(pre.shape[1])
        if pre[i, j] * norms[j] > 0
    ]
    acts = np.zeros_like(pre)
    for _, i, j in sorted(scores)[:count]:
        acts[i, j] = pre[i, j]
    return acts


def keep_largest_per_row(pre, norms, k):
    return np.concatenate([keep_largest(pre[i : i + 1], norms, k) for i in range(len(pre))])


def decoder_norms(W_dec):
    return np.array([[np.sqrt(sum(v * v for v in row)) for row in rows] for rows in W_dec])


def mse(target, estimate):
    return sum(((target[i] - estimate[i]) ** 2).sum() for i in range(len(target))) / len(target)


def l2_norm(target, estimate):
    norms = [
        np.sqrt(((target[i, m] - estimate[i, m]) ** 2).sum() + 1e-12)
        for i in range(len(target))
        for m in range(target.shape[1])
    ]
    return sum(norms) / len(norms)


def l1(acts, W_dec, norm):
    norms = decoder_norms(W_dec)
    price = norms.sum(1) if norm == "sum" else np.sqrt((norms**2).sum(1))
    return sum(acts[i, j] * price[j] for i in range(len(acts)) for j in range(acts.shape[1])) / len(acts)


def auxk(target, estimate, pre, W_dec, dead, k_aux, relative):
    norms = decoder_norms(W_dec).sum(1)
    total, residuals = 0.0, target - estimate
    for i in range(len(target)):
        best = sorted(dead, key=lambda j: -max(pre[i, j], 0) * norms[j])[:k_aux]
        rhat = sum(max(pre[i, j], 0) * W_dec[j] for j in best)
        total += ((residuals[i] - rhat) ** 2).sum()
    if relative:
        return total / ((residuals - residuals.mean(0)) ** 2).sum()
    return total / len(target)


def threshold_after(smallest_kept, decay):
    threshold = smallest_kept[0]
    for value in smallest_kept[1:]:
        threshold = decay * threshold + (1 - decay) * value
    return threshold


def fraction_of_variance_explained(x, recon, model):
    def variance(y):
        return sum(y[:, k].var() for k in range(y.shape[1]))

    return 1 - variance(x[:, model] - recon[:, model]) / variance(x[:, model])
