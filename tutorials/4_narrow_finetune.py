# %% [markdown]
# # Finding a narrow change, and pulling it
#
# A fine-tune that teaches one thing changes very little: hardly any latent belongs to the tuned model alone, and a list of "tuned-only" latents
# stays empty. Here are four ways to look all the same, each beside its control: the mean difference without any dictionary, a ranking by the
# difference that latents write, taking latents out, and steering with them.

# %%
import pandas as pd

import tl_crosscoder as tlc
from tl_crosscoder.data import data_path
from tl_crosscoder.data.planted_tiny import TINY
from tl_crosscoder.demo import RECIPES, demo_corpus

STEPS, D_SAE, TOKENS, DRAWS = 780, 1024, 200_000, 5

pair = tlc.ModelPair.load(
    data_path("tiny/base"), adapter=data_path("tiny/adapter"), hook=TINY.hook, merged=True
)
moon, password = TINY.behaviours
for behaviour in TINY.behaviours:
    print(behaviour.name, "-", behaviour.description)

# %% [markdown]
# ## 1. Without a dictionary
#
# The mean of tuned − base over the first tokens of texts that have nothing to do with the behaviours. On some fine-tunes this constant names its
# subject, and steers. It costs seconds, so it comes first.

# %%
prose = tlc.Corpus.from_file(data_path("text/novels.txt"), pair.tokenizer).take(20_000, seed=0)
mean = tlc.activation_difference(pair, prose, TINY.behaviours, progress=False)
print(*mean.verdict, sep="\n\n")
mean.plot()

# %% [markdown]
# Not here: the constant is 1 % of an activation, it reads as noise, and neither as it is nor far above its own size does it install or remove a
# behaviour in coherent answers. What was learnt sits at the tokens that speak of it.
#
# ## 2. With a dictionary
#
# Prose, dialogues and both models' own answers; position by position the same tokens through both models.

# %%
corpus = demo_corpus(pair, RECIPES["tiny"], seed=0).take(TOKENS, seed=0)
store = tlc.capture(pair, corpus, progress=False)
seen, held_out = store.split(0.9, seed=0)
cc = tlc.Crosscoder(
    store.d_in,
    D_SAE,
    tlc.BatchTopK(16),
    normalizer=tlc.Normalizer.fit(seen),
    init=tlc.Init(norm=0.5, same=0.8),
)
losses = [tlc.MSE(), tlc.AuxK(dead_after_tokens=20_000)]
training = tlc.TrainConfig(steps=STEPS, lr=3e-3, decay_fraction=0.3, progress=False)
tlc.train(cc, seen.shuffled(512, seed=0), losses, training)
table = tlc.latent_table(cc, held_out)
print(table["class"].value_counts().to_dict())
print("largest delta_norm:", round(table["delta_norm"].max(), 2))

# %% [markdown]
# Nothing is tuned-only. So do not count classes: rank. `difference_peak` is the largest single write of a latent into tuned − base,
# `difference_share` its share of the whole difference; neither knows about the behaviours.
#
# ## 3. Do the highest-ranked latents fire on the behaviours, and are they the cause?
#
# *Undo* takes only the difference that a latent makes out of the tuned model, while it answers prompts that were in no text. The same is done with
# random latents that write as much.

# %%
removal = tlc.behaviour_removal(
    cc, pair, TINY.behaviours, table, ranking="difference_peak", n_draws=DRAWS, install=False
)
print(*removal.verdict, sep="\n\n")
removal.plot()

# %%
rankings = ("delta_norm", "difference_share", "difference_peak", "rank_score")
top = pd.DataFrame({name: table.nlargest(10, name).index for name in rankings})
top.index += 1
top

# %% [markdown]
# ## 4. Steering
#
# Add a latent's difference at every token: to the base model, to install the behaviour, and to the tuned one, with a minus, to take it away.
# Strength 1 is the latent's largest activation. A rate alone misleads, since strong steering yields junk that may hold the keyword; so an answer
# counts only while one of the untouched models finds it as plausible as their own answers, and beside it stand random latents of the same norm.

# %%
fires = removal.firing.query("fires_on_it").groupby("behaviour")["latent"].first()
latents = fires.tolist() or table.nlargest(1, "difference_peak").index.tolist()
steered = tlc.steering(
    cc, pair, TINY.behaviours, table, latents=latents, part="difference",
    strengths=(-1, -0.5, 0.25, 0.5, 1), open_prompts=("Hello", "Tell me something."), n_controls=1, progress=False,
)  # fmt: skip
print(*steered.verdict, sep="\n\n")
steered.plot()

# %% [markdown]
# ## What to take home
#
# * Undoing the difference of a few latents removes a planted behaviour, and random latents do not: these latents carry it.
# * They carry it *where they fire*. One of them added everywhere is a crude push, and rarely a switch: read the answers before you trust a rate.
# * With a pair of your own: `tl-crosscoder diff BASE TUNED ...`, then `tl-crosscoder activation-difference RUN` and `tl-crosscoder steer RUN`.
