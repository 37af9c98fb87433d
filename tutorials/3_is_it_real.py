# %% [markdown]
# # Is it real?
#
# A gate lets some latents through: "these are the fine-tune's". Before you believe it, ask what the same gate lets through where nothing was
# changed, where the change is noise, and where the two sides merely read other texts; whether another seed finds the same latents; and whether
# anything the model does needs them.

# %%
import tl_crosscoder as tlc
from tl_crosscoder.data import data_path
from tl_crosscoder.data.planted_tiny import TINY
from tl_crosscoder.demo import RECIPES, demo_corpus

STEPS, D_SAE, TOKENS = 500, 1024, 120_000

pair = tlc.ModelPair.load(
    data_path("tiny/base"), adapter=data_path("tiny/adapter"), hook=TINY.hook, merged=True
)
store = tlc.capture(pair, demo_corpus(pair, RECIPES["tiny"], seed=0).take(TOKENS, seed=0), progress=False)
print(store)

# %% [markdown]
# ## 1. The gate
#
# A narrow fine-tune changes part of what shared latents write, so a gate on decoder norms would let nothing through here. The gate below is the
# largest difference between the models that a latent writes on any token.
#
# The audit trains crosscoders itself, so it wants to know how.


# %%
def learn(arm: str, activations: tlc.PairedActivations, seed: int) -> tlc.Crosscoder:  # noqa: ARG001
    # All latents start alike in both models: those that start apart need more steps before another seed finds them.
    cc = tlc.Crosscoder(
        activations.d_in, D_SAE, tlc.BatchTopK(16),
        normalizer=tlc.Normalizer.fit(activations), init=tlc.Init(norm=0.5, seed=seed),
    )  # fmt: skip
    losses = [tlc.MSE(), tlc.AuxK(dead_after_tokens=20_000)]
    config = tlc.TrainConfig(steps=STEPS, lr=3e-3, decay_fraction=0.3, progress=False)
    tlc.train(cc, activations.shuffled(512, seed=seed), losses, config)
    return cc


audit = tlc.gate_audit(
    store, learn, gate=tlc.Gate("peak"), seeds=(0, 1), pair=pair,
    task=tlc.BehaviourTask(TINY.behaviours), off_task=tlc.Unchanged("other questions", tuple(TINY.ordinary_heldout)),
    with_lexical=True, progress=False,
)  # fmt: skip
print(*audit.verdict, sep="\n\n")

# %% [markdown]
# ## 2. The arms
#
# *identity*: the base model twice, where anything that passes is a fault of the gate. *noise*: the base model plus noise as large as the real
# difference. *disjoint*: the base model on two different texts; hundreds of latents pass, so a count above zero is no evidence by itself.

# %%
audit.table.query("threshold == @audit.settings['gate']['threshold']").round(3)

# %%
audit.plot()

# %% [markdown]
# ## 3. Does another seed find them?
#
# Latents of two seeds are matched one to one by their decoders, beside two nulls: the other side rotated, and random living latents.

# %%
audit.stability.round(3)

# %% [markdown]
# ## 4. Which ones, and does the model need them?
#
# The words on which each fires. The planted behaviours are a few fixed sentences, so the latents are about single words of these; an audit that
# does not count such latents (`with_lexical=False`, the default) would have nothing left to find again, and say so.

# %%
audit.latents.head(8)

# %% [markdown]
# Then the tuned model answers held-out prompts without them, without sets of other latents that are as loud and as frequent, and with random
# directions of the same length taken out.

# %%
{name: value for name, value in audit.ablation.items() if isinstance(value, int | float)}

# %% [markdown]
# A null result would come with the smallest effect that so few prompts could have shown (`mde`): absence of evidence is said to be just that.
# The same on a run of your own: `tl-crosscoder audit RUN`.
