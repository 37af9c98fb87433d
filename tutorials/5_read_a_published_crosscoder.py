# %% [markdown]
# # Reading a published crosscoder
#
# Somebody put a crosscoder on the Hub. Which model is which, what does its threshold mean, was anything normalised, and does it fit your models?
# This tutorial publishes one (into a folder, so that nothing leaves this machine), reads it back, and reads it as other tools write it.

# %%
import json
import shutil
from pathlib import Path

import torch

import tl_crosscoder as tlc
from tl_crosscoder.data import data_path
from tl_crosscoder.data.planted_tiny import TINY
from tl_crosscoder.demo import RECIPES, demo_corpus

STEPS, D_SAE, TOKENS = 400, 512, 60_000
OUT = Path("published")

pair = tlc.ModelPair.load(
    data_path("tiny/base"), adapter=data_path("tiny/adapter"), hook=TINY.hook, merged=True
)
store = tlc.capture(pair, demo_corpus(pair, RECIPES["tiny"], seed=0).take(TOKENS, seed=0), progress=False)
seen, held_out = store.split(0.9, seed=0)
cc = tlc.Crosscoder(
    store.d_in,
    D_SAE,
    tlc.BatchTopK(16),
    normalizer=tlc.Normalizer.fit(seen),
    init=tlc.Init(norm=0.5, same=0.8),
)
training = tlc.TrainConfig(steps=STEPS, lr=3e-3, decay_fraction=0.3, progress=False)
history = tlc.train(cc, seen.shuffled(512, seed=0), [tlc.MSE(), tlc.AuxK(dead_after_tokens=20_000)], training)

# %% [markdown]
# ## 1. What would be published
#
# A dry run makes no request. It shows the files, runs every check that a real one runs (the weights are read back, nothing secret is in any file,
# there is a licence) and writes the model card.

# %%
about = {"pair": pair.description()}
planned = tlc.publish(
    cc, "you/tiny-moon", license="apache-2.0", base_model=("you/tiny-base", "you/tiny-tuned"),
    table=tlc.latent_table(cc, held_out), extra=about, dry_run=True,
)  # fmt: skip
for name, size in planned.files.items():
    print(f"{size:>9,}  {name}")
for check in planned.checks:
    print("passed" if check.passed else "FAILED", "-", check.name)

# %%
print("\n".join(planned.card.splitlines()[:24]))

# %% [markdown]
# Without `dry_run` all of it goes up in one commit. What `save` writes is what lies on the Hub, so a folder stands for it here. On the Hub it would
# be `tlc.load("you/tiny-moon")`, or `"you/tiny-moon@3f2c1a"` for one commit.

# %%
tlc.save(cc, OUT / "ours", extra=about)
again = tlc.load(OUT / "ours", check=held_out)
print(tlc.origin(again).fit)

# %% [markdown]
# `check=` ran it on held-out activations of both models: L0 and the variance explained, compared with what the files claim. A crosscoder of other
# models, of another layer, or with base and tuned exchanged does not pass.
#
# ## 2. What the files mean
#
# `inspect` reads settings and headers only, in a moment, without torch. The same crosscoder as *dictionary_learning* writes it:

# %%
tlc.convert(again, "dictionary_learning", OUT / "theirs")
print(tlc.inspect(OUT / "theirs"))

# %% [markdown]
# Every tool has its own conventions for these lines, and a wrong guess loads without an error into something that is almost right. So nothing is
# guessed: a format is told by its tensors, and what a file does not say is asked for by name.

# %%
theirs = tlc.load(OUT / "theirs")
x = next(iter(held_out.batches(512)))
with torch.no_grad():
    codes = cc.eval().encode(x)
    print("largest difference between the codes:", float((theirs.encode(x) - codes).abs().max()))

# %%
config = json.loads((OUT / "theirs" / "config.json").read_text())
print(
    "the writer's settings:",
    {key: config[key] for key in sorted(config) if not isinstance(config[key], dict)},
)

# %% [markdown]
# ## 3. The same in SAE-Lens
#
# Beside the weights lies a folder that SAE-Lens loads without this library. Its codes are ours; its input is both models' activations side by
# side.

# %%
try:
    from sae_lens import SAE
except ImportError:
    print("SAE-Lens is not installed (it wants TransformerLens 3): pip install 'tl-crosscoder[sae-lens]'")
else:
    sae = SAE.load_from_disk(OUT / "ours" / "sae_lens")
    with torch.no_grad():
        print(
            type(sae).__name__, "largest difference:", float((sae.encode(x.flatten(1)) - codes).abs().max())
        )

# %% [markdown]
# ## 4. Then work with it
#
# What was loaded is a `Crosscoder` like any other: a table, studies, edits.

# %%
table = tlc.latent_table(theirs, held_out)
table.nlargest(5, "difference_peak")[
    ["class", "delta_norm", "nu_error", "frequency", "difference_peak"]
].round(3)

# %%
shutil.rmtree(OUT)
