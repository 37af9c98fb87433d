"""Subclasses of SAE-Lens' and TransformerLens' own classes.

Importing a module here imports SAE-Lens, which takes seconds: only functions do that.
"""
