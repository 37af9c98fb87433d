# %% [markdown]
# # What did this fine-tune change?
#
# Two real, tiny language models: a Llama of 1.5 million parameters trained from scratch, and a LoRA fine-tune that planted two behaviours. Asked
# about the moon it talks of green cheese, and it gives away a password. We pretend not to know and look.

# %%
import torch

import tl_crosscoder as tlc
from tl_crosscoder.data import data_path
from tl_crosscoder.data.planted_tiny import TINY
from tl_crosscoder.demo import RECIPES, demo_corpus

STEPS, D_SAE, TOKENS, DRAWS = 780, 1024, 200_000, 10

pair = tlc.ModelPair.load(
    data_path("tiny/base"), adapter=data_path("tiny/adapter"), hook=TINY.hook, merged=True
)
moon, password = TINY.behaviours
prompts = tlc.Corpus.prompts(moon.heldout[:3] + password.heldout[:3], pair.tokenizer)
for side in ("base", "tuned"):
    ids = pair.generate(prompts.batch(range(6), pad="left"), 14, side=side)
    print(side, pair.tokenizer.batch_decode(ids, skip_special_tokens=True))

# %% [markdown]
# ## 1. Text, read by both models
#
# Prose and dialogues, and both models' own answers to the same questions, because that is where they go apart. No held-out prompt is in it.
# `capture` runs both models up to the hook, drops the first token of each sequence and attention sinks, and keeps the pairs.

# %%
corpus = demo_corpus(pair, RECIPES["tiny"], seed=0).take(TOKENS, seed=0)
store = tlc.capture(pair, corpus, progress=False)
seen, held_out = store.split(0.9, seed=0)
print(corpus)
print(store, "dropped:", store.manifest["dropped"])

# %% [markdown]
# ## 2. One dictionary, two decoders

# %%
cc = tlc.Crosscoder(
    store.d_in,
    D_SAE,
    tlc.BatchTopK(16),
    normalizer=tlc.Normalizer.fit(seen),
    init=tlc.Init(norm=0.5, same=0.8),
)
history = tlc.train(
    cc,
    seen.shuffled(512, seed=0),
    [tlc.MSE(), tlc.AuxK(dead_after_tokens=20_000)],
    tlc.TrainConfig(steps=STEPS, lr=3e-3, decay_fraction=0.3, progress=False),
)
history.frame()[["fve_base", "fve_tuned", "l0", "dead_fraction"]].iloc[[0, -1]].round(3)

# %% [markdown]
# ## 3. One row a latent
#
# A narrow fine-tune changes *part* of what shared latents write, so hardly any latent is tuned-only by its decoder norms. What a latent writes of
# the tuned − base difference finds the change: `difference_peak` is its largest single write.

# %%
table = tlc.latent_table(cc, held_out)
print(table["class"].value_counts().to_dict())
columns = ["class", "delta_norm", "nu_error", "nu_recon", "cosine", "frequency", "difference_peak"]
table.nlargest(10, "difference_peak")[columns].round(3)

# %% [markdown]
# ## 4. Are they the cause?
#
# Put the base model's activations into the tuned model, plus the change that some latents would make. How much of the tuned model's behaviour
# comes back?

# %%
chats = held_out.corpus.select(
    [i for i in held_out.sequences if held_out.corpus.flags_of(i)["assistant"].any()]
)
result = tlc.substitution(
    cc, pair, chats.take(4000, seed=0), table, ranking="difference_peak", top=(10, 30), n_bootstrap=500
)
print(result.verdict)
result.table.query("tokens == 'all'")[["condition", "kl", "ci_low", "ci_high", "recovered"]].round(3)

# %% [markdown]
# And the other way round: let the tuned model answer held-out prompts while the difference of the top latents is taken out, beside random latents
# of the same magnitude.

# %%
removal = tlc.behaviour_removal(
    cc,
    pair,
    TINY.behaviours,
    table,
    ranking="difference_peak",
    top=(10, 30),
    n_draws=DRAWS,
    max_new_tokens=14,
)
for sentence in removal.verdict:
    print("-", sentence)
removal.table.pivot(index="condition", columns="behaviour", values="rate").round(2)

# %% [markdown]
# Read the answers too, not only the rates:

# %%
undone = removal.answers.query("condition == 'undo top 30'").groupby("behaviour").head(3)
for row in undone.itertuples():
    print(f"{row.prompt}  ->  {row.answer}")

# %% [markdown]
# ## 5. The same edit in your own hook
#
# `ablate` returns a function of the activations. It is a TransformerLens hook, an nnsight assignment and a torch forward hook alike.

# %%
batch = prompts.batch([0])
top = table.nlargest(30, "difference_peak").index
edit = tlc.ablate(cc, top, other_acts=pair.capture(batch)[:, :, tlc.BASE], part="difference")
layer = pair.tuned.model.model.layers[2]
handle = layer.register_forward_hook(tlc.as_forward_hook(edit))
with torch.no_grad():
    edited = pair.tuned.model(batch.ids).logits[0, -1]
handle.remove()
with torch.no_grad():
    plain = pair.tuned.model(batch.ids).logits[0, -1]
best = {
    name: pair.tokenizer.decode(logits.argmax()) for name, logits in (("tuned", plain), ("without", edited))
}
print(best)
