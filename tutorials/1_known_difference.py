# %% [markdown]
# # A difference we know
#
# Before trusting a crosscoder on language models, try it where the answer is known. `SyntheticPair` makes the activations of two "models" out
# of concepts: some shared, some weaker in the base model, some in one model only, and some *decoupled* ones that each model uses in contexts of
# its own. We train two crosscoders on them, ask which latents are tuned-only, and count how often each is wrong.
#
# Source of the two artifacts shown here: Minder et al. 2025, arXiv:2504.02922.

# %%
import torch

import tl_crosscoder as tlc

STEPS, BATCH, TOKENS = 400, 512, 20_000

pair = tlc.SyntheticPair(d_in=32, n_shared=16, n_weak=6, n_base=5, n_tuned=6, n_decoupled=5, p=0.05, seed=0)
held_out = pair.sample(TOKENS, seed=7).x
print(f"activations: {list(held_out.shape)} = [batch, model, d_in]; model 0 is base, model 1 is tuned")

# %% [markdown]
# ## Two ways to make codes sparse
#
# An L1 penalty charges every latent for the norms of both its decoders; BatchTopK keeps the strongest activations of a batch and charges nothing.

# %%
config = tlc.TrainConfig(steps=STEPS, lr=1e-2, progress=False)

l1 = tlc.Crosscoder(pair.d_in, 64, tlc.ReLU(), init=tlc.Init(norm=0.1))
tlc.train(l1, pair.batches(BATCH, seed=0), [tlc.MSE(), tlc.L1(0.15)], config)

topk = tlc.Crosscoder(
    pair.d_in, 64, tlc.BatchTopK(2, k_max=10, k_anneal_steps=STEPS // 5), init=tlc.Init(same=False)
)
tlc.train(topk, pair.batches(BATCH, seed=0), [tlc.MSE(), tlc.AuxK(dead_after_tokens=5_000)], config)

tables = {
    "L1": tlc.latent_table(l1, held_out.split(4096)),
    "BatchTopK": tlc.latent_table(topk, held_out.split(4096)),
}
for name, table in tables.items():
    metrics = table.attrs["metrics"]
    print(f"{name:10} explains {metrics['fve']:.1%} of the variance with {metrics['l0']:.1f} latents a token")

# %% [markdown]
# ## Who is tuned-only?
#
# `delta_norm` compares the two decoder norms of a latent: 1 means that only the tuned model writes it. Above 0.9 the papers call it tuned-only.
# Because we planted the concepts we can say which of these calls are true.

# %%
crosscoders = {"L1": l1, "BatchTopK": topk}


def report(name: str, called) -> None:
    score = pair.score(crosscoders[name], torch.tensor(called.to_numpy()))
    print(
        f"{name:10} precision {score.precision:.2f}  recall {score.recall:.2f}  calls by true kind: {score.calls}"
    )


print("delta_norm > 0.9 alone")
for name, table in tables.items():
    report(name, table["class"] == "tuned_only")

# %% [markdown]
# Under L1 about half of the calls are wrong. Two things happened: *complete shrinkage* (a concept that is weaker in the base model was cheaper
# without its base decoder) and *latent decoupling* (a shared concept was split into a tuned-only and a base-only latent at the same price).
#
# ## Latent Scaling tells them apart
#
# For each latent: how strongly does its tuned direction occur in the base model's *error* (`nu_error`, high after shrinkage) and in the base
# model's *reconstruction* (`nu_recon`, high after decoupling)?

# %%
print("delta_norm > 0.9 and nu_error < 0.2 and nu_recon < 0.5")
for name, table in tables.items():
    report(name, (table["class"] == "tuned_only") & (table["nu_error"] < 0.2) & (table["nu_recon"] < 0.5))

# %% [markdown]
# The false calls are gone and no true one was lost.
#
# ## A control that must find nothing
#
# Give the crosscoder the same model twice. Anything that it calls exclusive now is an artifact.

# %%
same = tlc.SyntheticPair(
    d_in=32, n_shared=16, n_weak=6, n_base=5, n_tuned=6, n_decoupled=5, p=0.05, mode="identity", seed=0
)
control = tlc.Crosscoder(
    same.d_in, 64, tlc.BatchTopK(2, k_max=10, k_anneal_steps=STEPS // 5), init=tlc.Init(same=False)
)
tlc.train(control, same.batches(BATCH, seed=0), [tlc.MSE(), tlc.AuxK(dead_after_tokens=5_000)], config)
table = tlc.latent_table(control, same.sample(TOKENS, seed=7).x.split(4096))
exclusive = table["class"].isin(["tuned_only", "base_only"]).sum()
print(f"exclusive latents of identical models: {exclusive}")

# %% [markdown]
# Next: [two real language models](2_base_vs_tuned.ipynb).
