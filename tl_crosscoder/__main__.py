"""``python -m tl_crosscoder``, and so ``torchrun -m tl_crosscoder``: the command line."""

from tl_crosscoder.cli import main

if __name__ == "__main__":
    main()
