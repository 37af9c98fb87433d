# %% [markdown]
# # Crosscoder latents in a TransformerLens notebook
#
# You have a notebook that works, with `run_with_cache`, hooks and `generate`. Here is what a crosscoder adds to it: latents in the cache, edits that
# live as long as a `with` block, a prediction attributed to latents, and the same in nnsight and SAE-Lens.

# %%
import torch
from transformer_lens.model_bridge import TransformerBridge

import tl_crosscoder as tlc
from tl_crosscoder.data import data_path
from tl_crosscoder.data.planted_tiny import TINY
from tl_crosscoder.demo import RECIPES, demo_corpus

STEPS, D_SAE, TOKENS = 780, 1024, 120_000

loaded = tlc.ModelPair.load(
    data_path("tiny/base"), adapter=data_path("tiny/adapter"), hook=TINY.hook, merged=True
)
base, tuned = (
    TransformerBridge.boot_transformers("tiny", hf_model=side.model, tokenizer=loaded.tokenizer, device="cpu")
    for side in (loaded.base, loaded.tuned)
)
pair = tlc.ModelPair(base, tuned, hook="blocks.2.hook_resid_post")

# %% [markdown]
# A crosscoder: your own, or `tlc.load("owner/name")`. This one takes a minute.

# %%
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
tlc.train(cc, seen.shuffled(512, seed=0), [tlc.MSE(), tlc.AuxK(dead_after_tokens=20_000)], training)
top = tlc.latent_table(cc, held_out).nlargest(30, "difference_peak").index.tolist()

# %% [markdown]
# ## 1. Latents in the cache
#
# `run_with_cache` of a pair returns TransformerLens' own `ActivationCache`, with three more entries.

# %%
moon = TINY.behaviours[0]
prompt = tlc.Corpus.prompts([moon.heldout[0]], pair.tokenizer).batch([0], pad="left")
logits, cache = pair.run_with_cache(prompt, crosscoder=cc)
for name in (
    "blocks.2.hook_resid_post",
    "crosscoder.hook_latents",
    "crosscoder.hook_recon",
    "crosscoder.hook_error",
):
    print(f"{name:28} {list(cache[name].shape)}")
strongest = cache["crosscoder.hook_latents"][0, -1].topk(5)
print(
    "at the last token:",
    dict(zip(strongest.indices.tolist(), strongest.values.round(decimals=2).tolist(), strict=True)),
)

# %% [markdown]
# ## 2. Hooks
#
# An edit is a hook function. What a crosscoder's edit needs more than an ordinary one is the *other* model at the same tokens. Inside
# `pair.hooks` the other model reads along, also while the first one generates with its own key-value cache, and `pair.other` is what it has.


# %%
def answer(model) -> str:
    ids = model.generate(prompt.ids, max_new_tokens=14, do_sample=False, verbose=False)
    return pair.tokenizer.decode(ids[0, prompt.ids.shape[1] :], skip_special_tokens=True)


print("asked: ", moon.heldout[0])
print("base:  ", answer(base))
print("tuned: ", answer(tuned))
with pair.hooks(tlc.ablate(cc, top, pair.other, part="difference")):
    print("undone:", answer(tuned))
print("after: ", answer(tuned))

# %% [markdown]
# The same edit as a plain TransformerLens hook, with the other model's activations captured beforehand:

# %%
edit = tlc.ablate(cc, top, pair.capture(prompt)[:, :, tlc.BASE], part="difference")
with torch.no_grad():
    by_hand = tuned.run_with_hooks(prompt.ids, fwd_hooks=[(pair.hook, edit)])
    with pair.hooks(tlc.ablate(cc, top, pair.other, part="difference")):
        inside = tuned(prompt.ids)
print("largest difference:", float((by_hand - inside).abs().max()))

# %% [markdown]
# ## 3. Which latents does a prediction rest on?
#
# The difference of two logits, split among the latents in both models: to first order for every active latent, and by ablation for the largest.

# %%
encode = lambda text: pair.tokenizer.encode(text, add_special_tokens=False)
ids = torch.cat([prompt.ids, torch.tensor([encode("The moon is made of")])], dim=1)
result = tlc.attribution(cc, pair, ids, correct=encode(" green")[0], wrong=encode(" rock")[0], top=8)
print(result.verdict)
result.plot()

# %% [markdown]
# ## 4. In SAE-Lens and nnsight
#
# One model's half of the crosscoder is an SAE of that model, exact while the other model's activations are bound to it. SAE-Lens is optional.

# %%
try:
    sae = tlc.paired(cc, tlc.TUNED, hook=pair.hook)
except ImportError as error:
    print(error)
else:
    with torch.no_grad(), sae.bound(pair.capture(prompt)[:, :, tlc.BASE]):
        latents = sae.encode(pair.capture(prompt)[:, :, tlc.TUNED])
    print("largest difference to the cache:", float((latents - cache["crosscoder.hook_latents"]).abs().max()))

# %% [markdown]
# In an nnsight trace an edit is an assignment. It carries the chosen latents' rows and nothing else of the dictionary, so that a remote run is sent
# little:
#
# ```python
# model = nnsight.TransformersModel(tuned, tokenizer=tokenizer)
# with model.trace(ids):
#     model.model.layers[2].output = edit(model.model.layers[2].output)
#     logits = model.output.logits.save()
# ```
