"""``python -m drgr`` runs the command line."""

from drgr.cli import main

if __name__ == "__main__":
    main()
