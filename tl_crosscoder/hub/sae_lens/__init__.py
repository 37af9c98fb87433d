"""SAE-Lens: a crosscoder as its file, as an SAE of one model, and as the SAE of two models run as one.

``artifact`` reads and writes the folder and needs no SAE-Lens; ``native/`` holds the subclasses of its classes and is imported
only where they are used.
"""
