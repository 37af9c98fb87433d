"""Small files in the layouts of other tools, each with the source's own formula written out naively in float64.

A writer returns a :class:`Written`: the folder, and ``formula(x)`` with x [batch model d_in] raw and base first, giving the codes
and the reconstruction that the source's library would.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

M, D, F = 2, 5, 12


@dataclass
class Written:
    path: Path
    formula: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    #: What load() must be told.
    given: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def numbers(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def codes(x, W_enc, b_enc):
    """relu(Σ_m x_m W_enc[m] + b_enc), one token and one latent after the other; W_enc [model d_in d_sae]."""
    acts = torch.zeros(len(x), len(b_enc), dtype=torch.float64)
    for t in range(len(x)):
        for j in range(len(b_enc)):
            acts[t, j] = max(
                0.0, sum(float(x[t, m] @ W_enc[m, :, j]) for m in range(len(W_enc))) + float(b_enc[j])
            )
    return acts


def write(folder, name, tensors, config=None, config_name="config.json"):
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".safetensors"):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    else:
        torch.save(tensors, folder / name)
    if config is not None:
        (folder / config_name).write_text(json.dumps(config))


# -- dictionary_learning


def dictionary_learning(
    folder, *, batch_topk=True, norm="CROSSCODER", normaliser=True, name="model.safetensors", buffers=True, prefix="", inputs=None,
    dtype=torch.float64, config=None, dead=(),
):  # fmt: skip
    """§3.1: encoder.weight (M, d, F), decoder.weight (M, F, d), and the buffers that came with the years."""
    n_in = M if inputs is None else len(inputs)
    E, b, W, c, mean, std = numbers((n_in, D, F), (F,), (M, F, D), (M, D), (M, D), (M, D))
    W[:, list(dead)] = 0
    std, rms, threshold = std.abs() + 0.3, 2.0, 2.5
    s = rms / (std.square().sum(-1) + 1e-8).sqrt()
    tensors = {"encoder.weight": E, "encoder.bias": b, "decoder.weight": W, "decoder.bias": c}
    if batch_topk and buffers:
        stored = [2.5, 0.8] if norm == "DECOUPLED" else threshold
        tensors |= {"k": torch.tensor(3), "threshold": torch.tensor(stored, dtype=torch.float64)}
        tensors["code_normalization_id"] = torch.tensor(
            {"CROSSCODER": 1, "SAE": 2, "MIXED": 3, "NONE": 4, "DECOUPLED": 5}[norm]
        )
    if normaliser:
        tensors |= {
            "activation_mean": mean,
            "activation_std": std,
            "activation_global_scale": s,
            "target_rms": torch.tensor(rms),
        }
    else:
        mean, s = torch.zeros(M, D, dtype=torch.float64), torch.ones(M, dtype=torch.float64)
    settings = {
        "activation_dim": D,
        "dict_size": F,
        "num_layers": M,
        "code_normalization": norm,
        "latent_processor": None,
    }
    settings |= {"k": 100} if batch_topk else {}
    settings |= {"encoder_layers": inputs} if inputs is not None else {}
    write(
        folder,
        name,
        {prefix + key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()},
        settings | (config or {}),
    )

    def formula(x):
        y = (x - mean) * s[:, None]
        f = codes(y if inputs is None else y[:, inputs], E, b)
        n = W.norm(dim=-1)  # [model d_sae]
        if norm == "DECOUPLED" and batch_topk:
            each = [f * (f * n[m] > (2.5, 0.8)[m]) for m in range(M)]
            recon = torch.stack([each[m] @ W[m] + c[m] for m in range(M)], 1)
            return torch.maximum(*each), recon / s[:, None] + mean
        w = {
            "CROSSCODER": n.sum(0), "SAE": n.square().sum(0).sqrt(), "MIXED": n.square().sum(0).sqrt() + 0.1 * n.sum(0),
            "NONE": torch.ones(F, dtype=torch.float64), "DECOUPLED": n.sum(0),
        }[norm]  # fmt: skip
        f = f * (f * w > threshold) if batch_topk else f
        recon = torch.stack([f @ W[m] + c[m] for m in range(M)], 1)
        return f, recon / s[:, None] + mean

    return Written(folder, formula, tensors=tensors)


# -- the first replication and its relatives


def kissane(folder, *, dec_order="FMD", name="cc_weights.pt", config=None):
    """§3.2: W_dec is (F, 2, d); the scales are not in the files."""
    E, b, W, c = numbers((M, D, F), (F,), (F, M, D), (M, D), seed=1)
    scale = torch.tensor([0.27, 0.31], dtype=torch.float64)
    stored = {
        "W_enc": E,
        "W_dec": W if dec_order == "FMD" else W.permute(1, 0, 2).contiguous(),
        "b_enc": b,
        "b_dec": c,
    }
    settings = {
        "hook_point": "blocks.14.hook_resid_pre",
        "model_name": "gemma-2-2b",
        "dict_size": F,
        "d_in": D,
        "l1_coeff": 2,
    }
    write(folder, name, stored, settings | (config or {}), "cfg.json")

    def formula(x):
        f = codes(x * scale[:, None], E, b)
        return f, torch.stack([f @ W[:, m] + c[m] for m in range(M)], 1) / scale[:, None]

    return Written(folder, formula, {"scale": (0.27, 0.31)}, stored)


def papergrade(folder, *, thresholds=True, scales=True):
    """§3.3: b_dec is subtracted; one threshold a latent on the raw pre-activation, one of them never reached."""
    E, b, W, c, t = numbers((M, D, F), (F,), (F, M, D), (M, D), (F,), seed=2)
    scale, t = torch.tensor([0.4, 0.6], dtype=torch.float64), t.abs() * 0.5
    t[3] = float("inf")
    stored = {"W_enc": E, "W_dec": W, "b_enc": b, "b_dec": c} | ({"threshold": t} if thresholds else {})
    settings = {
        "layer": 13,
        "base_model": "google/gemma-2-2b",
        "chat_model": "google/gemma-2-2b-it",
        "k_batchtopk": 100,
    }
    settings |= {"norm_scale_A": 0.4, "norm_scale_B": 0.6} if scales else {}
    settings["val_metrics"] = {"l0": 4.0}
    write(folder, "crosscoder_final.safetensors", stored, settings, "cfg.json")

    def formula(x):
        y = x * scale[:, None]
        pre = torch.zeros(len(x), F, dtype=torch.float64)
        for i in range(len(x)):
            for j in range(F):
                pre[i, j] = sum((y[i, m] - c[m]) @ E[m, :, j] for m in range(M)) + b[j]
        f = pre.relu() * (pre > t)
        return f, torch.stack([f @ W[:, m] + c[m] for m in range(M)], 1) / scale[:, None]

    return Written(folder, formula, {}, stored)


def antebe(folder, *, k=3, applied=True):
    """§3.4: model A is the TUNED one; top-k of each token without norms; z-scored with lost statistics."""
    E, b, W, c, mean, std = numbers((2, D, F), (F,), (F, 2, D), (2, D), (2, D), (2, D), seed=3)
    std, n_a, n_b = std.abs() + 0.5, 2, 3
    enc_mask, dec_mask = torch.ones(2, F, dtype=torch.float64), torch.ones(F, 2, dtype=torch.float64)
    enc_mask[1, :n_a], enc_mask[0, n_a : n_a + n_b] = 0, 0
    dec_mask[:n_a, 1], dec_mask[n_a : n_a + n_b, 0] = 0, 0
    if applied:
        E, W = E * enc_mask[:, None], W * dec_mask[..., None]
    stored = {"W_enc": E, "b_enc": b, "W_dec": W, "b_dec": c, "enc_mask": enc_mask, "dec_mask": dec_mask}
    write(folder, "model.pt", stored, {"activation_dim": D, "dict_size": F, "k": k, "n_a": n_a, "n_b": n_b})
    (folder / "dfc.py").write_text(f"from pathlib import Path\nPath({str(folder / 'canary')!r}).touch()\n")

    def formula(x):  # x is base first; theirs is tuned first
        y = (x.flip(1) - mean) / std
        f = codes(y, E, b)
        for i in range(len(f)):
            f[i, f[i].argsort(descending=True)[k:]] = 0
        recon = torch.stack([f @ W[:, m] + c[m] for m in range(2)], 1) * std + mean
        return f, recon.flip(1)

    return Written(folder, formula, {"mean": mean.flip(0), "scale": 1 / std.flip(0)}, stored)


def two_widths(folder, *, widths=(D, D - 2)):
    """§3.9: a weight for each model, of its own width."""
    found = {}
    for m, d in zip("AB", widths, strict=True):
        found[f"W_enc_{m}"], found[f"W_dec_{m}"], found[f"b_dec_{m}"] = numbers(
            (d, F), (F, d), (d,), seed=ord(m)
        )
    found["b_enc"] = numbers((F,), seed=9)[0]
    write(folder, "cc_weights.pt", found, {"model_name_A": "a"}, "cfg.json")

    def formula(x):
        parts = {m: x[:, i, :d] * 0.5 for i, (m, d) in enumerate(zip("AB", widths, strict=True))}
        f = (sum(parts[m] @ found[f"W_enc_{m}"] for m in "AB") + found["b_enc"]).relu()
        recon = torch.zeros(len(x), 2, max(widths), dtype=torch.float64)
        for i, (m, d) in enumerate(zip("AB", widths, strict=True)):
            recon[:, i, :d] = (f @ found[f"W_dec_{m}"] + found[f"b_dec_{m}"]) / 0.5
        return f, recon

    return Written(folder, formula, {"scale": 0.5}, found)


# -- crosscode, Llamascopium, OPD


def crosscode(folder, *, kind="jumprelu", models=M, points=1, folded=True, biases=True):
    """§3.5: [models, points, ...]; the saved weights read raw activations."""
    E, b, W, c, log_t = numbers(
        (models, points, D, F), (F,), (F, models, points, D), (models, points, D), (F,), seed=4
    )
    scales = torch.rand(models, points, dtype=torch.float64) + 0.5
    stored = {
        "_W_enc_XiDiL": E, "_W_dec_LXoDo": W, "is_folded": torch.tensor(folded),
        "folded_scaling_factors_in_Xi": scales, "folded_scaling_factors_out_Xo": scales,
    }  # fmt: skip
    stored |= {"b_enc_L": b, "_b_dec_XoDo": c} if biases else {}
    stored |= {"activation_fn.log_threshold_L": log_t - 1} if kind == "jumprelu" else {}
    names = {
        "jumprelu": ("AnthropicSTEJumpReLUActivation", "{size: 12, bandwidth: 2.0, log_threshold_init: 0.1}"),
        "relu": ("ReLUActivation", "{}"),
        "topk": ("TopkActivation", "{k: 4}"), "batchtopk": ("BatchTopkActivation", "{k_per_example: 4}"),
        "groupmax": ("GroupMaxActivation", "{k_groups: 4, latents_size: 12}"),
    }  # fmt: skip
    write(folder, "model.pt", stored)
    flag = str(biases).lower()
    (folder / "model_cfg.yaml").write_text(
        f"n_models: {models}\nn_hookpoints: {points}\nd_model: {D}\nn_latents: {F}\n"
        f"use_encoder_bias: {flag}\nuse_decoder_bias: {flag}\n"
        f"dtype: float64\nactivation_fn:\n  classname: {names[kind][0]}\n  cfg: {names[kind][1]}\n"
    )
    (folder / "experiment_config.yaml").write_text("seed: 0\ntrain: {lr: 1.0e-3}\n")

    def formula(x):
        n = models * points
        z = x.reshape(len(x), models, points, D)
        pre = torch.einsum("bmpd,mpdl->bl", z, E) + (b if biases else 0)
        if kind == "jumprelu":
            f = pre * (pre > (log_t - 1).exp())
        elif kind == "relu":
            f = pre.relu()
        elif kind == "batchtopk":
            f = pre * (pre > 1.5)
        else:
            f = torch.zeros_like(pre)
            for i in range(len(f)):
                if kind == "topk":
                    kept = pre[i].argsort(descending=True)[:4]
                else:
                    kept = torch.tensor([3 * g + int(pre[i, 3 * g : 3 * g + 3].argmax()) for g in range(4)])
                f[i, kept] = pre[i, kept].relu()
        recon = torch.einsum("bl,lmpd->bmpd", f, W) + (c if biases else 0)
        return f, recon.reshape(len(x), n, D)

    return Written(folder, formula, {"threshold": 1.5} if kind == "batchtopk" else {}, stored)


def llamascopium(
    folder, *, act="relu", how="dataset-wise", same_norms=False, padded=0, name="sae_weights.safetensors"
):
    """§3.6: heads; the gate of each head is weighed by that head's decoder norm; the last one's last dimensions may be padding."""
    E, b, W, c, log_t = numbers((M, D, F), (M, F), (M, F, D), (M, D), (F,), seed=5)
    for tensor in (E.mT, W, c):
        tensor[-1, ..., D - padded :] = 0
    if same_norms:
        W = W / W.norm(dim=-1, keepdim=True) * torch.linspace(0.5, 2, F, dtype=torch.float64)[:, None]
    norms, hooks = torch.tensor([3.0, 4.0], dtype=torch.float64), ["base.13", "tuned.13"]
    stored = {"W_E": E, "b_E": b, "W_D": W, "b_D": c} | {
        f"dataset_average_activation_norm.{h}": n for h, n in zip(hooks, norms, strict=True)
    }
    stored |= {"activation_function.log_jumprelu_threshold": log_t} if act == "jumprelu" else {}
    config = {
        "sae_type": "crosscoder",
        "hook_points": hooks,
        "d_model": D,
        "expansion_factor": 2.4,
        "act_fn": act,
        "top_k": 4,
    }
    held = stored if name.endswith("safetensors") else {"sae": stored}
    write(folder, name, held, config | {"norm_activation": how})
    scale = D**0.5 / norms if how == "dataset-wise" else torch.ones(2, dtype=torch.float64)

    def formula(x):
        y = x * scale[:, None]
        pre = torch.einsum("bhd,hdf->bf", y, E) + b.sum(0)
        recon, acts = [], []
        for h in range(M):
            n = W[h].norm(dim=-1)
            weighed = pre * n
            if act == "jumprelu":
                weighed = weighed * (weighed > log_t.exp())
            elif act == "topk":
                for i in range(len(weighed)):
                    weighed[i, weighed[i].argsort(descending=True)[4:]] = 0
            f = weighed.relu() / n
            acts.append(f)
            recon.append((f @ W[h] + c[h]) / scale[h])
        assert (act == "relu" or same_norms) == torch.allclose(acts[0], acts[1])
        return torch.maximum(*acts), torch.stack(recon, 1)

    return Written(folder, formula, {}, stored)


def heterogeneous(folder, *, widths=(5, 3, 4), normaliser=True, threshold=1.5):
    """§3.7: nn.Linear layouts, a width for each model."""
    n = len(widths)
    stored = {
        "encoder.bias": numbers((F,), seed=20)[0],
        "activation_dims_tensor": torch.tensor(widths),
        "k": torch.tensor(5),
    }
    stored |= {
        "code_normalization_id": torch.tensor(1),
        "threshold": torch.tensor(threshold),
        "normalizer.target_rms": torch.tensor(1.0),
    }
    for i, d in enumerate(widths):
        P, Q, c, mean, std = numbers((F, d), (d, F), (d,), (d,), (d,), seed=21 + i)
        stored |= {
            f"encoder.projections.{i}.weight": P,
            f"decoder.projections.{i}.weight": Q,
            f"decoder.projections.{i}.bias": c,
        }
        scale = 1.0 / std.square().sum().sqrt()
        nan = torch.full((d,), float("nan"), dtype=torch.float64)
        stored |= {f"normalizer.mean_{i}": mean, f"normalizer.std_{i}": std, f"normalizer.scale_{i}": scale} if normaliser else {
            f"normalizer.mean_{i}": nan, f"normalizer.std_{i}": nan, f"normalizer.scale_{i}": torch.tensor(1.0)
        }  # fmt: skip
    whole = {
        "format_version": 1,
        "model_state_dict": stored,
        "optimizer_state_dict": {"state": {0: {"step": 3}}},
        "step": 7,
    }
    write(folder, "model_final.pt", whole)

    def formula(x):
        y = []
        for i, d in enumerate(widths):
            part = x[:, i, :d]
            y.append(
                (part - stored[f"normalizer.mean_{i}"]) * stored[f"normalizer.scale_{i}"]
                if normaliser
                else part
            )
        f = (
            sum(part @ stored[f"encoder.projections.{i}.weight"].T for i, part in enumerate(y))
            + stored["encoder.bias"]
        ).relu()
        w = sum(stored[f"decoder.projections.{i}.weight"].norm(dim=0) for i in range(n))
        f = f * (f * w > threshold)
        recon = torch.zeros(len(x), n, max(widths), dtype=torch.float64)
        for i, d in enumerate(widths):
            part = f @ stored[f"decoder.projections.{i}.weight"].T + stored[f"decoder.projections.{i}.bias"]
            recon[:, i, :d] = (
                part / stored[f"normalizer.scale_{i}"] + stored[f"normalizer.mean_{i}"]
                if normaliser
                else part
            )
        return f, recon

    return Written(folder, formula, {}, stored)


# -- SAE-Lens layers


def sae_lens_layers(folder, *, subtract=True, act="relu", normalise="none", layers=3):
    """§3.8, the pull request: [layer d_in d_sae], the names of the layers in cfg.json."""
    E, b, W, c = numbers((layers, D, F), (F,), (F, layers, D), (layers, D), seed=6)
    stored = {"W_enc": E, "W_dec": W, "b_enc": b, "b_dec": c}
    config = {
        "architecture": "standard", "d_in": D, "d_sae": F, "hook_names": [f"blocks.{i}.hook_resid_post" for i in range(layers)],
        "apply_b_dec_to_input": subtract, "normalize_activations": normalise, "activation_fn_str": act, 
        "model_name": "gpt2", "prepend_bos": True,
        "activation_fn_kwargs": {"k": 4} if act == "topk" else {}, "finetuning_scaling_factor": False,
    }  # fmt: skip
    write(folder, "sae_weights.safetensors", stored, config, "cfg.json")

    def formula(x):
        f = codes(x - c if subtract else x, E, b)
        if act == "topk":
            for i in range(len(f)):
                f[i, f[i].argsort(descending=True)[4:]] = 0
        return f, torch.stack([f @ W[:, m] + c[m] for m in range(layers)], 1)

    return Written(folder, formula, {}, stored)


def sae_lens_flat(folder, *, architecture="crosscoder", layers=2, out=None):
    """§3.8, the fork: the layers concatenated, [n·d_in, d_sae]."""
    E, b, W, c, t = numbers((layers * D, F), (F,), (F, layers * D), (layers * D,), (F,), seed=7)
    stored = {"W_enc": E, "W_dec": W, "b_enc": b, "b_dec": c} | (
        {"threshold": t.abs()} if architecture.startswith("jump") else {}
    )
    hooks = [f"blocks.{i}.hook_resid_pre" for i in range(layers)]
    config = {
        "architecture": architecture, "d_in": layers * D, "d_out": layers * D, "d_model": D, "d_sae": F, "n_input_layers": layers,
        "n_output_layers": layers, "hook_names_in": hooks, "hook_names_out": out or hooks, "apply_b_dec_to_input": False,
        "normalize_activations": "none",
    }  # fmt: skip
    write(folder, "sae_weights.safetensors", stored, config, "cfg.json")

    def formula(x):
        pre = x.flatten(1) @ E + b
        f = pre.relu() * (pre > t.abs()) if architecture.startswith("jump") else pre.relu()
        return f, (f @ W + c).view(len(x), layers, D)

    return Written(folder, formula, {}, stored)
