"""The mathematics of the dictionary: codes, sparsity, losses, the crosscoder.  No language models here."""
